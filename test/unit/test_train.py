"""The training loop on the drawn shapes: it learns, it stops, it goes on exactly."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from data.coco import CocoDataset
from helpers import rounding
from layers.multibox_loss import MultiBoxLoss
from utils import checkpoint
from utils.device import has_autocast
from utils.engine import saving
from utils.engine.setup import plan_validation
from utils.errors import UserError
from utils.inference.evaluation import Evaluation

STEPS = 6


@pytest.fixture
def flags(shapes, tmp_path, request):
    return [f"--data={shapes}", "--config=yolact_shapes", "--max_size=96", "--batch_size=2",
            "--no_autoscale", "--num_workers=0", f"--max_iter={STEPS}",
            "--save_folder={}".format(tmp_path / "weights"), "--no_log", "--validation_epoch=-1",
            "--node_device={}".format(request.config.getoption("--device"))]


def weights_of(folder, iteration, suffix=""):
    name = f"yolact_shapes_{iteration // 6}_{iteration}{suffix}.pth"
    return torch.load(os.path.join(str(folder), "weights", name))


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def test_log_and_files(flags, tmp_path, capsys):
    assert train.main(flags + ["--save_interval=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("[")]
    pattern = (r"\[  [01]\] +\d+ \|\| B: [\d.]+ \| C: [\d.]+ \| M: [\d.]+ \| S: [\d.]+ \| "
               r"T: [\d.]+ \|\| ETA: \d+:\d\d:\d\d \|\| timer: [\d.]+ \|\| fps: [\d.]+ \|\| "
               r"avg_fps: [\d.]+ \|\| GPU: 0$")
    assert len(shown) == 2 and all(re.match(pattern, line) for line in shown)
    assert lines[-1] == "Final weights : {}".format(
        tmp_path / "weights" / "yolact_shapes_1_6.pth")
    others = " ".join(line for line in lines if not line.startswith("["))
    assert not re.search("box|mask|avg_fps| T: ", others)
    assert sorted(os.listdir(str(tmp_path / "weights"))) == [
        ".yolact_shapes.lock", ".yolact_shapes.training",
        "yolact_shapes_0_4.pth", "yolact_shapes_0_4.state",
        "yolact_shapes_1_6.pth", "yolact_shapes_1_6.state"]


@pytest.mark.skipif(not has_autocast(), reason="this PyTorch has no half precision on the CPU")
@pytest.mark.parametrize("level, computes", [("O0", True), ("O0", False), ("O1", True)])
def test_bfloat16_is_offered_where_the_processor_computes_it(flags, capsys, monkeypatch, device,
                                                             level, computes):
    monkeypatch.setattr("utils.engine.summary.cpu_computes_bfloat16", lambda: computes)
    more = ["--amp_dtype=bfloat16"] * (level == "O1" and device.type == "cpu")  # not of every card
    assert train.main(flags + ["--max_iter=1", f"--opt_level={level}", *more]) == 0
    offered = "Faster       : this processor computes bfloat16: --opt_level=O1" in (
        capsys.readouterr().out)
    assert offered == (computes and level == "O0" and device.type == "cpu")


def test_only_the_newest_file_stays_and_those_of_other_trainings(flags, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("yolact_shapes_433_2599.pth", "yolact_base_0_1.pth"):
        (folder / name).write_bytes(b"trained before")
    assert train.main(flags + ["--save_interval=2", "--keep_latest",
                               "--keep_latest_interval=4"]) == 0
    assert sorted(path.name for path in folder.glob("*.pth")) == [
        "yolact_base_0_1.pth", "yolact_shapes_433_2599.pth"]
    assert sorted(path.name for path in folder.glob("yolact_shapes-2/*.pth")) == [
        "yolact_shapes_0_4.pth", "yolact_shapes_1_6.pth"]


def names_in(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_a_checkpoint_stands_before_each_validation_and_makes_room_for_the_next(
        flags, tmp_path, monkeypatch):
    real, there = Evaluation.run, []

    def watch(self, *args, **kwargs):
        there.append(names_in(tmp_path / "weights"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Evaluation, "run", watch)
    assert train.main(flags + ["--validation_epoch=1", "--max_iter=20", "--save_interval=12"]) == 0
    assert there == [["yolact_shapes_1_6.pth"], ["yolact_shapes_2_12.pth"],
                     ["yolact_shapes_2_12.pth", "yolact_shapes_3_18.pth"]]
    assert names_in(tmp_path / "weights") == ["yolact_shapes_2_12.pth", "yolact_shapes_3_20.pth"]


def test_a_long_time_without_a_checkpoint_makes_one(flags, tmp_path, monkeypatch):
    saved, real = [], saving.Saver.save
    monkeypatch.setattr(saving, "LONGEST_UNSAVED", -1.0)
    monkeypatch.setattr(saving.Saver, "save", lambda self, done, *args, **kwargs: (
        saved.append(done), real(self, done, *args, **kwargs))[1])
    assert train.main(flags + ["--max_iter=25"]) == 0
    assert saved == [10, 20, 25]
    assert names_in(tmp_path / "weights") == ["yolact_shapes_4_25.pth"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_the_undisturbed_one(flags, tmp_path, workers):
    flags = flags + [f"--num_workers={workers}"]
    assert train.main(flags + ["--save_interval=4"]) == 0
    whole = weights_of(tmp_path, STEPS)
    os.unlink(str(tmp_path / "weights" / "yolact_shapes_1_6.pth"))
    torch.rand(7)  # whatever else the process did must not matter
    assert train.main(flags + ["--resume=latest"]) == 0
    assert same(weights_of(tmp_path, STEPS), whole)


def test_validation_during_training(flags, capsys):
    assert train.main(flags + ["--validation_epoch=1", "--validation_size=2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  mask |")]
    assert len(rows) == 1 and re.match(r"  mask \| +[\d.na/]+ \|", rows[0])


def default(flags):
    """Without the flag that the tests of other things turn validation off with."""
    return [flag for flag in flags if not flag.startswith("--validation_epoch")]


def test_a_run_validates_by_default_and_trains_the_same_weights(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    whole, generator = weights_of(tmp_path, STEPS), torch.get_rng_state()
    assert "Validation   : none (--validation_epoch=1 for every epoch)" in capsys.readouterr().out
    assert train.main(default(flags) + [f"--save_folder={tmp_path}/again/weights"]) == 0
    out = capsys.readouterr().out
    assert same(weights_of(tmp_path / "again", STEPS), whole)
    assert torch.equal(torch.get_rng_state(), generator)
    assert "Validation   : 4 images at the end\n" in out and out.count("\n  mask |") == 1
    assert "at iteration 6, " in out and "not known" not in out
    assert train.main(default(flags) + ["--max_iter=25"]) == 0
    out = capsys.readouterr().out
    assert ("Validation   : 4 images every 24 iterations (4.0 epochs) and at the end, at most "
            "about a tenth of the time\n") in out
    assert out.count("\n  mask |") == 2


def test_without_a_validation_set_there_is_none_and_the_summary_says_why(
        flags, shapes, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(
        f"train: {{images: {shapes}/train2017, annotations: {shapes}/annotations/"
        "instances_train2017.json}\n")
    of_files = [f"--train_images={shapes}/train2017",
                f"--train_info={shapes}/annotations/instances_train2017.json"]
    for given, reason in (
            ([f"--data={tmp_path}/own.yaml"], "no validation set: .*own.yaml: has no 'val'"),
            (of_files, "no validation set: --valid_images and --valid_info name one"),
            ([flags[0], "--train_performance"], "--train_performance measures speed alone")):
        assert train.main(given + default(flags[1:])) == 0
        out = capsys.readouterr().out
        assert re.search(rf"Validation   : none \({reason}", out) and "  mask |" not in out
    assert train.main([f"--data={tmp_path}/own.yaml", "--patience=3"] + default(flags[1:])) == 2
    assert "--early_stopping=3 counts validations, and there are none: no val" in (
        capsys.readouterr().err)


def test_a_validation_set_that_cannot_be_scored_is_refused_before_the_first_step(
        flags, shapes, tmp_path, capsys):
    (tmp_path / "val.json").write_text('{"images": [], "categories": [], "annotations": []}')
    wrong = [f"--valid_images={shapes}/val2017", f"--valid_info={tmp_path}/val.json"]
    assert train.main(default(flags) + wrong) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("; --validation_epoch=-1 trains without validation\n")
    assert "|| T:" not in captured.out
    assert train.main(flags + wrong) == 0


@pytest.mark.parametrize("images, epoch, batch, max_iter, interval", [
    (5000, 14658, 8, 800000, 14658),  # COCO: every epoch
    (80, 17, 8, 1000, 102),  # 140 images: every sixth epoch
    (300, 250, 8, 2600, 500), (2000, 10, 8, 20000, 2500), (1, 1, 1, 1, 10),
    (5000, 14658, 8, 624, None)])  # a validation is longer than the training
def test_the_interval_follows_from_the_numbers_of_images(images, epoch, batch, max_iter, interval):
    annotations = SimpleNamespace(image_sizes=np.zeros((0, 2), int), rows=None)
    empty = SimpleNamespace(image_ids=np.zeros(0, int), annotation_file="", annotations=annotations)
    evaluation = Evaluation(empty, [], range(images))
    plan, reason = plan_validation(argparse.Namespace(validation_epoch=None), evaluation, None,
                                   epoch, max_iter, batch)
    if interval is None:
        assert plan is None and "would take longer than this training" in reason
        return
    assert (plan.interval, plan.at_end, reason) == (interval, True, "")
    asked = argparse.Namespace(validation_epoch=3)
    plan, _ = plan_validation(asked, evaluation, None, epoch, max_iter, batch)
    assert (plan.interval, plan.at_end) == (3 * epoch, False)


def test_a_validation_set_with_fewer_classes(flags, shapes, tmp_path, capsys):
    """Refused before the first step; with --map_classes the shared ones are scored."""
    info = json.loads((shapes / "annotations" / "instances_val2017.json").read_text())
    absent = info["categories"].pop()
    info["annotations"] = [annotation for annotation in info["annotations"]
                           if annotation["category_id"] != absent["id"]]
    (tmp_path / "val.json").write_text(json.dumps(info))
    flags = flags + ["--validation_epoch=1", f"--valid_images={shapes / 'val2017'}",
                     f"--valid_info={tmp_path / 'val.json'}"]
    assert train.main(flags) == 2
    captured = capsys.readouterr()
    assert "the training data has 4 classes" in captured.err and "--map_classes" in captured.err
    assert "|| T:" not in captured.out
    assert train.main(flags + ["--map_classes"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {absent['name']}" in out and "  mask |" in out


def test_resume_with_other_flags_is_refused(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    assert train.main(flags + ["--resume=latest", "--batch_size=3"]) == 2
    assert "its global_batch is 2, this run's is 3" in capsys.readouterr().err
    assert train.main(flags + ["--resume=latest", "--decay=0.5"]) == 2
    assert "'decay': 0.5" in capsys.readouterr().err
    assert train.main(flags + ["--resume=latest", "--sync_bn"]) == 2
    assert "its sync_bn is False, this run's is True" in capsys.readouterr().err


def test_a_checkpoint_beyond_the_schedule_is_refused(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    before = weights_of(tmp_path, 6)
    assert train.main(flags + ["--resume=latest", "--max_iter=5"]) == 2
    assert "is at iteration 6, beyond the end of this training, 5; give a larger --max_iter" in (
        capsys.readouterr().err)
    assert train.main(flags + ["--resume=latest"]) == 0  # at its end: nothing is left to do
    assert same(before, weights_of(tmp_path, 6))


def test_annotations_that_changed_are_said(flags, shapes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(str(shapes), str(data))
    flags = [f"--data={data}" if flag.startswith("--data") else flag for flag in flags]
    assert train.main(flags) == 0
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for more in (["--max_iter=7"], ["--max_iter=8"]):
        capsys.readouterr()
        assert train.main(flags + ["--resume=latest"] + more) == 0
        said = "Changed : images or objects of the training data" in capsys.readouterr().out
        assert said == (more == ["--max_iter=8"])
        content["annotations"][0]["bbox"][2] *= 0.9
        file.write_text(json.dumps(content))


def test_quiet_leaves_out_the_log_lines_alone(flags, capsys):
    assert train.main(flags + ["--quiet"]) == 0
    out = capsys.readouterr().out
    assert "|| T:" not in out and "Iteration    :" in out and "Final weights : " in out


def test_a_length_in_epochs(flags, tmp_path, capsys):
    of_epochs = [flag for flag in flags if not flag.startswith("--max_iter")] + ["--epochs=1"]
    assert train.main(of_epochs) == 0
    assert "Schedule     : 6 iterations (1.0 epoch), 6 to an epoch, 1 image left" in (
        capsys.readouterr().out)
    assert weights_of(tmp_path, 6)
    assert train.main(of_epochs + ["--max_iter=5"]) == 2


def test_weights_alone_start_a_fresh_optimiser(flags, tmp_path, capsys):
    assert train.main(flags) == 0
    final = str(tmp_path / "weights" / "yolact_shapes_1_6.pth")
    os.unlink(checkpoint.state_path(final))
    assert train.main(flags + ["--resume=" + final, "--start_iter=4"]) == 0
    assert "weights only" in capsys.readouterr().out


def test_step_that_is_not_finite_changes_nothing(flags, tmp_path, capsys, monkeypatch):
    """Poison one step in the middle: it is named, and the run goes on without it."""
    bad = _poison_steps(monkeypatch, [2])
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "not finite" in line)
    seen = "loss (B: nan)" if rounding.in_order() else "gradient"  # by a register, not as NaN
    assert line.startswith(f"iteration 2: {seen} not finite")
    assert "\nSkipped      : 1 update of 6" in out
    assert all(str(image_id) in line for image_id in bad[2])
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path, STEPS).values())


def test_ten_bad_steps_in_a_row_end_the_training(flags, tmp_path, capsys, monkeypatch):
    _poison_steps(monkeypatch, range(3, 100))
    assert train.main(flags + ["--max_iter=40"]) == 1
    captured = capsys.readouterr()
    assert "steps in a row up to iteration 20" in captured.err
    assert "17 steps" in captured.err


def _poison_steps(monkeypatch, steps):
    """Make loss B NaN in these iterations; returns the image ids of each step seen so far."""
    real, seen, steps = MultiBoxLoss.forward, {}, set(steps)

    def forward(self, predictions, batch, *args, **kwargs):
        losses = real(self, predictions, batch, *args, **kwargs)
        step = len(seen)
        seen[step] = batch.image_ids.tolist()
        if step in steps:
            losses["B"] = losses["B"] * float("nan")
        return losses

    monkeypatch.setattr(MultiBoxLoss, "forward", forward)
    return seen


def test_an_unreadable_image_loses_no_work(flags, tmp_path, capfd, monkeypatch):
    assert train.main(flags) == 0
    whole = weights_of(tmp_path, STEPS)
    os.unlink(str(tmp_path / "weights" / "yolact_shapes_1_6.pth"))
    read, count = CocoDataset.__getitem__, []

    def fail_in_the_fourth_step(self, index):
        count.append(index)
        if len(count) == 8:
            raise UserError("image 7: truncated")
        return read(self, index)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(CocoDataset, "__getitem__", fail_in_the_fourth_step)
        assert train.main(flags) == 2
    found = re.match(r"error: image 7: truncated; then --resume=interrupt goes on from iteration "
                     r"([123])\n$", capfd.readouterr().err)
    assert found
    assert train.main(flags + ["--resume=interrupt"]) == 0
    assert f"at iteration {found.group(1)}" in capfd.readouterr().out
    assert same(weights_of(tmp_path, STEPS), whole)


@pytest.mark.launch
def test_interrupted_run_goes_on_exactly(flags, tmp_path):
    """A real process, a real Ctrl-C; the resumed run ends with the undisturbed run's weights."""
    flags = flags + ["--max_iter=30", "--num_workers=1"]
    assert train.main(flags) == 0
    whole = weights_of(tmp_path, 30)
    os.unlink(str(tmp_path / "weights" / "yolact_shapes_5_30.pth"))

    process = subprocess.Popen([sys.executable, "-u", "train.py"] + flags, cwd=str(ROOT),
                               stdout=subprocess.PIPE, universal_newlines=True)
    for line in process.stdout:
        if line.startswith("["):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130
    assert "Stopped by SIGINT" in rest
    assert train.main(flags + ["--resume=interrupt"]) == 0
    assert same(weights_of(tmp_path, 30), whole)


