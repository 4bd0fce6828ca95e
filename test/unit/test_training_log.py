"""The log line that ModelZoo's scripts parse, and the clocks behind it."""

from __future__ import annotations

import json
import time

import pytest

from utils.errors import UserError
from utils.training_log import JsonLog, StepTimer, Throughput, format_line


def test_line_to_the_byte():
    line = format_line(3, 12340, {"B": 4.9012, "C": 5.5, "M": 6.25, "S": 1.0}, 17.6512,
                       "2 days, 3:04:05", 0.3154, 25.4, 25.123456, 0)
    assert line == ("[  3]   12340 || B: 4.901 | C: 5.500 | M: 6.250 | S: 1.000 | T: 17.651 || "
                    "ETA: 2 days, 3:04:05 || timer: 0.315 || fps: 25.400 || avg_fps: 25.123 || "
                    "GPU: 0")


def test_throughput_leaves_out_warm_up_and_pauses():
    throughput = Throughput(images_per_step=4, start_iter=1)
    assert throughput.average() == 0.0
    time.sleep(0.2)  # warm-up
    throughput.step()
    assert throughput.at_edge
    throughput.start()
    for _ in range(2):
        time.sleep(0.02)
        throughput.step()
    throughput.pause()
    time.sleep(0.2)  # validation
    throughput.resume()
    # 8 images in at least 0.04 s; with warm-up or pause inside it would be at most 8 / 0.24.
    assert 8 / 0.24 < throughput.average() <= 8 / 0.04


def test_eta_uses_the_mean_step():
    timer = StepTimer()
    timer.step()
    timer.update()
    timer.restart()
    time.sleep(0.05)
    timer.step()
    timer.update()
    assert timer.recent >= 0.05
    assert timer.eta(int(3661 / timer.recent)).startswith("1:0")


def test_json_log_is_one_object_a_line(tmp_path):
    log = JsonLog(str(tmp_path / "logs"), "run")
    log.write("train", iteration=1, losses={"B": 1.5})
    log.close()
    record = json.loads((tmp_path / "logs" / "run.log").read_text())
    assert record["type"] == "train" and record["losses"] == {"B": 1.5}


def test_json_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log_folder"):
        JsonLog(str(tmp_path / "file"), "run")
