"""Records of a run: CSV, TensorBoard's absence, the watch over the loader."""

from __future__ import annotations

import argparse
import builtins
import time

import pytest

from utils.distributed.failures import WatchedLoader, time_limit
from utils.engine.log import Board, CsvLog, FileLog, RunLog, flatten, open_log
from utils.errors import UserError

VALUES = dict(iteration=10, losses={"B": 1.5, "C": 2.5}, total=4.0, note="text", flag=True)


def test_numbers_only_are_kept():
    assert flatten(VALUES) == {"iteration": 10, "losses.B": 1.5, "losses.C": 2.5, "total": 4.0}


def test_csv_has_a_row_for_each_training_record_and_goes_on_after_a_resume(tmp_path):
    for iteration in (10, 20):
        log = RunLog([FileLog(str(tmp_path), "run")])
        log.write("session", args={"seed": 1})
        log.write("train", **dict(VALUES, iteration=iteration))
        log.write("val", iteration=iteration, box={"AP": 0.5})
        log.close()
    assert (tmp_path / "run.csv").read_text() == (
        "iteration,losses.B,losses.C,total\n10,1.5,2.5,4.0\n20,1.5,2.5,4.0\n")
    assert (tmp_path / "run.log").read_text().count("\n") == 6


def test_columns_stay_those_of_the_first_row(tmp_path):
    log = CsvLog(str(tmp_path / "a.csv"))
    log.write({"a": 1, "b": 2})
    log.write({"b": 3, "c": 4})
    assert (tmp_path / "a.csv").read_text() == "a,b\n1,2\n,3\n"


def test_missing_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="--tensorboard needs the package"):
        open_log(argparse.Namespace(no_log=False, log_folder=str(tmp_path),
                                    tensorboard=str(tmp_path / "board")), "run")


def test_tensorboard_reads_what_was_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, iterations in ((0, (10, 20)), (10, (20,))):  # resumed at 10: row 20 comes anew
        log = RunLog([Board(str(tmp_path), start)])
        for iteration in iterations:
            log.write("train", **dict(VALUES, iteration=iteration, total=float(start + iteration)))
        log.write("val", iteration=20, box={"AP": 0.5})
        log.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/total")] == [
        (10, 10.0), (20, 30.0)]
    assert events.Scalars("val/box.AP")[-1].value == 0.5


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


def test_an_item_that_does_not_come_is_reported_after_the_limit():
    ended = []

    def hanging():
        yield 1
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
        yield 2

    watched = WatchedLoader(hanging(), 0.2, 3, lambda rank, cause: ended.append((rank, cause)))
    assert list(watched) == [1, 2]
    assert ended and ended[0][0] == 3 and "no batch for 0.2 s" in ended[0][1]


def test_slow_steps_between_items_do_not_count():
    ended = []
    for _ in WatchedLoader(range(2), 0.1, 0, lambda *found: ended.append(found)):
        time.sleep(0.3)
    assert ended == []


def test_a_block_within_its_limit_goes_on():
    with time_limit(0.2, 0, "too slow"):
        pass
    time.sleep(0.3)  # the process would be gone by now
