"""Running out of memory ends in one sentence with numbers and the flags to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from data.shapes import write_dataset
from utils import memory as out_of_memory
from utils.errors import UserError
from utils.memory import advice, explain_out_of_memory

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size, micro_batches, fits, expected", [
    (16, 1, 12, "Use --batch_size=8 --accumulate=2, which keeps 16 images a step"),
    (16, 2, 3, "Use --batch_size=2 --accumulate=16, which keeps 32 images a step"),
    (6, 1, 0, "Use --batch_size=1 --accumulate=6, which keeps 6 images a step"),
    (7, 1, 6, "Use --batch_size=1 --accumulate=7, which keeps 7 images a step"),
    (8, 0, 5, "Use --batch_size=5"),
    (1, 1, 0, "Use a smaller input by --max_size"),
    (1, 0, 0, "Use a configuration with a smaller input (max_size)"),
])
def test_advice(batch_size, micro_batches, fits, expected):
    assert advice(batch_size, micro_batches, fits) == expected


def test_the_sentence(monkeypatch):
    monkeypatch.setattr(out_of_memory, "memory_info", lambda device: (20 * GIB, 32 * GIB))
    monkeypatch.setattr(out_of_memory, "peak_memory", lambda device: 18 * GIB)
    monkeypatch.setattr(out_of_memory, "held_memory", lambda device: 2 * GIB)
    with pytest.raises(UserError) as caught, explain_out_of_memory(CPU, 16, 1):
        raise RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB\nmore")
    assert str(caught.value) == (
        "out of memory on cpu: this process had 18.0 GiB, and may use 19.8 GiB of 32.0 GiB, of "
        "which others hold 12.0 GiB; a batch of 16 needs more, and 15 at most would fit. Use "
        "--batch_size=4 --accumulate=4, which keeps 16 images a step (NPU out of memory. Tried to "
        "allocate 2.00 GiB)")


def test_what_others_hold_leaves_room_for_less(monkeypatch):
    """4 images had 4 GiB, so each takes 1 GiB at least, and 2 GiB are left."""
    monkeypatch.setattr(out_of_memory, "memory_info", lambda device: (2 * GIB, 4 * GIB))
    monkeypatch.setattr(out_of_memory, "peak_memory", lambda device: 4 * GIB)
    with pytest.raises(UserError) as caught, explain_out_of_memory(CPU, 4, 1):
        raise MemoryError
    assert "needs more, and 1 at most would fit. Use --batch_size=1 --accumulate=4" in str(
        caught.value)


def test_other_errors_pass():
    for error in (RuntimeError("shape"), UserError("mistake"), KeyError("x")):
        with pytest.raises(type(error)), explain_out_of_memory(CPU):
            raise error
    with explain_out_of_memory(CPU):
        pass


@pytest.mark.allocator
def test_the_device_s_own_error(device):
    """A real failure of the allocator; on a card within a tenth of its memory."""
    runtime = getattr(torch, device.type, None)
    if device.type == "cpu":
        size = 1 << 50
    elif hasattr(runtime, "set_per_process_memory_fraction"):
        runtime.set_per_process_memory_fraction(0.01, device)
        size = 16 * GIB
    else:
        pytest.skip("the memory of this card cannot be limited")
    try:
        with pytest.raises(UserError) as caught, explain_out_of_memory(device):
            torch.empty(size, dtype=torch.uint8, device=device)
        assert str(caught.value).startswith(f"out of memory on {device}: ")
    finally:
        if device.type != "cpu":
            runtime.set_per_process_memory_fraction(1.0, device)


LIMITED = """
import resource, sys
import train, utils.memory as memory
used = memory.proc_bytes("/proc/self/status", "VmSize")
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), resource.RLIM_INFINITY))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow  # how near to its limit a process comes differs by some MiB from run to run
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_training_that_really_runs_out(tmp_path):
    """What it advises runs within the same limit, at the latest when it is followed again."""
    write_dataset(str(tmp_path / "data"), seed=3, train=96, val=2)
    flags = ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--num_workers=0",
             "--max_iter=1", "--no_autoscale", "--no_log", "--no_run_folder", "--node_device=cpu",
             "--save_folder={}".format(tmp_path / "weights")]

    def run(*more):
        return subprocess.run([sys.executable, "-c", LIMITED] + flags + list(more), cwd=str(ROOT),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=300,
                              env=dict(os.environ, OMP_NUM_THREADS="1",
                                       OPENBLAS_NUM_THREADS="1", PYTHONPATH=str(ROOT)))

    size, more = 96, ["--batch_size=96"]
    for _ in range(4):  # a step that ended early shows a part of what it needs
        result = run(*more)
        if result.returncode == 0:
            break
        line = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2, result.stderr
        assert line.startswith("error: out of memory on cpu: this process had ")
        assert "Traceback" not in result.stderr
        advised = re.search(
            r"Use --batch_size=(\d+) --accumulate=(\d+), which keeps 96 images a step", line)
        assert advised and int(advised.group(1)) < size, line
        size = int(advised.group(1))
        more = [f"--batch_size={size}", f"--accumulate={advised.group(2)}"]
    assert result.returncode == 0 and size < 96