@pytest.mark.parametrize("extra, sentence", [
    (["--config=yolact_shape"], "did you mean 'yolact_shapes'"),
    (["--bach_size=2"], "did you mean --batch_size"),
    (["--batch_size=two"], "--batch_size is 'two', expected a whole number"),
    (["--batch_size=99"], "lower --batch_size to 13"),
    (["--batch_size=0"], "--batch_size is '0', expected a whole number from 1 to"),
    (["--max_iter=0"], "--max_iter is '0', expected a whole number above 0"),
    (["--data=/nowhere"], "/nowhere"),
    (["--backbone_weights=missing.pth"], "--backbone_weights none"),
    (["--node_device=gpu9"], "unknown device 'gpu9'"),
    (["--train_images=/tmp"], "--train_info"),
    (["--resume=latest"], "no latest checkpoint"),
    (["--dataset=coco2107"], "coco2017"),
    (["--batch_alloc=4,4"], "for each of 1 card"),
    (["--fps_start_iter=-1"], "--fps_start_iter is '-1'"),
    (["--save_folder=/dev/null/weights"], "cannot write '/dev/null/weights/"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(flags, tmp_path, capfd, extra, sentence):
    code = train.main(flags + extra)
    error = capfd.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not os.path.exists(str(tmp_path / "weights"))
