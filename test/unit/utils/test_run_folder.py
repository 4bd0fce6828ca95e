"""The run folder's own rules: names, ownership, weights."""

from __future__ import annotations

import csv
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from utils import run_folder
from utils.checkpoint import load_for_inference, save_checkpoint
from utils.distributed.processes import is_restart, launch_id
from utils.engine.record import describe_session
from utils.errors import UserError
from utils.run_folder import (
    CONFIG,
    RunFolder,
    append_record,
    best_row,
    folder_of_run,
    folder_of_weights,
    open_run_folder,
)
from utils.weights.files import Origin

LAUNCH = {"LAUNCH_TIME": "170", "MASTER_PORT": "29", "TORCHELASTIC_RESTART_COUNT": "1"}


def make(project, name, run_id="a"):
    folder = RunFolder(folder_of_run(str(project), name, run_id).path, run_id)
    folder.write_config({"config": "yolact_base"})
    return folder


def resumed(project, run_id, before, restarted=False):
    return folder_of_run(str(project), "new", run_id, before, restarted)


def test_names_that_are_taken_get_numbers(tmp_path):
    first = make(tmp_path / "runs", "x").path
    left = os.path.join(first, ".config.yaml.0123abcd.tmp")
    with open(left, "w") as stream:
        stream.write("of a process that was killed")
    paths = [first] + [make(tmp_path / "runs", "x").path for _ in range(2)]
    assert [os.path.basename(path) for path in paths] == ["x", "x-2", "x-3"]
    assert not os.path.exists(left)


@pytest.mark.parametrize("name", ["a/b", "..", ".", " x", "x\n", "\\x"])
def test_a_name_is_that_of_a_folder(tmp_path, name):
    with pytest.raises(UserError, match="--project"):
        folder_of_run(str(tmp_path), name, "a")


@pytest.mark.parametrize("name", ["x", "yolact_base-2", "\u732b", "a b", ".hidden"])
def test_usual_names_are_fine(tmp_path, name):
    assert folder_of_run(str(tmp_path), name, "a").path == str(tmp_path / name)


def test_a_project_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="--project is '.*', which is a file"):
        folder_of_run(str(tmp_path / "runs"), "x", "a")


def test_a_resumed_run_goes_on_in_its_own_folder(tmp_path):
    first, second = make(tmp_path, "x", "a"), make(tmp_path, "x", "b")
    assert resumed(tmp_path, "b", second.path).path == second.path
    assert resumed(tmp_path, "a", first.path).path == first.path
    assert resumed(tmp_path, "a", None).path == str(tmp_path / "new")
    assert resumed(tmp_path, "b", "/elsewhere/x-2").path == second.path


def test_a_folder_of_another_run_with_that_name_is_left_alone(tmp_path):
    make(tmp_path, "x", "other")
    folder = resumed(tmp_path, "mine", "runs/x")
    assert (folder.path, folder.run_id) == (str(tmp_path / "x-2"), "mine")


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    folder = resumed(tmp_path / "runs", "mine", "runs/x-2")
    assert (os.path.basename(folder.path), folder.run_id) == ("x-2", "mine")
    assert os.path.isdir(folder.path)


def test_an_attempt_finds_the_folder_of_the_attempt_before(tmp_path):
    make(tmp_path, "new", "other")
    mine = make(tmp_path, "new", launch_id(LAUNCH))
    assert is_restart(LAUNCH) and not is_restart(dict(LAUNCH, TORCHELASTIC_RESTART_COUNT="0"))
    assert resumed(tmp_path, mine.run_id, None, True).path == mine.path
    assert resumed(tmp_path, mine.run_id, None, False).path == str(tmp_path / "new-3")
    assert launch_id({}) != launch_id({"LAUNCH_TIME": "170"})


def test_an_attempt_before_which_there_was_none_makes_its_own(tmp_path):
    make(tmp_path, "new", "other")
    assert resumed(tmp_path, launch_id(LAUNCH), None, True).path == str(tmp_path / "new-2")


