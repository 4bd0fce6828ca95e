"""Training options in whole runs on drawn shapes: resumed runs, what is saved and frozen."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch

import train
from data import config_file
from data.config import get_config
from data.shapes import write_dataset
from utils.checkpoint import load_state
from utils.engine import learner
from utils.inference.detector import load_model
from utils.inference.evaluation import Evaluation
from yolact import build_yolact

STEPS = 12


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=8, val=2)
    return folder


@pytest.fixture
def flags(shapes, tmp_path, request, monkeypatch):
    monkeypatch.setattr(config_file, "get_config", lambda name: get_config(name).replace(
        max_size=64, pred_scales=((8, 12), (17, 24), (34, 44)), masks_to_train=10))
    # Else averages of so few steps forget where they began.
    monkeypatch.setattr(learner, "AVERAGE_RAMP", 2)
    return [f"--data={shapes}", "--config=yolact_shapes", "--batch_size=2",
            "--no_autoscale", "--num_workers=0", f"--max_iter={STEPS}", "--no_log",
            "--no_run_folder", "--save_folder={}".format(tmp_path / "weights"),
            "--validation_epoch=-1",
            "--node_device={}".format(request.config.getoption("--device"))]


def file_of(folder, iteration, kind="pth"):
    return str(folder / "weights" / f"yolact_shapes_{iteration // 4}_{iteration}.{kind}")


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def scores(monkeypatch, values):
    """Let validations score these, one after the other; nothing is detected for them."""
    given, seen = iter(values), []

    def validate(training, done, record, stop):
        seen.append(done)
        value = next(given)
        training.best.update(done, value, value)

    monkeypatch.setattr(train, "validate", validate)
    return seen


def test_a_resumed_run_with_averages_equals_the_undisturbed_one(flags, tmp_path):
    flags = flags + ["--ema=0.9", "--clip_grad_norm=1", "--class_weights=circle=2,star=0.5",
                     "--schedule=step", "--save_interval=4"]
    assert train.main(flags) == 0
    whole = torch.load(file_of(tmp_path, STEPS))
    whole_raw = load_state(file_of(tmp_path, STEPS))["raw_weights"]
    assert not same(whole, whole_raw)
    for iteration in (8, STEPS):
        os.unlink(file_of(tmp_path, iteration))
    assert train.main(flags + ["--resume=latest"]) == 0
    assert same(torch.load(file_of(tmp_path, STEPS)), whole)
    assert same(load_state(file_of(tmp_path, STEPS))["raw_weights"], whole_raw)


def test_the_weights_file_has_the_averages_and_evaluation_reads_them(flags, tmp_path, monkeypatch):
    seen = []

    def run(self, detector, evaluator, stopped):
        seen.append({name: value.cpu().clone()
                     for name, value in detector.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "run", run)
    assert train.main(flags + ["--ema=0.9", "--save_interval=4"]) == 0
    assert train.main(flags + ["--ema=0.9", "--validation_epoch=1", "--resume=" + file_of(
        tmp_path, 4)]) == 130
    saved = torch.load(file_of(tmp_path, 8))
    assert same(seen[0], saved)  # what is scored after 8 steps is what was saved after 8 steps
    assert same(dict(load_model(file_of(tmp_path, 8)).model.state_dict()), saved)
    assert not same(load_state(file_of(tmp_path, 8))["raw_weights"], saved)


def test_the_raw_training_does_not_notice_the_averages(flags, tmp_path):
    assert train.main(flags) == 0
    plain = torch.load(file_of(tmp_path, STEPS))
    assert train.main(flags + ["--ema", f"--save_folder={tmp_path}/ema/weights"]) == 0
    assert same(load_state(file_of(tmp_path / "ema", STEPS))["raw_weights"], plain)


def test_averages_are_part_of_what_a_run_is(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    assert train.main(flags + ["--ema=0.9", "--resume=latest"]) == 2
    assert "'ema_decay': 0.0" in capsys.readouterr().err


def test_weights_alone_restart_the_averages(flags, tmp_path):
    assert train.main(flags) == 0
    os.unlink(file_of(tmp_path, STEPS, "state"))
    saved = torch.load(file_of(tmp_path, STEPS))
    assert train.main(flags + ["--ema=0.9", "--resume=latest"]) == 0  # nothing left to do
    assert same(torch.load(file_of(tmp_path, STEPS)), saved)


def test_a_state_of_an_earlier_version_goes_on(flags, tmp_path):
    assert train.main(flags + ["--save_interval=4"]) == 0
    whole = torch.load(file_of(tmp_path, STEPS))
    os.unlink(file_of(tmp_path, STEPS))
    path = file_of(tmp_path, 8, "state")
    state = torch.load(path)
    for key in ("ema_decay", "early_stopping", "freeze", "class_weights", "multi_scale",
                "multi_scale_interval"):
        del state["config"][key]
    for key in ("best", "precision", "sync_bn"):
        del state[key]
    torch.save(state, path)
    assert train.main(flags + ["--resume=latest"]) == 0
    assert same(torch.load(file_of(tmp_path, STEPS)), whole)


def test_early_stopping_ends_the_run_with_success(flags, tmp_path, capsys, monkeypatch):
    seen = scores(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9])
    more = ["--validation_epoch=1", "--early_stopping=2", "--max_iter=40"]
    assert train.main(flags + more) == 0
    assert seen == [4, 8, 12, 16]
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("Final weights : " + file_of(tmp_path, 16))
    assert "2 validations" in printed
    # The same command again has nothing to do; more patience goes on.
    assert train.main(flags + more + ["--resume=latest"]) == 0
    assert seen == [4, 8, 12, 16]
    seen = scores(monkeypatch, [0.4] + 5 * [0.1])
    assert train.main(flags + more + ["--resume=latest", "--early_stopping=3"]) == 0
    assert seen == [20, 24, 28, 32]


def test_early_stopping_counts_on_after_a_resume(flags, tmp_path, monkeypatch):
    more = ["--validation_epoch=1", "--early_stopping=3", "--save_interval=4", "--max_iter=40"]
    values = [0.5, 0.4, 0.3, 0.2, 0.1]
    seen = scores(monkeypatch, values)
    assert train.main(flags + more) == 0
    assert seen == [4, 8, 12, 16]
    whole = torch.load(file_of(tmp_path, 16))
    for iteration in (12, 16):
        os.unlink(file_of(tmp_path, iteration))
    seen = scores(monkeypatch, values[2:])
    assert train.main(flags + more + ["--resume=latest"]) == 0
    assert seen == [12, 16]
    assert same(torch.load(file_of(tmp_path, 16)), whole)


def test_a_stopped_run_that_saves_nothing_names_no_way_to_go_on(flags, capsys, monkeypatch):
    def validate(training, done, record, stop):
        training.best.update(done, 0.5, 0.5)
        if done == 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "validate", validate)
    more = ["--validation_epoch=1", "--save_interval=4", "--no_interrupt"]
    assert train.main(flags + more) == 130
    printed = capsys.readouterr().out
    assert re.search(r"^Next +: score, draw an image\n  .* eval\.py .*\n  .* eval\.py .*\n(?!  )",
                     printed, re.M), printed
    assert printed.rstrip().endswith("Stopped by SIGINT at iteration 8")


@pytest.mark.parametrize("freeze, prefixes", [
    ("backbone", ["backbone."]), ("1", ["backbone.conv1", "backbone.bn1", "backbone.layers.0."])])
def test_what_is_frozen_does_not_change(flags, tmp_path, freeze, prefixes):
    assert train.main(flags + ["--max_iter=4"]) == 0
    start = file_of(tmp_path, 4)
    before = torch.load(start)
    assert train.main(flags + ["--weights=" + start, "--freeze=" + freeze,
                               f"--save_folder={tmp_path}/frozen/weights"]) == 0
    after = torch.load(file_of(tmp_path / "frozen", STEPS))
    for name, value in before.items():
        frozen = name.startswith(tuple(prefixes))
        if frozen:
            assert torch.equal(value, after[name]), name
    learned = [name for name in before if not torch.equal(before[name], after[name])]
    assert learned and not any(name.startswith(tuple(prefixes)) for name in learned)
    assert any(name.startswith("fpn") for name in learned)
    if freeze == "1":
        assert any(name.startswith("backbone.layers.3") for name in learned)
    state = load_state(file_of(tmp_path / "frozen", STEPS))
    tensors = state["optimizer"]["buffers"]["mean"]
    assert len(tensors) < len([name for name in before if "running" not in name])


def test_frozen_batch_norm_stays_frozen_across_modes():
    network = build_yolact(get_config("yolact_shapes", max_size=64))
    network.freeze_backbone(2)
    network.train().eval()
    network.train()
    trained = {name.split(".")[1] + "." + name.split(".")[2] for name, module
               in network.backbone.named_modules() if module.training and name.count(".") > 1
               for name in ["backbone." + name]}
    assert trained and all(name.startswith(("layers.2", "layers.3")) for name in trained)
    assert not network.backbone.bn1.training and network.fpn.training


@pytest.mark.parametrize("more, sentence", [
    (["--freeze=backbone"], "it starts at random"),
    (["--freeze=7"], "1 to 4, the number of stages"),
    (["--ema=1"], "a number below 1"),
    (["--ema=fast"], "--ema is 'fast', expected a finite number"),
    (["--lr=1e30"], "--lr is '1e30', expected a number above 0, below 1e30"),
    (["--max_iter=3000000000"],
     "--max_iter is '3000000000', expected a whole number above 0, at most 2147483647"),
    (["--early_stopping=3"], "give --validation_epoch=1"),
    (["--early_stopping=-1"], "--early_stopping is '-1'"),
    (["--schedule=cosin"], "did you mean 'cosine'"),
    (["--class_weights=circel=2"], "did you mean 'circle'"),
    (["--class_weights=balance"], "'balanced', or a factor"),
    (["--class_weights=circle=much"], "cat=2,dog=0.5"),
    (["--class_weights=circle=0"], "factors above 0"),
    (["--clip_grad_norm=-2"], "--clip_grad_norm is '-2'"),
])
def test_mistakes_are_one_sentence(flags, tmp_path, capfd, more, sentence):
    assert train.main(flags + more) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not os.path.exists(str(tmp_path / "weights"))
