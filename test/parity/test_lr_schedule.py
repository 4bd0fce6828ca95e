"""Learning rates and auto-scaling equal to those recorded from the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.config import get_config
from utils.schedule import LearningRate

RECORDED = json.loads(
    (Path(__file__).parent.parent / "golden" / "lr_schedule.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_rates_are_the_originals(name):
    recorded = RECORDED[name]
    config, batch = name.rsplit("_bs", 1)
    rate = LearningRate.from_config(get_config(config), int(batch))
    assert rate.base_lr == recorded["base_lr"]
    assert rate.max_iter == recorded["max_iter"]
    assert list(rate.lr_steps) == recorded["lr_steps"]
    assert (rate.warmup_init, rate.warmup_until) == (recorded["warmup_init"],
                                                     recorded["warmup_until"])
    for iteration, lr in zip(recorded["iterations"], recorded["lr"]):
        assert rate(iteration) == pytest.approx(lr, rel=1e-12), iteration
