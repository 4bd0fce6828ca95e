"""Training with --device_graph: torch_npu's own graphs, recorded and replayed by the emulator."""

from __future__ import annotations

import os

import pytest
import torch

import train
from layers import deform_conv
from layers.deform_conv import Backend
from npu import counters
from npu.test_npu_training import RANKS, train_on_ranks, weights_in
from utils.engine.observer import Observer

STEPS = 8
WARM_UP = 3


@pytest.fixture(autouse=True)
def only_on_the_emulated_npu(device):
    if device.type != "npu" or not counters.available():
        pytest.skip("counts what the emulator launches; run with --device npu")


@pytest.fixture(autouse=True)
def own_stream(device):
    """A run with graphs takes another stream, and the tests that follow are not to have it."""
    before = torch.npu.current_stream()
    yield
    torch.npu.set_stream(before)


@pytest.fixture
def launches(monkeypatch):
    """Launches and copies to the device of each step of the runs, in order."""
    found = []
    step = Observer.step

    def counted(self, *args):
        traffic = counters.traffic()
        found.append((traffic.launches, traffic.to_device.calls))
        step(self, *args)
        counters.reset_traffic()

    monkeypatch.setattr(Observer, "step", counted)
    return found


def learn(shapes, folder, *flags):
    """Weights after a training of two images a step at 64 pixels, with a constant rate."""
    assert train.main([
        f"--data={shapes}", "--max_size=64", "--batch_size=2", "--no_autoscale",
        "--num_workers=0", f"--save_folder={folder}", "--no_log", "--no_run_folder",
        "--node_device=npu", "--set", "lr_warmup_until=0", "--set", "schedule=step", *flags]) == 0
    newest = max(folder.glob("*.pth"), key=os.path.getmtime)
    return torch.load(str(newest))


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_recorded_step_is_one_launch_and_the_same_step(shapes, tmp_path, launches, capsys):
    """With validations between, and resumed."""
    flags = ["--config=yolact_shapes", f"--max_iter={STEPS}", "--save_interval=6",
             "--validation_epoch=1"]
    eager = learn(shapes, tmp_path / "eager", *flags)
    usual = launches[-1][0]
    assert usual > 300
    launches.clear()
    recorded = learn(shapes, tmp_path / "graph", *flags, "--device_graph")
    assert "device graph (a step is one launch)" in capsys.readouterr().out
    assert same(eager, recorded)
    counts = [count for count, _ in launches]
    validation = counts.pop(6)  # counted with the step that follows it
    assert counts == [counts[0], usual, usual, 1, 1, 1, 1] and validation > 1
    assert {copies for count, copies in launches if count == 1} == {12}
    newest = max((tmp_path / "graph").glob("*.pth"), key=os.path.getmtime)
    os.unlink(newest)
    assert same(eager, learn(shapes, tmp_path / "graph", *flags, "--resume=latest"))


def test_all_that_changes_a_step_is_recorded_with_it(shapes, tmp_path, launches):
    """Two input sides, two batches a step, a moving average, half precision with an overflow."""
    flags = ["--config=yolact_shapes", "--max_iter=14", "--validation_epoch=-1", "--accumulate=2",
             "--opt_level=O1", "--multi_scale=64,80", "--multi_scale_interval=1", "--ema=0.99"]
    eager = learn(shapes, tmp_path / "eager", *flags)
    launches.clear()
    assert same(eager, learn(shapes, tmp_path / "graph", *flags, "--device_graph"))
    assert [count for count, _ in launches].count(1) == 14 - 2 * WARM_UP
    # A log line that tells of overflows sends the device a tensor.
    assert {copies for count, copies in launches if count == 1} == {24, 25}


def test_the_mask_iou_network_and_deformable_convolution_are_recorded(shapes, tmp_path, launches,
                                                                      monkeypatch):
    """In plain PyTorch: the NPU's own operator for it is compiled, and cannot be recorded."""
    monkeypatch.setattr(deform_conv, "deform_conv_backend", lambda _: Backend("plain", ""))
    flags = ["--config=yolact_plus_resnet50", f"--max_iter={WARM_UP + 2}", "--validation_epoch=-1",
             "--backbone_weights=none", "--set", "masks_to_train=8", "--max_size=250",
             "--batch_size=1"]
    eager = learn(shapes, tmp_path / "eager", *flags)
    launches.clear()
    assert same(eager, learn(shapes, tmp_path / "graph", *flags, "--device_graph"))
    assert [count for count, _ in launches[WARM_UP:]] == [1, 1]


@pytest.mark.launch
def test_two_cards_record_their_collectives(shapes, tmp_path):
    """DistributedDataParallel's buckets and the sum of positives, over HCCL."""
    if torch.npu.device_count() < RANKS:
        pytest.skip("one card only")
    flags = ["--max_iter=14", "--save_interval=14", "--max_size=64"]
    train_on_ranks(tmp_path / "eager", shapes, "npu", *flags)
    outputs = train_on_ranks(tmp_path / "graph", shapes, "npu", *flags, "--device_graph")
    assert all("iteration 14 equal over hccl" in output for output in outputs)
    assert same(*(weights_in(str(tmp_path / name)) for name in ("eager", "graph")))
