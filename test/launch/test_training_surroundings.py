"""What happens around a real training: terminals that go, full disks, killed workers."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data.loader import TrainDataset, TrainLoader
from data.shapes import write_dataset
from helpers.ranks import TRAIN, clean_environ, run_ranks

pytestmark = pytest.mark.launch
LONG = 2000


@pytest.fixture
def data(tmp_path):
    write_dataset(str(tmp_path / "data"), seed=3, train=12, val=4)
    return tmp_path / "data"


def flags_of(data, steps, workers=0):
    return [f"--data={data}", "--config=yolact_shapes", "--batch_size=2", "--no_autoscale",
            f"--num_workers={workers}", f"--max_iter={steps}",
            f"--save_folder={data.parent / 'weights'}", "--no_log", "--node_device=cpu",
            f"--project={data.parent / 'runs'}", "--validation_epoch=-1"]


def start(data, steps=LONG, workers=0, more=(), **streams):
    streams = dict(dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), **streams)
    return subprocess.Popen([sys.executable, "-u", "train.py"] + flags_of(data, steps, workers)
                            + list(more), cwd=str(ROOT), env=clean_environ(), bufsize=0, **streams)


def wait_for_step(process):
    for line in process.stdout:
        if line.startswith(b"[  0]"):
            return
    raise AssertionError(process.stderr.read())


def saved(data):
    return sorted(path.name for path in (data.parent / "weights").glob("*.pth"))


def break_image(data, split, number):
    """Cut an image of the dataset off; returns its file's name."""
    info = json.loads((data / "annotations" / f"instances_{split}.json").read_text())
    path = data / split / info["images"][number]["file_name"]
    path.write_bytes(path.read_bytes()[:-20])
    return path.name


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_save(data, number):
    process = start(data)
    wait_for_step(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""
    assert f"Stopped by {signal.Signals(number).name}" in out.decode()
    assert [name for name in saved(data) if name.endswith("_interrupt.pth")]


def test_a_hang_up_under_nohup_is_not_heard(data):
    process = start(data, steps=40,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(process)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and b"Final weights" in out


def test_a_reader_that_has_gone(data):
    """`train.py | head -1`: it goes on, and says once that nobody reads."""
    process = start(data, steps=20)
    wait_for_step(process)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert err.count("stdout cannot be written") == 1 and "Traceback" not in err
    assert saved(data) == ["yolact_shapes_3_20.pth"]


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "> /dev/full 2>&1"])
def test_streams_that_are_closed_or_full(data, redirection):
    command = " ".join([sys.executable, "train.py"] + flags_of(data, 3)) + " " + redirection
    done = subprocess.run(["bash", "-c", command], cwd=str(ROOT), env=clean_environ(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert saved(data) == ["yolact_shapes_0_3.pth"]


@pytest.mark.parametrize("number, sentence", [
    (signal.SIGKILL, "a process that loads images was lost"),
    (signal.SIGSTOP, "the data loader delivered no batch for 3 s (--loader_timeout)")])
def test_a_killed_and_a_hanging_worker(data, number, sentence):
    process = start(data, workers=2, more=["--loader_timeout=3"])
    wait_for_step(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 2
    assert err.decode().startswith("error: " + sentence)
    assert "--resume=interrupt goes on" in err.decode() and err.count(b"\n") == 1
    assert saved(data)[-1].endswith("_interrupt.pth")
    assert not Path(f"/proc/{children[-1]}").exists()


def test_too_few_open_files_are_said_before_the_first_step(data):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    process = start(data, workers=3, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(r"error: this process may open 64 files \(ulimit -n\), and --num_workers=3 "
                     r"needs up to \d+: raise", err.decode())  # PyTorch may warn before
    assert saved(data) == [] and not (data.parent / "runs").exists()


SMALL_SHARED_MEMORY = ["unshare", "--map-root-user", "--mount", "sh", "-c",
                       'mount -t tmpfs -o size=100k none /dev/shm && exec "$@"', "sh"]


@pytest.mark.skipif(not shutil.which("unshare") or subprocess.run(
    SMALL_SHARED_MEMORY + ["true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="this user may not mount a small /dev/shm")
@pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                    reason="the worker dies of SIGBUS there, which is another sentence")
def test_too_little_shared_memory_is_said_at_once(data):
    done = subprocess.run(SMALL_SHARED_MEMORY + [sys.executable, "train.py"]
                          + flags_of(data, 3, workers=1), cwd=str(ROOT), env=clean_environ(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: a batch does not fit into shared memory")
    assert b"--shm-size" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("steps, then, end", [
    (30, "then --resume=interrupt goes on from iteration 6", "1_6_interrupt"),
    (6, "the training is at its end: ", "1_6")])
def test_a_broken_validation_image(data, steps, then, end):
    name = break_image(data, "val2017", 2)
    process = start(data, steps=steps, more=["--validation_epoch=1"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert name in err.decode() and then in err.decode()
    assert saved(data) == [f"yolact_shapes_{end}.pth"]


IN_VALIDATION = """
from utils.inference import evaluation
read = evaluation.EvaluationBatches.__getitem__
def strike(self, number):
    import os, pathlib, time
    if number == 1 and os.environ.get("RANK", "1") == "1":
        pathlib.Path("reached").touch()
        if "{kind}" == "hang":
            time.sleep(1000)
        elif "{kind}" == "raise":
            raise MemoryError("no memory for masks")
    time.sleep(1)
    return read(self, number)
evaluation.EvaluationBatches.__getitem__ = strike
"""


def test_a_loader_that_hangs_in_a_validation(tmp_path):
    write_dataset(str(tmp_path / "data"), seed=3, train=12, val=20)
    codes, (output,) = run_ranks(
        1, TRAIN.format(prepare=IN_VALIDATION.format(kind="hang")),
        [*flags_of(tmp_path / "data", 30, 2), "--validation_epoch=1", "--loader_timeout=1"],
        tmp_path)
    assert codes == [2]
    assert "error: the data loader delivered no batch for 1 s (--loader_timeout)" in output
    assert "--resume=interrupt goes on from iteration 6" in output and "Traceback" not in output
    assert saved(tmp_path / "data") == ["yolact_shapes_1_6_interrupt.pth"]


def test_what_fails_in_a_validation_has_been_saved(tmp_path):
    write_dataset(str(tmp_path / "data"), seed=3, train=12, val=20)
    codes, (output,) = run_ranks(
        1, TRAIN.format(prepare=IN_VALIDATION.format(kind="raise")),
        [*flags_of(tmp_path / "data", 30), "--validation_epoch=1"], tmp_path)
    assert codes == [2] and "error: out of memory" in output and "Traceback" not in output
    assert saved(tmp_path / "data") == ["yolact_shapes_1_6_interrupt.pth"]


def test_a_signal_in_a_validation_ends_it(tmp_path):
    write_dataset(str(tmp_path / "data"), seed=3, train=12, val=200)
    program = TRAIN.format(prepare=IN_VALIDATION.format(kind="slow"))
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, *flags_of(tmp_path / "data", 30),
         "--validation_epoch=1"], cwd=str(tmp_path), env=clean_environ(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    while not (tmp_path / "reached").exists():
        assert process.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20  # the whole takes 50 naps
    assert process.returncode == 130
    assert b"The validation of iteration 6 was stopped" in out
    assert saved(tmp_path / "data") == ["yolact_shapes_1_6_interrupt.pth"]


def image_of_step(step, count):
    """Index of an image that rank 1 of 2 reads for a step of the first epoch, in batches of 2."""
    dataset = TrainDataset(range(count), {64: None}, seed=1, interval=1)
    loader = TrainLoader(dataset, 2, rank=1, world_size=2)
    return next(itertools.islice(loader.keys(), step, None))[0][1]


@pytest.mark.parametrize("split, step, end", [
    ("val2017", None, "1_12"), ("train2017", 2, "0_2"), ("train2017", 10, "0_10")])
def test_a_broken_image_on_one_of_two_ranks(tmp_path, split, step, end):
    """Both processes end and the main one, which has not found it, has saved.

    Up to ten steps in a row, which do not count, pass before the processes agree to stop.
    """
    count = 48
    write_dataset(str(tmp_path / "data"), seed=3, train=count, val=4)
    data = tmp_path / "data"
    name = break_image(data, split, 3 if step is None else image_of_step(step, count))
    codes, outputs = run_ranks(2, TRAIN.format(prepare=""), [*flags_of(data, 60), "--seed=1",
                               "--validation_epoch=1"], tmp_path)
    assert codes == ([2, 2] if step is None else [130, 2]), outputs
    assert any(name in output and "truncated" in output for output in outputs)
    assert "not finite" not in "".join(outputs)
    if step is not None:
        assert all("changed no parameter: a process of this run has no" in o for o in outputs)
    assert saved(data) == [f"yolact_shapes_{end}_interrupt.pth"]
