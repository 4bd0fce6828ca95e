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
from data.coco import CocoDataset
from data.config import get_config
from data.loader import TrainDataset
from data.shapes import write_dataset
from layers.anchors import make_priors
from utils.amp import build_precision
from utils.distributed.processes import Processes
from utils.engine import batch_size as memory_of_steps
from utils.engine.batch_size import (
    MemoryNeed,
    available_bytes,
    choose_batch_size,
    measure,
    resumed_batch_size,
)
from utils.engine.learner import assemble_learner
from utils.errors import UserError
from utils.memory import peak_memory, reset_peak_memory
from utils.weights_folder import find_checkpoint
from yolact import build_yolact

MIB, GIB = 1 << 20, 1 << 30
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not peak_memory(CPU), reason="no /proc: nothing can be measured")


def test_the_line_through_two_steps():
    need = MemoryNeed.from_peaks({1: 550, 2: 500, 4: 900})
    assert need == MemoryNeed(fixed=100, per_image=200)
    assert [need.largest_batch(n) for n in (50, 299, 300, 699, 700, 1700)] == [0, 0, 1, 2, 3, 8]


def test_a_single_step_that_fits_gives_a_careful_line():
    assert MemoryNeed.from_peaks({1: 300}) == MemoryNeed(0, 300)


def test_a_batch_of_any_size_fits_where_images_take_nothing():
    assert MemoryNeed.from_peaks({2: 300, 4: 290}).largest_batch(10 ** 6) > 10 ** 5


def test_need_in_words():
    assert MemoryNeed(GIB // 2, GIB).sentence(2) == (
        "2.5 GiB for 2 images (512 MiB + 1.0 GiB per image)")
    assert MemoryNeed(0, GIB).sentence(1).startswith("1.0 GiB for 1 image (")


@pytest.fixture
def tried(tmp_path):
    """Measure with a step on a device; returns a function of both."""
    write_dataset(str(tmp_path / "data"), seed=3, train=2, val=1)
    config = get_config("yolact_shapes")
    dataset = CocoDataset(str(tmp_path / "data" / "train2017"),
                          str(tmp_path / "data" / "annotations" / "instances_train2017.json"))
    row = TrainDataset.from_config(dataset, config, lambda recipe: make_priors(recipe).numpy())[
        0, 0, config.max_size]

    def build(device):
        return assemble_learner(config, build_yolact(config),
                                build_precision("O0", None, "auto", device), Processes(), device)

    def try_it(step, device=CPU, processes=Processes()):  # noqa: B008
        return measure(lambda: build(device), row, step, device, processes)

    return try_it


def test_a_card_on_which_not_even_one_image_fits(tried):
    def step(*arguments):
        raise RuntimeError("NPU out of memory")

    with pytest.raises(UserError, match="not even a step of one image fits .NPU out of memory"):
        tried(step)


def test_the_steps_that_fit_are_enough(tried):
    """Where four images are too many, the line goes through one and two."""
    sizes = []

    def step(network, criterion, optimizer, batches, *arguments):
        sizes.append(len(batches[0]))
        if sizes[-1] == 4:
            raise RuntimeError("NPU out of memory")

    tried(step)
    assert sizes == [1, 2, 4]


def test_other_failures_of_a_trial_step_are_not_hidden(tried):
    with pytest.raises(ZeroDivisionError):
        tried(lambda *arguments: 1 / 0)


@pytest.mark.allocator
def test_trial_steps_see_what_images_take(tried, device):
    state = torch.get_rng_state()
    reset_peak_memory(device)
    before = peak_memory(device)
    need = tried(train.train_step, device)
    assert torch.equal(torch.get_rng_state(), state)
    # The layers put out 6.8 MiB. On the CPU what is freed stays with the process for a while, and
    # the process itself, with all that earlier tests left in it, is a part of what is fixed.
    assert 6 * MIB < need.per_image < (64 if device.type == "cpu" else 12) * MIB
    assert 20 * MIB < need.fixed < before + 800 * MIB


@pytest.mark.allocator
def test_several_cards_hold_the_gradients_once_more(tried, device):
    def step(*arguments):
        pass

    more = tried(step, device, Processes(0, 2)).fixed - tried(step, device).fixed
    assert more == pytest.approx(12 * MIB, abs=(12 if device.type == "cpu" else 1) * MIB)


