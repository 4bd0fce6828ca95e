"""--batch_size=auto: trial steps, limits, agreement between processes, resumed trainings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from data.config import get_config
from data.shapes import write_dataset
from utils import checkpoint
from utils.distributed.processes import Processes
from utils.engine import batch_size as auto_batch
from utils.engine.batch_size import (
    MemoryNeed,
    Trial,
    choose_batch_size,
    measure,
    resumed_batch_size,
)
from utils.errors import UserError
from utils.memory import process_peak

MIB, GIB = 1 << 20, 1 << 30
CPU = torch.device("cpu")
TRIAL = Trial(get_config("yolact_shapes"), 8, ("O0", None, "auto"), 0)

pytestmark = pytest.mark.skipif(process_peak() is None, reason="no /proc: nothing can be measured")


def test_the_line_through_two_steps():
    need = MemoryNeed.from_peaks((2, 4), [(500, 550), (900, 900)])
    assert need == MemoryNeed(fixed=100, per_image=200, update=550)
    assert [need.of_batch(n) for n in (0, 1, 2, 3, 8)] == [550, 550, 550, 700, 1700]
    assert [need.largest_batch(n) for n in (549, 550, 699, 700, 1700)] == [0, 2, 2, 3, 8]


def test_a_batch_of_any_size_fits_where_images_take_nothing():
    assert MemoryNeed.from_peaks((2, 4), [(300, 0), (290, 0)]).largest_batch(10 ** 6) > 10 ** 5


def test_need_in_words():
    assert MemoryNeed(GIB // 2, GIB, 0).sentence(2) == (
        "2.5 GiB for 2 images (512 MiB + 1.0 GiB per image)")
    assert MemoryNeed(GIB // 2, GIB, 3 * GIB).sentence(2) == (
        "3.0 GiB for 2 images (512 MiB + 1.0 GiB per image; the optimiser 3.0 GiB)")
    assert MemoryNeed(0, GIB, 0).sentence(1).startswith("1.0 GiB for 1 image (")


def out_of_memory(*arguments):
    raise RuntimeError("NPU out of memory")


def killed(*arguments):
    os._exit(9)


@pytest.mark.parametrize("step, reason", [(out_of_memory, "NPU out of memory"),
                                          (killed, "terminated abruptly")])
def test_a_card_on_which_not_even_one_image_fits(step, reason):
    with pytest.raises(MemoryError, match=f"steps of 1 and 2 images were tried: .*{reason}"):
        measure(TRIAL, CPU, step)


def test_other_failures_of_a_trial_step_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        measure(TRIAL, CPU, divide)


def divide(*arguments):
    return 1 / 0


@pytest.mark.allocator
def test_trial_steps_see_what_images_take(device):
    state = torch.get_rng_state()
    need = measure(TRIAL, device, train.train_step)
    assert torch.equal(torch.get_rng_state(), state)
    # The layers put out 6.8 MiB. On the CPU what is freed stays with the process for a while, and
    # the process itself is a part of what is fixed: 200 MiB and more, which must not be an image's.
    assert 6 * MIB < need.per_image < (64 if device.type == "cpu" else 12) * MIB
    assert 20 * MIB < need.fixed < 1000 * MIB
    # On the CPU what two images had before the update is part of its peak.
    assert 12 * MIB < need.update - need.fixed < (100 if device.type == "cpu" else 60) * MIB
    # Two processes differ by some MiB: that many copies stand out.
    more = measure(TRIAL._replace(extra_copies=20), device, train.train_step)
    assert more.fixed - need.fixed == pytest.approx(20 * 12 * MIB, abs=50 * MIB)


@pytest.fixture
def measured(monkeypatch):
    """Choose with a need of 100 + 10 per image of what is free; returns a function of that."""
    monkeypatch.setattr(auto_batch, "measure", lambda trial, device, step: MemoryNeed(100, 10, 0))

    for name in ("LOCAL_WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)

    def choose(free, images=10 ** 6, micro_batches=1, processes=Processes(), more=None):  # noqa: B008
        monkeypatch.setattr(auto_batch, "host_available", lambda: free)
        return choose_batch_size(TRIAL, CPU, processes, micro_batches, images,
                                 train.train_step, more_limits=more)

    return choose


def test_a_tenth_stays_free_and_the_number_is_even(measured):
    assert measured(10 * 200).batch_size == 64  # 1800 - 100 is 170 images: too many for a step
    assert measured(400).batch_size == 26
    assert measured(410).batch_size == 26  # 369 - 100 would be 26
    assert measured(420).batch_size == 26  # 27, made even
    assert measured(125).batch_size == 1
    with pytest.raises(UserError, match="not one image fits, it takes .* for 1 image"):
        measured(120)


def test_the_reason_is_named(measured):
    assert measured(400).sentence.startswith("26 per card, by what fits: ")
    assert measured(4000).sentence.startswith("64 per card, by 64 images a step, beyond which")
    assert measured(4000, micro_batches=4).batch_size == 16
    found = measured(4000, images=11)
    assert found.batch_size == 10 and "the 11 images of the training set" in found.sentence
    found = measured(4000, more={"the rows of a kernel": 7})
    assert found.batch_size == 6 and "6 per card, by the rows of a kernel" in found.sentence


def test_several_processes_of_a_host_share_its_memory(measured, monkeypatch):
    monkeypatch.setattr(auto_batch, "host_available", lambda: 4 * 10 ** 9)
    alone = auto_batch.available_bytes(CPU, 0, {})[0]
    assert auto_batch.available_bytes(CPU, 0, {"LOCAL_WORLD_SIZE": "4"})[0] == alone // 4
    assert auto_batch.available_bytes(CPU, 1, {"NPROC": "2"})[0] == alone // 2 - 256 * MIB


def test_a_system_that_does_not_tell_is_an_error(measured):
    with pytest.raises(UserError, match="does not tell how much memory cpu has; give a number"):
        measured(None)


AGREE = """
import sys
import torch
from utils.engine.batch_size import _smallest
from utils.distributed.processes import Processes
processes = Processes.from_env()
processes.init(torch.device("cpu"))
print(_smallest(10 - processes.rank, processes, torch.device("cpu")))
processes.shutdown()
"""


def test_processes_agree_on_the_smallest():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = [subprocess.Popen(
        [sys.executable, "-c", AGREE], cwd=str(ROOT), stdout=subprocess.PIPE,
        universal_newlines=True,
        env=dict(os.environ, RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=port, PYTHONPATH=str(ROOT))) for rank in range(3)]
    assert [worker.communicate(timeout=120)[0].split() for worker in workers] == [["8"]] * 3


@pytest.fixture
def flags(tmp_path, request, monkeypatch):
    monkeypatch.setattr(auto_batch, "LARGEST_STEP", 4)
    write_dataset(str(tmp_path / "data"), seed=3, train=9, val=2)
    return ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--no_autoscale",
            "--num_workers=0", "--max_iter=3", "--save_interval=2", "--no_log",
            "--node_device={}".format(request.config.getoption("--device"))]


def test_the_chosen_number_is_the_run_s(flags, tmp_path, capsys):
    """To the bit what --batch_size=4 trains; resumed, it stays what it was."""
    weights = {}
    for batch_size in ("auto", "4"):
        folder = str(tmp_path / batch_size)
        assert train.main(flags + ["--batch_size=" + batch_size, "--save_folder=" + folder]) == 0
        out = capsys.readouterr().out
        assert ("Batch size auto : 4 per card, by 4 images a step" in out) is (batch_size == "auto")
        assert "batch 4" in out
        newest = checkpoint.find_checkpoint("latest", folder)
        weights[batch_size] = torch.load(newest, map_location="cpu")
    assert all(torch.equal(value, weights["4"][name]) for name, value in weights["auto"].items())

    auto_batch.LARGEST_STEP = 2  # what would be chosen now
    assert train.main(flags + ["--batch_size=auto", "--save_folder=" + folder,
                               "--resume=latest", "--max_iter=4"]) == 2
    assert train.main(flags + ["--batch_size=auto", "--save_folder=" + folder,
                               "--resume=latest"]) == 0
    assert "Batch size auto : 4 per card, as in " in capsys.readouterr().out
    with pytest.raises(UserError, match="4 images a step, which 3 cards x micro-batches cannot"):
        resumed_batch_size(newest, 3)
    assert resumed_batch_size(newest, 2).batch_size == 2


@pytest.mark.parametrize("text", ["0", "-2", "autp", "2.5", ""])
def test_other_values_are_a_mistake(flags, text, capsys):
    assert train.main(flags + ["--batch_size=" + text]) == 2
    assert "expected a whole number of at least 1, or auto" in capsys.readouterr().err