def pair(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_checkpoint(path, {"w": torch.full((2,), float(value))}, {
        "iteration": value, "config": {"name": "x"}, "class_names": ["a"]})
    return path


def read(path):
    stored = load_for_inference(path)
    return float(stored.tensors["w"][0]), stored.origin.iteration


@pytest.mark.parametrize("links", [True, False])
def test_kept_weights_survive_their_source(tmp_path, monkeypatch, links):
    if not links:
        def refuse(source, target):
            raise OSError(1, "no links here")
        monkeypatch.setattr(run_folder.os, "link", refuse)
    folder = make(tmp_path, "x")
    for value in (1, 2):
        source = pair(str(tmp_path / "weights" / f"c_0_{value}.pth"), value)
        folder.keep_weights(source, "last")
        folder.keep_weights(source, "last")  # the same again
        assert os.path.samefile(source, folder.weights("last")) == links
        os.unlink(source)
    assert read(folder.weights("last")) == (2.0, 2)
    assert sorted(os.listdir(folder.file("weights"))) == ["last.pth", "last.state"]


def test_weights_never_stand_beside_the_state_of_others(tmp_path, monkeypatch):
    """Killed between any two operations on files, the pair is whole or has no state."""
    folder = make(tmp_path, "x")
    folder.keep_weights(pair(str(tmp_path / "a.pth"), 1), "best")
    new = pair(str(tmp_path / "b.pth"), 2)
    real = os.replace
    seen = []

    def observe(source, target):
        real(source, target)
        if target.endswith(".pth"):
            seen.append(os.path.exists(folder.weights("best")[:-4] + ".state"))

    monkeypatch.setattr(run_folder.os, "replace", observe)
    folder.keep_weights(new, "best")
    assert seen == [False]
    assert read(folder.weights("best")) == (2.0, 2)


def test_weights_belong_to_the_folder_they_lie_in_or_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make("runs", "x", "a")
    inside, outside = pair(folder.weights("best"), 1), pair(str(tmp_path / "w" / "c_0_1.pth"), 1)
    assert folder_of_weights(inside, None).run_id == "a"
    assert folder_of_weights(outside, Origin(1, "runs/x", "a")).path == "runs/x"
    assert folder_of_weights(outside, Origin(1, "runs/x", "b")) is None
    assert folder_of_weights(outside, Origin(1, "gone", "a")) is None
    assert folder_of_weights(outside, Origin(1)) is None
    assert folder_of_weights(outside, None) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 99, "id": "a"}', '{"format": 1}'])
def test_other_folders_are_no_run_folders(tmp_path, content):
    assert open_run_folder(str(tmp_path)) is None
    (tmp_path / CONFIG).write_text(content)
    assert open_run_folder(str(tmp_path)) is None


def test_a_configuration_goes_round(tmp_path):
    values = {"config": "yolact_base", "set": {"lr": 1e-05, "pred_scales": ((24.0,), (48.0,))},
              "flags": {"data": "/\u732b: #1", "cuda": True, "seed": None, "name": "007"}}
    RunFolder(str(tmp_path), "12").write_config(values)
    stored = RunFolder(str(tmp_path), "").read(CONFIG)
    assert stored.pop("format") == 2 and stored.pop("id") == "12"
    assert stored == dict(values, set={"lr": 1e-05, "pred_scales": [[24.0], [48.0]]})
    assert "\u732b" in (tmp_path / CONFIG).read_text(encoding="utf-8")


def test_best_row_is_the_first_of_equal_ones():
    rows = [{"iteration": 1, "mask_mAP": None}, {"iteration": 2, "mask_mAP": 3.5},
            {"iteration": 3, "mask_mAP": 3.5}, {"iteration": 4}]
    assert best_row(rows)["iteration"] == 2
    assert best_row(rows[:1]) is None and best_row([]) is None


def test_sessions_add_up(tmp_path):
    folder = RunFolder(str(tmp_path), "a")
    folder.add_session({"command": "one \u732b"})
    folder.add_session({"command": "two"})
    assert [session["command"] for session in folder.sessions()] == [
        "one \u732b", "two"]


def test_a_session_says_what_ran():
    session = describe_session("device cpu", ["python", "train.py", "--name=a b"], seed=3)
    assert session["command"] == "python train.py '--name=a b'" and session["seed"] == 3
    assert session["packages"]["torch"] == torch.__version__
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert re.search(r"[0-9a-f]{40}(-dirty)?$", session["source"])
    else:
        assert session["source"] is None


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "run"), "a")


def table(folder):
    with open(folder.file("results.csv")) as stream:
        return list(csv.DictReader(stream))