def choose(free, **limits):
    """Choose with a need of 100 + 10 per image of what is free."""
    return choose_batch_size(MemoryNeed(100, 10), (free, "free memory"), Processes(), CPU, limits)


def test_a_tenth_stays_free_and_the_number_is_even():
    assert choose(10 * 200)[0] == 170
    assert choose(400)[0] == 26
    assert choose(410)[0] == 26  # 369 - 100 would be 26
    assert choose(420)[0] == 26  # 27, made even
    assert choose(125)[0] == 1
    with pytest.raises(UserError, match="not one image fits, it takes .* for 1 image"):
        choose(120)


def test_the_reason_is_named():
    assert choose(400)[1].startswith("26 per card, by what fits: ")
    found, sentence = choose(4000, **{"the rows of a kernel": 7, "the images": 9})
    assert found == 6 and "6 per card, by the rows of a kernel" in sentence


def test_several_processes_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory_of_steps, "memory_info", lambda device: (4 * 10 ** 9, 0))
    alone = available_bytes(CPU, 0, {})[0]
    assert available_bytes(CPU, 0, {"LOCAL_WORLD_SIZE": "4"})[0] == alone // 4
    assert available_bytes(CPU, 1, {"NPROC": "2"})[0] == alone // 2 - 256 * MIB


def test_a_system_that_does_not_tell_is_an_error(monkeypatch):
    monkeypatch.setattr(memory_of_steps, "memory_info", lambda device: (0, 0))
    with pytest.raises(UserError, match="does not tell how much memory cpu has; give a number"):
        available_bytes(CPU, 0, {})


AGREE = """
import sys
import torch
from utils.engine.batch_size import MemoryNeed, choose_batch_size
from utils.distributed.processes import Processes
processes = Processes.from_env()
processes.init(torch.device("cpu"))
free = 200 - 20 * processes.rank  # a tenth stays free: 18, 16 and 14 images of 10 fit
print(choose_batch_size(MemoryNeed(0, 10), (free, ""), processes, torch.device("cpu"), {})[0])
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
    assert [worker.communicate(timeout=120)[0].split() for worker in workers] == [["14"]] * 3


@pytest.fixture
def flags(tmp_path, request, monkeypatch):
    monkeypatch.setattr(memory_of_steps, "LARGEST_STEP", 4)
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
        newest = find_checkpoint("latest", folder)
        weights[batch_size] = torch.load(newest, map_location="cpu")
    assert all(torch.equal(value, weights["4"][name]) for name, value in weights["auto"].items())

    memory_of_steps.LARGEST_STEP = 2  # what would be chosen now
    assert train.main(flags + ["--batch_size=auto", "--save_folder=" + folder,
                               "--resume=latest", "--seed=4"]) == 2
    assert train.main(flags + ["--batch_size=auto", "--save_folder=" + folder,
                               "--resume=latest"]) == 0
    assert "Batch size auto : 4 per card, as in " in capsys.readouterr().out
    with pytest.raises(UserError, match="4 images a step, which 3 cards x micro-batches cannot"):
        resumed_batch_size(newest, 3)
    assert resumed_batch_size(newest, 2) == 2


@pytest.mark.parametrize("text", ["0", "-2", "autp", "2.5", ""])
def test_other_values_are_a_mistake(flags, text, capsys):
    assert train.main(flags + ["--batch_size=" + text]) == 2
    assert "expected a whole number from 1 to 2147483647, or auto" in capsys.readouterr().err


def test_limits_beside_the_memory(flags, tmp_path, capsys):
    """Nine images on a card with four micro-batches are two at a time."""
    flags = flags + ["--batch_size=auto", "--save_folder={}".format(tmp_path), "--max_iter=1"]
    memory_of_steps.LARGEST_STEP = 64
    assert train.main(flags + ["--accumulate=4"]) == 0
    assert "2 per card, by the 9 images of the training set" in capsys.readouterr().out
    memory_of_steps.LARGEST_STEP = 8
    assert train.main(flags) == 0
    assert "8 per card, by 8 images a step, beyond which" in capsys.readouterr().out
