"""Records of a run: log, results, TensorBoard and its absence, the watch over the loader."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import signal
import time

import pytest

from utils import plots
from utils.distributed import failures
from utils.distributed.failures import WatchedLoader, time_limit
from utils.engine.observer import format_line
from utils.engine.record import RunRecord, flatten
from utils.errors import UserError
from utils.run_folder import RunFolder

VALUES = dict(iteration=10, losses={"B": 1.5, "C": 2.5}, total=4.0, note="text", flag=True)


TRAIN = dict(iteration=10, epoch=0, lr=0.1, losses={"B": 1.5}, total=1.5, skipped=0, seconds=0.5,
             data_seconds=0.1, fps=4.0, avg_fps=5.0, memory=2 ** 20, loss_scale=None)
SCORES = dict(images=4, box={"AP": 0.5, "AP50": 0.6, "AP75": None},
              mask={"AP": 0.25, "AP50": 0.3, "AP75": 0.2})


def test_numbers_only_are_kept():
    assert flatten(VALUES) == {"iteration": 10, "losses.B": 1.5, "losses.C": 2.5, "total": 4.0}


def read(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_a_log_is_one_object_a_line_and_goes_on_after_a_resume(tmp_path):
    for iteration in (10, 20):
        record = RunRecord(log=str(tmp_path / "logs" / "run.log"))
        record.write("session", args={"seed": 1})
        record.write("train", **dict(TRAIN, iteration=iteration))
        record.write("epoch", iteration=iteration, epoch=1)
        record.write("val", iteration=iteration, box={"AP": 0.5})
        record.finish()
    records = read(tmp_path / "logs" / "run.log")
    assert [found["type"] for found in records] == ["session", "train", "epoch", "val"] * 2
    assert records[1]["losses"] == {"B": 1.5} and records[5]["iteration"] == 20


def test_what_json_does_not_have_is_null(tmp_path):
    """All steps since the start were skipped: their means are no numbers."""
    folder = RunFolder(str(tmp_path), "a")
    record = RunRecord(folder)
    record.write("train", **dict(TRAIN, total=float("nan"), losses={"B": float("inf")},
                                 more=[1.0, float("nan")]))
    found, = read(tmp_path / "log.jsonl")
    assert (found["total"], found["losses"], found["more"]) == (None, {"B": None}, [1.0, None])
    assert folder.training()[0]["loss_total"] is None


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log_folder"):
        RunRecord(log=str(tmp_path / "file" / "run.log"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_once_and_ends_nothing(capsys):
    record = RunRecord(log="/dev/full")
    for _ in range(3):
        record.write("train", **TRAIN)
    assert record.finish() == []
    assert capsys.readouterr().out == ("Warning: the log '/dev/full' cannot be written (No space "
                                       "left on device); the training goes on\n")


def test_results_that_cannot_be_written_are_left_out(tmp_path, monkeypatch, capsys):
    folder = RunFolder(str(tmp_path), "a")
    record = RunRecord(folder)

    def full(stream):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for iteration in (5, 10):
            record.write("epoch", iteration=iteration, epoch=1)
    assert re.match("Warning: results.csv cannot be written .*No space left on device.*; the "
                    "training goes on\n$", capsys.readouterr().out)
    record.write("epoch", iteration=20, epoch=2)
    assert [row["iteration"] for row in folder.results()] == [5, 10, 20]


def test_short_epochs_do_not_write_all_results_each_time(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), "a")
    record, written = RunRecord(folder), []
    real = folder.update_results
    monkeypatch.setattr(folder, "update_results", lambda: written.append(1) or real())
    for iteration in range(1, 6):
        record.write("epoch", iteration=iteration, epoch=iteration)
    assert len(written) == 1
    record.write("val", iteration=5, epoch=5, **SCORES)
    assert len(written) == 2
    record.write("epoch", iteration=6, epoch=6)
    record.finish()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 6


def test_other_processes_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = RunRecord()
    record.write("train", **TRAIN)
    assert record.finish() == [] and record.path is None and os.listdir(str(tmp_path)) == []


def test_missing_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="--tensorboard needs the package"):
        RunRecord(board=str(tmp_path / "board"))
    folder = RunFolder(str(tmp_path / "runs"), "a")
    assert "TensorBoard is not installed" in RunRecord(folder).notes[0]


@pytest.mark.parametrize("demanded", [True, False])
def test_tensorboard_reads_what_was_written(tmp_path, demanded):
    """Resumed, what a board has of later iterations is void: in --tensorboard as in the folder."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, iterations in ((0, (10, 20)), (10, (20,))):  # resumed at 10: row 20 comes anew
        record = (RunRecord(board=str(tmp_path), start=start) if demanded else
                  RunRecord(RunFolder(str(tmp_path), "a"), start=start))
        for iteration in iterations:
            record.write("train", **dict(TRAIN, iteration=iteration,
                                         total=float(start + iteration)))
        record.write("val", iteration=20, epoch=1, **SCORES)
        record.finish()
        time.sleep(1.1)  # files are read in the order of their names, which tell the second
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total")] == [
        (10, 10.0), (20, 30.0)]
    assert events.Scalars("val/box.AP")[-1].value == 0.5