def log(folder, *iterations, losses=("B",)):
    for iteration in iterations:
        append_record(folder.file("log.jsonl"), "train", {
            "iteration": iteration, "epoch": 0, "lr": 0.1, "total": 2.0, "skipped": 0, "fps": 1.0,
            "losses": {name: iteration / 7 for name in losses}, "avg_fps": 0.0})


def scores(value):
    return dict.fromkeys(("AP", "AP50", "AP75"), value)


def test_rows_of_results_and_their_empty_cells(folder):
    folder.add_record("epoch", iteration=5, epoch=1)
    log(folder, 10, 20)
    folder.add_record("epoch", iteration=24, epoch=2)
    folder.add_record("val", iteration=24, epoch=2, images=3, box=scores(None), mask=scores(0.5))
    log(folder, 30, losses=("B", "X"))
    folder.add_record("val", iteration=36, epoch=3, images=3, box=scores(0.0), mask=scores(0.25))
    folder.add_record("val", iteration=8, epoch=1, images=3, box=scores(0.0), mask=scores(0.1))
    rows = table(folder)
    assert list(rows[0]) == [
        "iteration", "epoch", "time", "lr", "loss_B", "loss_X", "loss_total", "images_per_second",
        "skipped_steps", "images_scored", "box_mAP", "box_AP50", "box_AP75", "mask_mAP",
        "mask_AP50", "mask_AP75"]
    assert [(row["iteration"], row["epoch"], row["loss_B"], row["loss_X"], row["box_mAP"],
             row["mask_AP50"]) for row in rows] == [
        ("5", "1", "", "", "", ""), ("8", "1", "", "", "0", "10"),
        ("24", "2", "2.85714", "", "", "50"), ("36", "3", "4.28571", "4.28571", "0", "25")]


def test_a_resumed_run_takes_back_what_it_makes_again(folder):
    folder.add_record("session")
    for step in (10, 20, 30):
        log(folder, step)
        folder.add_record("epoch", iteration=step, epoch=step // 10)
    folder.go_on_from(20)
    assert [row["iteration"] for row in table(folder)] == ["10", "20"]
    log(folder, 30)
    folder.add_record("epoch", iteration=30, epoch=3)
    assert [row["iteration"] for row in folder.results()] == [10, 20, 30]
    assert [row["iteration"] for row in folder.training()] == [10, 20, 30]
    folder.go_on_from(5)
    assert folder.results() == [] == folder.training() == table(folder)
    assert [record["type"] for record in folder.records()] == ["session"]


@pytest.mark.parametrize("torn", [
    '{', '{"type": "train", "iteration": 30, "losses": {', '{"type": "train"', '{"a": "\u732b',
    '30 ', '{"iteration": 30} '])
def test_a_line_that_was_cut_off_is_dropped(folder, torn):
    folder.write_bytes("log.jsonl", b"")
    log(folder, 10)
    with open(folder.file("log.jsonl"), "ab") as stream:
        stream.write(torn.encode("utf-8")[:-1])
    assert [row["iteration"] for row in folder.training()] == [10]
    folder.go_on_from(10)
    log(folder, 40)
    row, _ = folder.training()
    assert row == {"iteration": 10, "epoch": 0, "lr": 0.1, "loss_B": 10 / 7, "loss_total": 2.0,
                   "skipped_steps": 0, "images_per_second": 1.0}


def test_a_full_disk_leaves_the_results_as_they_were(folder, monkeypatch):
    folder.add_record("epoch", iteration=10, epoch=1)
    before = table(folder)

    def full(stream):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="results.csv.*No space left"):
            folder.add_record("epoch", iteration=20, epoch=2)
    assert table(folder) == before
    folder.update_results()
    assert len(table(folder)) == 2


def test_two_writers_lose_no_row_and_mix_no_pair(tmp_path, folder):
    """A training and eval.py, in one folder at the same time."""
    failed = []

    def write(name, first):
        try:
            for suffix in (".pth", ".state"):
                (tmp_path / (name + suffix)).write_text(name)
            for iteration in range(first, first + 40):
                folder.add_record("epoch", iteration=iteration, epoch=0)
                folder.keep_weights(str(tmp_path / (name + ".pth")), "best")
        except (UserError, OSError) as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(name, first))
               for name, first in (("a", 100), ("b", 200))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed == [] and len(table(folder)) == 80
    kept = [Path(folder.file("weights", "best" + suffix)).read_text()
            for suffix in (".pth", ".state")]
    assert kept[0] == kept[1]
