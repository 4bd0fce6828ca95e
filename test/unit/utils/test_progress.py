"""The progress line: what it says, how it fits, and what a real terminal shows of it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

from data.shapes import write_dataset
from utils.progress import ProgressBar, compose, duration, image_parts, step_parts

PARTS = ["ETA 0:12:05", "data 2 ms + compute 313 ms", "1.2 GiB"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("columns, line", [
    (120, "[=============                 ] 120 / 260 (46.2%)  ETA 0:12:05  "
          "data 2 ms + compute 313 ms  1.2 GiB"),
    (80, "[====     ] 120 / 260 (46.2%)  ETA 0:12:05  data 2 ms + compute 313 ms  1.2 GiB"),
    (60, "120 / 260 (46.2%)  ETA 0:12:05  data 2 ms + compute 313 ms"),
    (50, "[=======         ] 120 / 260 (46.2%)  ETA 0:12:05"),
    (40, "120 / 260 (46.2%)  ETA 0:12:05"),
    (20, "120 / 260 (46.2%)"),
    (10, "120 / 260"),
])
def test_a_line_fits_its_terminal(columns, line):
    assert compose(120, 260, PARTS, columns) == line
    assert len(line) < columns


def test_without_a_total_there_is_no_bar():
    assert compose(7, 0, ["24.00 images/s"], 80) == "7  24.00 images/s"


def test_the_bar_is_full_at_the_end_and_not_beyond():
    assert compose(5, 4, [], 60).startswith("[==============================] 5 / 4")


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00:00"), (3661.9, "1:01:01"), (90000, "1 day, 1:00:00"), (200000, "2 days, 7:33:20")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_drawn_twice_a_second_and_at_once_after_a_log_line():
    stream, clock = Terminal(), Clock()
    bar = ProgressBar(10, stream, Terminal(), clock=clock)
    for step in range(5):
        bar.show(step)
        clock.now += 0.2
    assert stream.getvalue().count("\r") == 2
    bar.clear()
    assert stream.getvalue().endswith("\r\x1b[K")
    assert bar.is_due
    bar.show(6)
    bar.finish(10)
    bar.finish(10)
    assert stream.getvalue().count("\n") == 1 and "10 / 10" in stream.getvalue()
    assert not bar.is_due


def test_nothing_in_a_file():
    for stream, beside in ((io.StringIO(), Terminal()), (Terminal(), io.StringIO())):
        bar = ProgressBar(10, stream, beside)
        bar.show(1)
        bar.clear()
        bar.finish(10)
        assert stream.getvalue() == "" and not bar.is_due


def test_images():
    assert image_parts(2, 1.5) == ["ETA 0:00:01", "1.50 images/s"]
    assert image_parts(0, 1.5) == image_parts(-3, 1.5) == ["1.50 images/s"]  # ended, or no total


def test_steps():
    assert step_parts(8, 0.0, 0.0, 0) == []
    assert step_parts(8, 1.0, 0.25, 0) == ["ETA 0:00:08", "data 250 ms + compute 750 ms"]
    assert step_parts(7, 1.295, 0.175, 3 * 2 ** 29)[1:] == [
        "data 175 ms + compute 1.12 s", "1.5 GiB"]


def _in_a_terminal(columns, command, folder):
    """What `command` writes to a terminal of so many columns, as the screen sees it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = dict(os.environ, OMP_NUM_THREADS="1", TERM="xterm")
    process = subprocess.Popen([sys.executable, "-u"] + command, cwd=str(ROOT), env=environ,
                               stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    os.close(master)
    assert process.wait() == 0, text.decode()
    (folder / "capture.txt").write_bytes(text)
    return text.decode("utf-8")


@pytest.mark.launch
@pytest.mark.parametrize("columns", [80, 40])
def test_training_and_evaluation_in_a_real_terminal(tmp_path, columns):
    data = tmp_path / "data"
    write_dataset(str(data), seed=3, train=8, val=4)
    shown = _in_a_terminal(columns, [
        "train.py", f"--data={data}", "--config=yolact_shapes", "--batch_size=2",
        "--max_iter=24", "--no_autoscale", "--num_workers=0", "--no_log", "--node_device=cpu",
        "--validation_epoch=3", "--save_folder={}".format(tmp_path / "weights")], tmp_path)
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", shown)
    steps = [line for line in drawn if " / 24 (" in line]
    assert steps and all(len(line) < columns for line in drawn)
    assert any("ETA 0:" in line for line in steps)
    assert any("data " in line and " + compute " in line for line in steps) == (columns == 80)
    # Log lines start at the left, on a line that was cleared.
    logged = re.findall(r"(?:^|\n|\x1b\[K)\[ +\d+\] +(\d+) \|\| B: ", shown)
    assert logged == ["1", "10", "20", "24"]
    weights = re.search(r"^Final weights : (\S+)", shown, re.M).group(1)
    shown = _in_a_terminal(columns, [
        "eval.py", f"--trained_model={weights}", f"--val_data={data}",
        "--eval_device=cpu", "--num_workers=0", "--batch_size=1", "--per_class_file="], tmp_path)
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", shown)
    assert drawn and "4 / 4 (100.0%)" in drawn[-1] and "images/s" in drawn[-1]
    assert all(len(line) < columns for line in drawn)