def test_a_folder_that_tensorboard_cannot_name_has_no_events(tmp_path):
    pytest.importorskip("tensorboard")
    other = str(tmp_path / "gbk\udcd6")
    record = RunRecord(RunFolder(other, "a"))
    assert "not in UTF-8" in record.notes[0]
    record.write("train", **TRAIN)
    assert len(RunFolder(other, "a").records()) == 1
    with pytest.raises(UserError, match="not in UTF-8"):
        RunRecord(board=other)


def test_a_new_loss_term_is_everywhere(tmp_path, monkeypatch):
    """Whatever names the losses have: nothing but the loss itself knows them."""
    losses = {"B": 1.5, "X": 2.5}
    folder = RunFolder(str(tmp_path / "runs"), "a")
    folder.write_config({"config": "yolact_base"})
    log = tmp_path / "logs" / "run.log"
    record = RunRecord(folder, str(log))
    record.write("train", **dict(TRAIN, losses=losses, total=4.0))
    record.write("epoch", iteration=10, epoch=1)
    record.write("val", iteration=10, epoch=1, **SCORES)
    record.finish()

    assert "B: 1.500 | X: 2.500 | T: 4.000" in format_line(
        0, 10, losses, 4.0, "0:00:00", 0.5, 4.0, 5.0, 0)
    assert read(log)[0]["losses"] == losses
    for (row,) in (folder.training(), folder.results()):
        assert (row["loss_B"], row["loss_X"], row["loss_total"]) == (1.5, 2.5, 4.0)
        assert row["images_per_second"] == 5.0
    assert (row["mask_mAP"], row["box_AP75"]) == (25.0, None)


def test_a_new_loss_term_is_seen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    legends = []

    def keep_legend(figure):
        legend = figure.axes[0].get_legend()
        legends.append([text.get_text() for text in legend.get_texts()] if legend else [])
        return b"\x89PNG"

    monkeypatch.setattr(plots, "_to_png", keep_legend)
    folder = RunFolder(str(tmp_path), "a")
    folder.write_config({"config": "yolact_base"})
    record = RunRecord(folder)
    record.write("train", **dict(TRAIN, losses={"B": 1.5, "X": 2.5}, total=4.0))
    record.write("epoch", iteration=10, epoch=1)
    record.write("train", **dict(TRAIN, iteration=20, losses={"B": 1.5, "X": 2.5}, total=4.0))
    record.finish()
    assert legends[0] == ["B", "X", "total"]
    pytest.importorskip("jinja2")
    with open(folder.file("report.html"), encoding="utf-8") as stream:
        assert "loss X</th>" in stream.read()
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(folder.path)
    events.Reload()
    assert events.Scalars("train/losses.X")[0].value == 2.5


def test_waiting_for_data_is_measured():
    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    watched = WatchedLoader(slow(), 0)
    assert list(watched) == [0, 1, 2]
    assert watched.items == 3 and 0.06 <= watched.seconds < 1
    assert watched.mean_since_last() == pytest.approx(watched.seconds / 3)
    assert watched.mean_since_last() == 0
    assert watched.sentence().startswith("Waited for data ")


def test_an_item_that_does_not_come_is_an_error_after_the_limit(monkeypatch):
    monkeypatch.setattr(failures, "FIRST_FACTOR", 1)
    before, items = signal.getsignal(signal.SIGALRM), []
    with pytest.raises(UserError, match="no batch for 0.2 s .--loader_timeout."):
        for item in WatchedLoader((time.sleep(item) or item for item in (0, 30)), 0.2):
            items.append(item)
    assert items == [0]
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_loader_that_hears_nothing_ends_its_process(monkeypatch):
    ended = []

    def hanging():
        yield 1
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(failures, "leave_hung", lambda *found: ended.append(found))
    monkeypatch.setattr(failures, "interrupted_after", lambda *limit: contextlib.nullcontext())
    monkeypatch.setattr(failures, "FIRST_FACTOR", 1)
    monkeypatch.setattr(failures, "GRACE_SECONDS", 0.2)
    assert list(WatchedLoader(hanging(), 0.2, 3)) == [1]
    assert ended and ended[0][0] == 3 and "no batch for 0.2 s" in ended[0][1]


def test_slow_steps_between_items_do_not_count(monkeypatch):
    ended = []
    monkeypatch.setattr(failures, "leave_hung", lambda *found: ended.append(found))
    for _ in WatchedLoader(range(2), 0.1):
        time.sleep(0.3)
    assert ended == []


def test_a_block_within_its_limit_goes_on():
    with time_limit(0.2, 0, "too slow"):
        pass
    time.sleep(0.3)  # the process would be gone by now
