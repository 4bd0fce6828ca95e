"""Learning rate: warm-up, steps, cosine, scaling, resuming."""

from __future__ import annotations

import json
import math

import pytest

from data.config import get_config
from utils.schedule import LearningRate


def test_warm_up_is_linear_and_ends_at_the_full_rate():
    rate = LearningRate(1.0, 100, warmup_init=0.2, warmup_until=4)
    assert [rate(i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_warm_up_it_starts_at_the_full_rate():
    assert LearningRate(0.5, 100)(0) == 0.5


def test_a_step_takes_effect_at_its_own_iteration():
    rate = LearningRate(1.0, 100, lr_steps=(10, 20), gamma=0.5)
    assert [rate(i) for i in (9, 10, 19, 20, 99)] == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_cosine_falls_from_the_full_rate_to_the_final_factor():
    rate = LearningRate(2.0, 110, schedule="cosine", warmup_until=10, final_factor=0.01)
    assert rate(10) == 2.0
    assert rate(60) == pytest.approx((2.0 + 0.02) / 2)
    assert rate(110) == pytest.approx(0.02)
    assert rate(1000) == pytest.approx(0.02)
    rates = [rate(i) for i in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_of_a_run_that_is_all_warm_up_is_defined():
    rate = LearningRate(1.0, 5, schedule="cosine", warmup_until=10)
    assert all(math.isfinite(rate(i)) for i in range(20))


def test_the_shapes_recipe_uses_the_cosine():
    config = get_config("yolact_shapes")
    rate = LearningRate.from_config(config, config.batch_size)
    assert rate.schedule == "cosine"
    assert rate(config.lr_warmup_until) == config.lr
    assert rate(config.max_iter) == pytest.approx(config.lr * config.lr_final_factor)


def test_scaling_rounds_iterations_down_and_can_be_turned_off():
    config = get_config("yolact_base", lr=1e-3, max_iter=1000, lr_steps=(100, 205), batch_size=8)
    rate = LearningRate.from_config(config, 64)
    assert (rate.base_lr, rate.max_iter, rate.lr_steps) == (8e-3, 125, (12, 25))
    short = get_config("yolact_base", max_iter=3, lr_steps=(), batch_size=8)
    assert LearningRate.from_config(short, 64).max_iter == 1
    assert LearningRate.from_config(config, 64, autoscale=False).base_lr == config.lr


def test_a_length_in_epochs_keeps_the_steps_in_proportion():
    config = get_config("yolact_base", epochs=10)
    rate = LearningRate.from_config(config, 16, epoch_size=800)
    assert (rate.max_iter, rate.lr_steps, rate.warmup_until) == (
        8000, (2800, 6000, 7000, 7500), 500)
    assert rate.base_lr == 2 * config.lr
    assert LearningRate.from_config(config, 16, False, 800).base_lr == config.lr
    short = LearningRate.from_config(config, 8, epoch_size=3)
    assert (short.max_iter, short.lr_steps, short.warmup_until) == (30, (10, 22, 26, 28), 3)
    cosine = LearningRate.from_config(get_config("yolact_shapes", epochs=2), 8, epoch_size=100)
    assert (cosine.max_iter, cosine.warmup_until) == (200, 20)
    assert cosine(200) == pytest.approx(cosine.base_lr * cosine.final_factor)


def test_state_is_plain_and_equal_only_for_the_same_schedule():
    config = get_config("yolact_base")
    state = LearningRate.from_config(config, 8).state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state == LearningRate.from_config(config, 8).state_dict()
    assert state != LearningRate.from_config(config, 16).state_dict()
