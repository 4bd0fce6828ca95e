"""The log line that ModelZoo's scripts parse, the clocks behind it, and the steps it is about."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from helpers import rounding
from utils.engine import observer
from utils.engine.observer import WINDOW, StepRecords, format_line


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


def observe(monkeypatch, seconds, fps_start=1, pauses=()):
    """Log lines of a training of 4 images a step, each step of which takes so long."""
    time = Clock()
    monkeypatch.setattr(observer.time, "perf_counter", time)
    records = StepRecords()
    watch = observer.Observer([], records, torch.device("cpu"), rank=0, start=0, max_iter=100,
                              epoch_size=50, images_per_step=4, fps_start=fps_start,
                              loader_timeout=0)
    batch, values = SimpleNamespace(image_ids=torch.arange(4)), []
    for done, duration in enumerate(seconds, 1):
        time.now += duration
        records.add({"B": torch.tensor(1.5)}, torch.tensor(True))
        watch.step(done, [batch])
        values.append(watch.progress(done, 0.1))
        if done in pauses:
            with watch.stopped():
                time.now += 1000
    return watch, values


def test_lines_of_a_training(monkeypatch):
    """The first step compiles: it counts neither for the time left nor for the mean speed."""
    watch, (first, second, third) = observe(monkeypatch, (500, 2, 4), pauses=(2,))
    assert first.lines == ["[  0]       1 || B: 1.500 | T: 1.500 || ETA: 13:45:00 || timer: "
                           "500.000 || fps: 0.008 || avg_fps: 0.000 || GPU: 0"]
    assert "ETA: 0:03:16 || timer: 2.000 || fps: 2.000 || avg_fps: 2.000" in second.lines[0]
    assert "ETA: 0:04:51 || timer: 4.000 || fps: 1.000 || avg_fps: 1.333" in third.lines[0]
    assert watch.images_per_second == third.values["avg_fps"] == 4 / 3


@pytest.mark.parametrize("fps_start, average", [(0, 3 * 4 / 506), (2, 1.0), (3, 0.0), (9, 0.0)])
def test_the_mean_speed_begins_where_it_is_asked_to(monkeypatch, fps_start, average):
    watch, _ = observe(monkeypatch, (500, 2, 4), fps_start, pauses=(1, 2))
    assert watch.images_per_second == pytest.approx(average)


def add(records, iteration, value, applied=True, device="cpu"):
    losses = {"B": torch.tensor(float(value), device=device),
              "C": torch.tensor(2.0 * value, device=device)}
    records.add(losses, torch.tensor(applied, device=device))
    records.count(iteration, (10 * iteration, 10 * iteration + 1))


def test_mean_over_the_window_only(device):
    records = StepRecords()
    for iteration in range(WINDOW + 50):
        add(records, iteration, iteration, device=device)
    report = records.report()
    expected = sum(range(50, WINDOW + 50)) / WINDOW
    assert math.isclose(report.losses["B"], expected)
    assert math.isclose(report.total, 3 * expected)
    assert report.skipped == [] and report.in_a_row == 0


def test_skipped_steps_are_named_once_and_left_out_of_the_mean(device):
    rounding.skip_where_saturated()
    records = StepRecords()
    add(records, 0, 1.0, device=device)
    add(records, 1, float("nan"), applied=False, device=device)
    add(records, 2, 3.0, device=device)
    report = records.report()
    assert report.losses == {"B": 2.0, "C": 4.0}
    assert [step.iteration for step in report.skipped] == [1]
    sentence = report.skipped[0].sentence()
    assert "iteration 1" in sentence and "B: nan" in sentence and "10, 11" in sentence
    assert records.report().skipped == []
    assert records.total_skipped == 1


def test_gradient_that_is_not_finite_with_finite_losses():
    records = StepRecords()
    add(records, 7, 1.0, applied=False)
    assert "iteration 7: gradient not finite" in records.report().skipped[0].sentence()


def test_runs_of_skipped_steps_go_across_reports():
    records = StepRecords()
    for iteration in range(6):
        add(records, iteration, 1.0, applied=False)
    assert records.report().in_a_row == 6
    for iteration in range(6, 10):
        add(records, iteration, 1.0, applied=False)
    add(records, 10, 1.0)
    assert records.report().in_a_row == 10
    add(records, 11, 1.0, applied=False)
    assert records.report().in_a_row == 1


def test_steps_that_come_again_are_not_counted(tmp_path):
    records, undisturbed = StepRecords(), StepRecords()
    for one in (records, undisturbed):
        add(one, 0, 1.0)
        one.report()
    for iteration in range(1, 4):
        add(records, iteration, 5.0, applied=False)
    assert records.report().in_a_row == 3
    records.take_back(3)
    for one in (records, undisturbed):
        add(one, 1, 2.0, applied=False)
    assert records.report() == undisturbed.report()
    assert records.state_dict()["total_skipped"] == 1


def test_all_skipped_gives_nan_not_an_exception():
    records = StepRecords()
    add(records, 0, 1.0, applied=False)
    assert math.isnan(records.report().total)


@pytest.mark.parametrize("steps", [5, WINDOW + 7])
def test_state_goes_through_a_checkpoint(tmp_path, device, steps):
    records = StepRecords()
    for iteration in range(steps):
        add(records, iteration, iteration, device=device)
    records.report()
    last = records.state_dict()["ring"][(steps - 1) % WINDOW]
    assert last.tolist() == [steps - 1, 2 * (steps - 1), 1]  # as in files of earlier versions
    torch.save(records.state_dict(), str(tmp_path / "state"))
    other = StepRecords()
    other.load_state_dict(torch.load(str(tmp_path / "state")), device)
    for one in (records, other):
        add(one, steps, 100.0, device=device)
    assert records.report() == other.report()
