"""What a log line says of the last steps."""

from __future__ import annotations

import math

import torch

from utils.engine.observer import WINDOW, StepRecords


def add(records, iteration, value, applied=True, device="cpu"):
    losses = {"B": torch.tensor(float(value), device=device),
              "C": torch.tensor(2.0 * value, device=device)}
    records.add(iteration, losses, torch.tensor(applied, device=device),
                torch.tensor([10 * iteration, 10 * iteration + 1]))


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


def test_all_skipped_gives_nan_not_an_exception():
    records = StepRecords()
    add(records, 0, 1.0, applied=False)
    assert math.isnan(records.report().total)


def test_state_goes_through_a_checkpoint(tmp_path, device):
    records = StepRecords()
    for iteration in range(5):
        add(records, iteration, iteration, device=device)
    records.report()
    torch.save(records.state_dict(), str(tmp_path / "state"))
    other = StepRecords()
    other.load_state_dict(torch.load(str(tmp_path / "state")), device)
    for one in (records, other):
        add(one, 5, 100.0, device=device)
    assert records.report() == other.report()
