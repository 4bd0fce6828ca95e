"""Trainings and evaluations with their run folder, on the drawn shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train
from utils import checkpoint
from utils.engine.record import RunRecord
from utils.engine.saving import BestScore
from utils.inference.evaluation_record import ScoredEvaluation
from utils.run_folder import CONFIG, RunFolder, open_run_folder
from utils.weights_folder import find_checkpoint

HAS_PAGE = importlib.util.find_spec("jinja2") is not None
STEPS = 12


@pytest.fixture
def flags(shapes, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLACT_RUNS", "runs")
    return [f"--data={shapes}", "--config=yolact_shapes", "--batch_size=2",
            "--no_autoscale", "--num_workers=0", f"--max_iter={STEPS}",
            "--no_log", "--validation_epoch=-1",
            "--node_device={}".format(request.config.getoption("--device"))]


def evaluate(shapes, request, *flags):
    return evaluation.main([f"--val_data={shapes}", "--num_workers=0", "--no_bar",
                            "--per_class_file=", "--eval_device={}".format(
                                request.config.getoption("--device"))] + list(flags))


def stored_in(path):
    return RunFolder(path, "").read(CONFIG)


def rows_of(name="yolact_shapes", table="results.csv"):
    folder = RunFolder(os.path.join("runs", name), "")
    return folder.results() if table == "results.csv" else folder.training()


def steps_of(name="yolact_shapes", table="results.csv"):
    return [int(row["iteration"]) for row in rows_of(name, table)]


def without_time(rows):
    return [{key: value for key, value in row.items() if key not in ("time", "images_per_second")}
            for row in rows]


def test_a_training_leaves_everything(flags, shapes, request, capsys):
    assert train.main(flags + ["--validation_epoch=1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "Run folder : runs/yolact_shapes" in out
    assert ("Report : runs/yolact_shapes/report.html" in out) == HAS_PAGE
    assert any("pip install jinja2" in line for line in out) != HAS_PAGE
    found = {os.path.relpath(os.path.join(folder, name), "runs/yolact_shapes")
             for folder, _, names in os.walk("runs/yolact_shapes") for name in names}
    for name in ("config.yaml", "environment.json", "results.csv", "log.jsonl",
                 "weights/best.pth", "weights/best.state", "weights/last.pth",
                 "weights/last.state", "evaluation/evaluation.json", "evaluation/per_class.csv",
                 "evaluation/confusion_matrix.csv"):
        assert name in found
    assert sum(name.startswith("evaluation/pictures/") for name in found) == 4
    assert not [name for name in found if ".tmp" in name or ".new" in name]

    rows = rows_of()
    assert [row["iteration"] for row in rows] == [6, 12]
    for row in rows:
        assert row["images_scored"] == 4 and None not in (row["mask_mAP"], row["box_AP75"])
        assert row["loss_total"] > 0 and row["lr"] > 0
    assert steps_of(table="log.jsonl") == [1, 10, 12]
    stored = stored_in("runs/yolact_shapes")
    assert (stored["config"], stored["program"]) == ("yolact_shapes", "train.py")
    assert stored["set"] == {"max_iter": STEPS} and stored["flags"]["validation_epoch"] == 1
    assert stored["run"]["max_iter"] == STEPS and stored["data"]["val"]["images"] == 4
    with open("runs/yolact_shapes/environment.json") as stream:
        (session,) = json.load(stream)["sessions"]
    assert session["seed"] == 0 and session["packages"]["torch"] == torch.__version__
    assert "--validation_epoch=1" in session["command"]
    last = find_checkpoint("latest", "weights")
    assert os.path.samefile(last, "runs/yolact_shapes/weights/last.pth")
    assert evaluate(shapes, request, "--trained_model=runs/yolact_shapes/weights/best.pth") == 0


def test_best_weights_are_those_of_the_best_row(flags, monkeypatch):
    """The first validation is made the best one: its weights stay, later ones do not replace it."""
    real, seen = RunRecord.add_validation, []

    def watch(self, evaluation, is_best):
        seen.append(is_best)
        return real(self, evaluation, is_best)

    def first_is_best(self, iteration, mask_ap, box_ap):
        return update(self, iteration, 1.0 / iteration, box_ap)

    update = BestScore.update
    monkeypatch.setattr(RunRecord, "add_validation", watch)
    monkeypatch.setattr(BestScore, "update", first_is_best)
    assert train.main(flags + ["--validation_epoch=1", "--save_interval=6"]) == 0
    assert seen == [True, False]
    best = torch.load("runs/yolact_shapes/weights/best.pth")
    saved = torch.load("weights/yolact_shapes_1_6.pth")
    assert all(torch.equal(best[key], saved[key]) for key in saved)
    state = checkpoint.load_state("runs/yolact_shapes/weights/best.pth")
    assert state["iteration"] == 6 and state["best"]["since"] == 0
    assert checkpoint.load_state("weights/yolact_shapes_2_12.pth")["best"]["since"] == 1
    with open("runs/yolact_shapes/evaluation/evaluation.json") as stream:
        assert json.load(stream)["iteration"] == 6


def test_a_resumed_run_goes_on_in_its_folder_as_if_nothing_had_been(flags):
    flags = flags + ["--validation_epoch=1"]
    assert train.main(flags + ["--save_interval=8"]) == 0
    whole = without_time(rows_of())
    best = checkpoint.load_state("weights/yolact_shapes_2_12.pth")["best"]
    folder = open_run_folder("runs/yolact_shapes")
    folder.add_record("epoch", iteration=11, epoch=1)  # after the checkpoint: not made again
    with open(folder.file("log.jsonl"), "a") as stream:
        stream.write('{"type": "train", "iteration": 11}\n{"type": "tra')
    assert train.main(flags + ["--resume=weights/yolact_shapes_1_8.pth"]) == 0
    assert os.listdir("runs") == ["yolact_shapes"]
    again = without_time(rows_of())
    assert [row["iteration"] for row in again] == [6, 12]
    assert again == whole
    assert checkpoint.load_state("weights/yolact_shapes_2_12.pth")["best"] == best
    assert steps_of(table="log.jsonl") == [1, 9, 10, 12]
    with open("runs/yolact_shapes/environment.json") as stream:
        assert [session["start_iteration"] for session in json.load(stream)["sessions"]] == [0, 8]


@pytest.mark.launch
def test_killed_and_resumed(flags):
    """SIGKILL, whenever it comes: tables stay readable, and no row is there twice."""
    flags = flags + ["--validation_epoch=1", "--max_iter=36", "--save_interval=6"]
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "train.py")] + flags,
                               stdout=subprocess.PIPE, universal_newlines=True)
    for line in process.stdout:
        if line.startswith("Saved weights") and "_12." in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert steps_of()[:2] == [6, 12]
    assert train.main(flags + ["--resume=latest"]) == 0
    assert steps_of() == [6, 12, 18, 24, 30, 36]
    steps = steps_of(table="log.jsonl")
    assert steps == sorted(set(steps)) and steps[-1] == 36
    assert os.listdir("runs") == ["yolact_shapes"]


def test_the_last_weights_are_the_newest_on_the_way_too(flags, monkeypatch, capsys):
    """Whatever ends a training without a last save, its run folder has what there is."""
    real, steps = train.train_step, []

    def step(*arguments, **more):
        steps.append(None)
        if len(steps) == 8:
            raise ZeroDivisionError
        return real(*arguments, **more)

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(ZeroDivisionError):
        train.main(flags + ["--validation_epoch=1"])
    assert train.main(["--resume=runs/yolact_shapes", "--max_iter=7"]) == 0
    assert "Resumed : runs/yolact_shapes/weights/last.pth at iteration 6" in capsys.readouterr().out


def test_names(flags):
    for _ in range(2):
        assert train.main(flags + ["--max_iter=1", "--project=a/b", "--name=mine"]) == 0
    assert sorted(os.listdir("a/b")) == ["mine", "mine-2"]
    assert not os.path.exists("runs")


@pytest.mark.parametrize("flag", ["--no_run_folder", "--train_performance"])
def test_none_where_none_is_wanted(flags, flag, capsys):
    assert train.main(flags + ["--max_iter=1", flag]) == 0
    assert not os.path.exists("runs")
    assert "Run folder" not in capsys.readouterr().out


@pytest.mark.parametrize("extra, sentence", [
    (["--name=a/b"], "--name is 'a/b', expected the name of a folder"),
    (["--project={}".format(os.path.join(str(ROOT), "README.md"))], "which is a file"),
    (["--rerun=nowhere"], "'nowhere' is no run folder of train.py"),
])
def test_mistakes(flags, capsys, extra, sentence):
    assert train.main(flags + extra) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error


@pytest.mark.parametrize("flag", ["--log_folder", "--tensorboard"])
def test_a_place_that_cannot_be_written_leaves_no_folder(flags, capsys, flag):
    open("file", "w").close()
    assert train.main(flags + [f"{flag}=file", "--no_log=False"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot write to 'file'" in error and flag in error
    assert not os.path.exists("runs")


def test_a_tracker_that_is_not_installed_leaves_no_folder(flags, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert train.main(flags + ["--track=mlflow", "--no_log=False"]) == 2
    assert "--track=mlflow needs the package mlflow" in capsys.readouterr().err
    assert not os.path.exists("runs")


def test_the_same_run_again_from_its_folder(flags):
    """All flags and the configuration come from the folder; what is given beside them wins."""
    assert train.main(flags + ["--lr=0.0005", "--seed=3", "--name=first",
                               "--save_folder=one"]) == 0
    assert train.main(["--rerun=runs/first", "--save_folder=two"]) == 0
    assert sorted(os.listdir("runs")) == ["first", "first-2"]
    one, two = (torch.load(f"{name}/yolact_shapes_2_12.pth") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = stored_in("runs/first"), stored_in("runs/first-2")
    assert first["set"] == second["set"] and first["set"]["lr"] == 0.0005
    assert train.main(["--rerun=runs/first/config.yaml", "--seed=4", "--max_iter=2",
                       "--name=other"]) == 0
    other = stored_in("runs/other")
    assert other["flags"]["seed"] == 4 and other["set"]["lr"] == 0.0005


LAST = "--trained_model=runs/yolact_shapes/weights/last.pth"
AUTO, NAMED = "--run_folder=auto", "--run_folder=runs/yolact_shapes"


def recorded():
    return open_run_folder("runs/yolact_shapes").read("evaluation/evaluation.json")


def test_evaluation_fills_the_folder_of_a_run_that_did_not_validate(flags, shapes, request,
                                                                    capsys):
    assert train.main(flags) == 0
    best = "runs/yolact_shapes/weights/best.pth"
    assert not os.path.exists(best)
    assert not any("mask_mAP" in row for row in rows_of())
    capsys.readouterr()
    assert evaluate(shapes, request, "--trained_model=weights/yolact_shapes_2_12.pth", AUTO) == 0
    out = capsys.readouterr().out
    assert (out.splitlines()[-1] == "Report : runs/yolact_shapes/report.html") == HAS_PAGE
    assert ["mask_mAP" in row for row in rows_of()] == [False, True]
    assert os.path.samefile(best, "weights/yolact_shapes_2_12.pth")
    assert recorded()["images"] == 4 and recorded()["settings"] == {}
    assert stored_in("runs/yolact_shapes")["data"]["val"]["images"] == 4


def test_a_smaller_evaluation_does_not_replace_a_larger_one_in_silence(
        flags, shapes, request, capsys, tmp_path, monkeypatch):
    """Also where the annotation file is another path of the same file."""
    assert train.main(flags) == 0
    assert evaluate(shapes, request, LAST, AUTO) == 0
    (tmp_path / "elsewhere").symlink_to(shapes)
    again = [str(tmp_path / "elsewhere"), request, LAST, "--max_images=2"]
    capsys.readouterr()
    assert evaluate(*again, AUTO) == 0
    assert "keeps its evaluation of 4 images" in capsys.readouterr().out
    assert recorded()["images"] == 4
    assert evaluate(*again, NAMED) == 0
    assert "this replaces the evaluation of 4 images" in capsys.readouterr().out
    assert recorded()["images"] == 2


@pytest.mark.parametrize("odd", ["--score_threshold=0.9", "--fast_nms=False", "--no_crop",
                                 "--cross_class_nms", "--max_num_detections=1", "--max_images=2",
                                 "--map_classes"])
def test_an_odd_evaluation_pins_no_scores(flags, shapes, request, odd):
    """Only what a validation would find fills a row of results.csv and makes weights the best."""
    assert train.main(flags + ["--max_iter=2"]) == 0
    for choice in (AUTO, NAMED):
        assert evaluate(shapes, request, LAST, odd, choice) == 0
    assert not any("mask_mAP" in row for row in rows_of())
    assert not os.path.exists("runs/yolact_shapes/weights/best.pth")
    assert evaluate(shapes, request, LAST, AUTO) == 0
    assert "mask_mAP" in rows_of()[-1] and os.path.exists("runs/yolact_shapes/weights/best.pth")
    assert evaluate(shapes, request, LAST, odd, AUTO) == 0
    assert (recorded()["images"], recorded()["settings"]) == (4, {})


def test_best_weights_stay_when_the_training_goes_on_after_eval(flags, shapes, request, capsys,
                                                                monkeypatch):
    """eval.py scores an iteration that the training did not: no worse one replaces its weights."""
    assert train.main(flags + ["--save_interval=3"]) == 0
    real = ScoredEvaluation.__new__

    def shining(cls, evaluator, results, *more):
        results.mask.statistics["AP"] = 0.9
        return real(cls, evaluator, results, *more)

    with monkeypatch.context() as patched:
        patched.setattr(ScoredEvaluation, "__new__", shining)
        assert evaluate(shapes, request, "--trained_model=weights/yolact_shapes_0_3.pth", AUTO) == 0
    best = "runs/yolact_shapes/weights/best.pth"
    assert checkpoint.load_state(best)["iteration"] == 3
    capsys.readouterr()
    assert train.main(flags + ["--resume=weights/yolact_shapes_1_6.pth",
                               "--validation_epoch=1"]) == 0
    assert checkpoint.load_state(best)["iteration"] == 3
    assert "90.00 (segmentation) at iteration 3" in capsys.readouterr().out
    assert [row["iteration"] for row in rows_of() if "mask_mAP" in row] == [3, 12]


def test_evaluation_of_weights_without_a_folder(flags, shapes, request, capsys):
    assert train.main(flags + ["--no_run_folder", "--max_iter=1"]) == 0
    weights = "--trained_model=weights/yolact_shapes_0_1.pth"
    assert evaluate(shapes, request, weights, AUTO) == 0
    assert not os.path.exists("runs") and "Report" not in capsys.readouterr().out
    assert evaluate(shapes, request, weights, "--run_folder=looked/at") == 0
    assert os.path.exists("looked/at/report.html") == HAS_PAGE
    assert evaluate(shapes, request, weights, "--run_folder=looked/at") == 0


def test_a_folder_that_cannot_be_written_does_not_hide_the_scores(flags, shapes, request, capsys):
    assert train.main(flags + ["--max_iter=1"]) == 0
    with open("runs/yolact_shapes/evaluation", "w"):  # a file where a folder should be
        pass
    for choice in (AUTO, NAMED):
        assert evaluate(shapes, request, "--trained_model=latest", choice) == 2
        captured = capsys.readouterr()
        assert "  mask |" in captured.out and "cannot write" in captured.err


def test_a_report_that_fails_does_not_lose_the_training(flags, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("no ink")

    monkeypatch.setattr("utils.engine.record.build_report", fail)
    assert train.main(flags + ["--validation_epoch=1"]) == 0
    assert "The report is not complete (RuntimeError: no ink)" in capsys.readouterr().out
    assert os.path.exists("weights/yolact_shapes_2_12.pth")
