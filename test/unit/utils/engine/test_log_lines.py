"""The log line that ModelZoo's scripts parse, and the clocks behind it."""

from __future__ import annotations

import json

import pytest

from utils.engine.log import RunLog, StepTimer, Throughput, format_line
from utils.errors import UserError


def test_line_to_the_byte():
    line = format_line(3, 12340, {"B": 4.9012, "C": 5.5, "M": 6.25, "S": 1.0}, 17.6512,
                       "2 days, 3:04:05", 0.3154, 25.4, 25.123456, 0)
    assert line == ("[  3]   12340 || B: 4.901 | C: 5.500 | M: 6.250 | S: 1.000 | T: 17.651 || "
                    "ETA: 2 days, 3:04:05 || timer: 0.315 || fps: 25.400 || avg_fps: 25.123 || "
                    "GPU: 0")


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_throughput_leaves_out_warm_up_and_pauses():
    clock = Clock()
    throughput = Throughput(images_per_step=4, start_iter=1, clock=clock)
    assert throughput.average() == 0.0
    clock.now += 100  # warm-up
    throughput.step()
    assert throughput.at_edge
    throughput.start()
    for _ in range(2):
        clock.now += 2
        throughput.step()
    assert not throughput.at_edge
    throughput.pause()
    clock.now += 1000  # validation
    throughput.resume()
    assert throughput.average() == 8 / 4
    clock.now += 12
    throughput.step()
    assert throughput.average() == 12 / 16


def test_a_pause_before_the_window_does_not_open_it():
    clock = Clock()
    throughput = Throughput(images_per_step=4, start_iter=2, clock=clock)
    throughput.step()
    throughput.pause()
    throughput.resume()
    clock.now += 100
    throughput.step()
    throughput.start()
    clock.now += 2
    throughput.step()
    assert throughput.average() == 4 / 2


def test_eta_uses_the_mean_step():
    clock = Clock()
    timer = StepTimer(clock)
    clock.now += 500  # compiles
    timer.step()
    timer.update()
    timer.restart()
    for seconds in (2, 4):
        clock.now += seconds
        timer.step()
        timer.update()
    assert timer.recent == 4
    assert timer.eta(1200) == "1:00:00"
    clock.now += 1000  # validation
    timer.skip()
    timer.update()
    assert timer.recent == 4 and timer.eta(1) == "0:00:03"


def test_json_log_is_one_object_a_line(tmp_path):
    log = RunLog("run", str(tmp_path / "logs"))
    log.write("train", iteration=1, losses={"B": 1.5})
    log.close()
    record = json.loads((tmp_path / "logs" / "run.log").read_text())
    assert record["type"] == "train" and record["losses"] == {"B": 1.5}


def test_what_json_does_not_have_is_null(tmp_path):
    """All steps since the start were skipped: their means are no numbers."""
    log = RunLog("run", str(tmp_path))
    log.write("train", total=float("nan"), losses={"B": float("inf")}, lr=[1.0, float("nan")])
    log.close()
    text = (tmp_path / "run.log").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert (record["total"], record["losses"], record["lr"]) == (None, {"B": None}, [1.0, None])


def test_json_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log_folder"):
        RunLog("run", str(tmp_path / "file"))
