"""Hard negative mining at its edges: no positive, one, and too many for the ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layers.multibox_loss import cross_entropy, hardest_negatives, ohem_cross_entropy


@pytest.mark.parametrize("case", ["zero_pos", "one_pos", "saturated"])
def test_sum_is_the_originals(golden, device, case):
    data = golden("ohem_edge")
    conf = torch.from_numpy(data["conf"]).to(device)
    targets = {"zero_pos": np.zeros(conf.shape[:2], np.int64), "one_pos": data["conf_t_one"],
               "saturated": data["conf_t_saturated"]}[case]
    targets = torch.from_numpy(targets).to(device)
    total, _ = ohem_cross_entropy(conf, targets, (targets > 0).sum(1), 3)
    np.testing.assert_allclose(total.item(), data[case], rtol=1e-6)


def by_two_sorts(scores, count):
    """The original's ranks."""
    order = scores.sort(1, descending=True)[1]
    return order.sort(1)[1] < count


@pytest.mark.parametrize("levels", [2, 7, 50, 1000])
@pytest.mark.parametrize("priors", [5, 100, 1329, 2000, 19248])
def test_mined_are_the_originals_among_equals_too(device, priors, levels):
    """50 rows each, 1000 in all, of few different scores, in many of which none is above 0."""
    rng = np.random.RandomState(priors + levels)
    scores = (rng.randint(0, levels, (50, priors)) * rng.randint(0, 2, (50, 1))).astype(np.float32)
    scores[rng.rand(50, priors) < 0.3] = 0
    count = rng.randint(0, priors, (50, 1))
    count[:2] = [[0], [priors - 1]]
    scores, count = (torch.from_numpy(values).to(device) for values in (scores, count))
    mined = hardest_negatives(scores, count)
    assert torch.equal(mined, by_two_sorts(scores, count))
    assert torch.equal(mined.sum(1, keepdim=True), count)


@pytest.mark.parametrize("name", ["loss_base_b2", "loss_base_b2_crowd", "loss_plus_b1_maskiou"])
def test_mined_are_the_originals_on_golden_predictions(golden, device, name):
    data = golden(name)
    conf = torch.from_numpy(data["in_conf"]).to(device)
    targets = torch.from_numpy(data["conf_t"].astype(np.int32)).to(device)
    positives = (targets > 0).sum(1)
    _, mined = ohem_cross_entropy(conf, targets, positives, 3)
    losses = cross_entropy(conf.flatten(0, 1), targets.clamp(min=0).long().reshape(-1))
    background = targets == 0
    count = (positives * 3).clamp(max=conf.shape[1] - 1).unsqueeze(1)
    expected = by_two_sorts(losses.view_as(targets) * background, count) & background
    assert mined.any() and torch.equal(mined, expected)
