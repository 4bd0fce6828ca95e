"""The best validation: what counts as better, and that it survives a resume."""

from __future__ import annotations

import pytest

from utils.engine.saving import BestScore


def test_counts_validations_since_the_best():
    best = BestScore()
    assert [best.update(step, mask, mask / 2) for step, mask in (
        (10, 0.2), (20, 0.3), (30, 0.3), (40, 0.1), (50, 0.31))] == [
            True, True, False, False, True]
    assert best == BestScore(0.31, 0.155, 50, 0)
    best.update(60, 0.0, 0.9)
    assert (best.since, best.iteration) == (1, 50)


@pytest.mark.parametrize("first", [None, float("nan"), 0.0])
def test_the_first_validation_is_the_best_whatever_it_scored(first):
    best = BestScore()
    assert best.update(10, first, first)
    assert not best.update(20, first, first)
    assert best.since == 1 and best.iteration == 10
    assert best.update(30, 0.01, None)


def test_no_score_is_never_better():
    best = BestScore(0.0, 0.0, 5)
    assert not best.update(10, None, None)
    assert not best.update(20, float("nan"), 1.0)
    assert best == BestScore(0.0, 0.0, 5, 2)


def test_what_eval_found_is_the_best_where_it_is_better():
    best = BestScore(0.5, 0.6, 10, 1)
    best.consider({"iteration": 5, "mask_mAP": 50.0, "box_mAP": None})
    assert best == BestScore(0.5, 0.6, 10, 1)
    best.consider({"iteration": 5, "mask_mAP": 75.0, "box_mAP": None})
    assert best == BestScore(0.75, None, 5, 1)
