"""Half precision in two processes on gloo: an overflow on one skips the step on both."""

from __future__ import annotations

import re

import pytest

from data.shapes import write_dataset
from helpers.ranks import train_ranks
from utils.device import has_autocast

pytestmark = [pytest.mark.launch,
              pytest.mark.skipif(not has_autocast(), reason="casts on devices only")]
STEPS = 22

SPOILT = """
import os
import torch
import torch.distributed as dist
from utils import amp
amp.LOWEST_SCALE = 4096.0  # the floor comes after four overflows
step, steps, factor = train.train_step, [], {factor}
def train_step(network, criterion, *args, **kwargs):
    steps.append(1)
    def spoilt(*more):
        losses = criterion(*more)
        if os.environ["RANK"] == "1" and {when}:
            losses["B"] = losses["B"] * factor
        return losses
    return step(network, spoilt, *args, **kwargs)
train.train_step = train_step
progress = train.log_progress
def log_progress(training, *args, **kwargs):
    learner = training.learner
    mine = torch.cat([learner.optimizer.flat, learner.precision.scale.value.reshape(1)])
    everybodys = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everybodys, mine)
    assert torch.equal(*everybodys), "the ranks have drifted apart"
    print("scale", float(learner.precision.scale.value), "applied", int(learner.optimizer.steps))
    return progress(training, *args, **kwargs)
train.log_progress = log_progress
"""
OVERFLOW, NOT_FINITE = "1e34", "float('nan')"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=5, train=18, val=7)  # no image without objects
    return folder


def train_spoilt(shapes, folder, factor, when, level="O1", steps=STEPS):
    codes, texts, _ = train_ranks(2, shapes, folder / "run", SPOILT.format(
        factor=factor, when=when), batch_size=1, max_iter=steps, opt_level=level,
        amp_dtype="bfloat16", loss_scale="dynamic")
    return codes, texts


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_on_one_skips_on_both(shapes, tmp_path, level):
    codes, texts = train_spoilt(shapes, tmp_path, OVERFLOW, "len(steps) == 3", level, steps=5)
    assert codes == [0, 0], texts
    for text in texts:
        assert "iteration 2: gradient overflow at scale 65536, the scale is now 32768" in text
        assert re.findall("scale .* applied .*", text)[-1] == "scale 32768.0 applied 4"


def test_overflows_stop_the_run_once_the_scale_is_at_its_floor(shapes, tmp_path):
    """Four halvings, then ten in a row: up to iteration 20 and not up to 10."""
    codes, texts = train_spoilt(shapes, tmp_path, OVERFLOW, "True")
    assert codes == [1, 1], texts
    for text in texts:
        assert "16 steps in a row up to iteration 20" in text
        assert "the scale is now 4096; update skipped" in text


def test_a_loss_that_is_not_finite_on_one_stops_both_at_once(shapes, tmp_path):
    codes, texts = train_spoilt(shapes, tmp_path, NOT_FINITE, "True")
    assert codes == [1, 1], texts
    assert all("10 steps in a row up to iteration 10" in text for text in texts)
    assert "loss (B: nan) not finite" in texts[1]
