"""--device_graph in training and evaluation: torch_npu's own graphs, recorded and replayed by the
emulator.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

import eval as evaluation
import train
from data.shapes import write_dataset
from layers import deform_conv
from npu import counters
from npu.test_npu_training import RANKS, train_on_ranks, weights_in
from utils.device import saturates
from utils.engine.observer import Observer
from utils.inference.detector import Detector

STEPS = 8
WARM_UP = 3


@pytest.fixture(autouse=True)
def only_on_the_emulated_npu(device):
    if device.type != "npu" or not counters.available():
        pytest.skip("counts what the emulator launches; run with --device npu")
    if saturates(device):
        pytest.skip("this card records nothing")


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


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_all_that_changes_a_step_is_recorded_with_it(shapes, tmp_path, launches, level):
    """Two input sides, two batches a step, a moving average, half precision with an overflow."""
    flags = ["--config=yolact_shapes", "--max_iter=14", "--validation_epoch=-1", "--accumulate=2",
             f"--opt_level={level}", "--multi_scale=64,80", "--multi_scale_interval=1",
             "--ema=0.99"]
    eager = learn(shapes, tmp_path / "eager", *flags)
    launches.clear()
    assert same(eager, learn(shapes, tmp_path / "graph", *flags, "--device_graph"))
    assert [count for count, _ in launches].count(1) == 14 - 2 * WARM_UP
    # A log line that tells of overflows sends the device a tensor.
    assert {copies for count, copies in launches if count == 1} == {24, 25}


def test_the_mask_iou_network_and_deformable_convolution_are_recorded(shapes, tmp_path, launches,
                                                                      monkeypatch):
    """In plain PyTorch: the NPU's own operator for it is compiled, and cannot be recorded."""
    monkeypatch.setattr(deform_conv, "deform_conv_backend", lambda _: "plain")
    flags = ["--config=yolact_plus_resnet50", f"--max_iter={WARM_UP + 2}", "--validation_epoch=-1",
             "--backbone_weights=none", "--set", "masks_to_train=8", "--max_size=250",
             "--batch_size=1"]
    eager = learn(shapes, tmp_path / "eager", *flags)
    launches.clear()
    assert same(eager, learn(shapes, tmp_path / "graph", *flags, "--device_graph"))
    assert [count for count, _ in launches[WARM_UP:]] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("config, side", [
    ("yolact_resnet50", 138), ("yolact_base", 138), ("yolact_plus_resnet50", 250)])
def test_fifty_recorded_steps_are_those_of_single_launches(config, side, shapes, tmp_path, launches,
                                                           monkeypatch):
    """One launch each; the peak of memory in use is that of single launches, within a tenth."""
    monkeypatch.setattr(deform_conv, "deform_conv_backend", lambda _: "plain")
    flags = [f"--config={config}", "--max_iter=50", "--validation_epoch=-1", "--batch_size=1",
             "--backbone_weights=none", f"--max_size={side}", "--lr=1e-4"]
    weights, peaks = {}, {}
    for name, more in (("eager", []), ("graph", ["--device_graph"])):
        launches.clear()
        gc.collect()
        torch.npu.empty_cache()
        torch.npu.reset_peak_memory_stats()
        weights[name] = learn(shapes, tmp_path / name, *flags, *more)
        peaks[name] = torch.npu.max_memory_allocated(), torch.npu.max_memory_reserved()
        if name == "eager":
            print(f"{config}: {launches[-1][0]} launches and {launches[-1][1]} copies a step")
    assert same(weights["eager"], weights["graph"])
    assert [count for count, _ in launches[WARM_UP:]] == [1] * (50 - WARM_UP)
    print(f"{config}: bytes in use and reserved {peaks['eager']}, recorded {peaks['graph']}")
    assert peaks["graph"][0] < 1.1 * peaks["eager"][0]


@pytest.mark.launch
@pytest.mark.parametrize("steps", [14, pytest.param(50, marks=pytest.mark.slow)])
def test_two_cards_record_their_collectives(shapes, tmp_path, steps):
    """DistributedDataParallel's buckets and the sum of positives, over HCCL."""
    if torch.npu.device_count() < RANKS:
        pytest.skip("one card only")
    flags = [f"--max_iter={steps}", f"--save_interval={steps}", "--max_size=64"]
    train_on_ranks(tmp_path / "eager", shapes, "npu", *flags)
    outputs = train_on_ranks(tmp_path / "graph", shapes, "npu", *flags, "--device_graph")
    assert all(f"iteration {steps} equal over hccl" in output for output in outputs)
    assert same(*(weights_in(str(tmp_path / name)) for name in ("eager", "graph")))


@pytest.mark.parametrize("config, flags", [
    ("yolact_shapes", []), ("yolact_shapes", ["--precision=float16", "--cross_class_nms"]),
    ("yolact_plus_resnet50", [])])
def test_an_evaluation_replays_network_and_detection(config, flags, tmp_path, monkeypatch):
    """The objects are those of single launches, to the bit; the last batch is short."""
    monkeypatch.setattr(deform_conv, "deform_conv_backend", lambda _: "plain")
    data = tmp_path / "data"
    write_dataset(str(data), seed=3, train=2, val=11)
    side = ["--max_size=250", "--backbone_weights=none"] * (config == "yolact_plus_resnet50")
    learn(data, tmp_path, f"--config={config}", "--max_iter=1", "--validation_epoch=-1", *side)
    launches, launch = [], Detector.launch

    def counted(self, *given):
        counters.reset_traffic()
        found = launch(self, *given)
        traffic = counters.traffic()
        launches.append((traffic.launches, traffic.to_device.calls))
        return found

    monkeypatch.setattr(Detector, "launch", counted)
    written = {}
    for name, more in (("eager", []), ("graph", ["--device_graph"])):
        files = [tmp_path / f"{name}_{kind}.json" for kind in ("boxes", "masks")]
        assert score(data, tmp_path, "--output_coco_json", f"--bbox_det_file={files[0]}",
                     f"--mask_det_file={files[1]}", *flags, *more) == 0
        written[name] = [path.read_bytes() for path in files]
    assert written["eager"] == written["graph"] and len(written["eager"][1]) > 1000
    eager, graph = launches[:6], launches[6:]
    assert eager[-1][0] > 150 and graph[:WARM_UP] == eager[:WARM_UP]
    # A replay, and copies of the seven tensors that the next one overwrites.
    assert graph[WARM_UP + 1:] == [(1 + 7, 1)] * 2


@pytest.mark.parametrize("flags, sentence", [
    (["--fast_nms=False"], "--fast_nms=False suppresses on the host"),
    (["--image=x.png"], "leave it out with --image")])
def test_an_evaluation_that_works_on_the_host_is_refused(flags, sentence, shapes, tmp_path, capsys):
    learn(shapes, tmp_path, "--config=yolact_shapes", "--max_iter=1", "--validation_epoch=-1")
    assert score(shapes, tmp_path, "--device_graph", *flags) == 2
    assert sentence in capsys.readouterr().err


def score(data, folder, *flags):
    """Exit code of an evaluation of the newest weights, two images at a time."""
    return evaluation.main([
        "--trained_model=latest", f"--save_folder={folder}", f"--val_data={data}", "--batch_size=2",
        "--num_workers=0", "--no_bar", "--eval_device=npu", "--per_class_file=", *flags])
