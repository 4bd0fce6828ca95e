"""Factors by class name, and what they do to the confidence loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data.classes import LARGEST_FACTOR, class_factors
from data.config import get_config
from layers.multibox_loss import MultiBoxLoss, ohem_cross_entropy
from utils.errors import UserError

NAMES = ["cat", "dog", "bird"]


def test_off_is_none():
    assert class_factors((), NAMES, [1, 2, 3]) is None


def test_by_name_the_others_have_one():
    assert class_factors((("dog", 2.5),), NAMES, [1, 2, 3]) == [1, 1, 2.5, 1]


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(UserError, match="'dgo'.*did you mean 'dog'.*cat, dog, bird"):
        class_factors((("dgo", 2.0),), NAMES, [1, 1, 1])


def test_balanced_is_the_inverse_frequency_within_bounds():
    factors = class_factors("balanced", NAMES, [60, 30, 10])
    assert factors == pytest.approx([1, 100 / 180, 100 / 90, 100 / 30])
    assert (60 * factors[1] + 30 * factors[2] + 10 * factors[3]) / 100 == pytest.approx(1)
    bounded = class_factors("balanced", NAMES, [100000, 1, 0])
    assert bounded == [1, pytest.approx(0.5, rel=1e-3), LARGEST_FACTOR, 1]


def _case():
    generator = torch.Generator().manual_seed(0)
    conf = torch.randn(2, 40, 4, generator=generator)
    targets = torch.zeros(2, 40, dtype=torch.int32)
    targets[0, :6] = torch.tensor([1, 2, 3, 1, 2, -1])
    targets[1, 3] = 3
    return conf, targets, torch.tensor([5, 1])


def test_only_positives_are_multiplied(device):
    conf, targets, positives = (value.to(device) for value in _case())
    factors = torch.tensor([1, 2.0, 0.5, 3.0], device=device)
    plain, mined = ohem_cross_entropy(conf, targets, positives, 3)
    weighted, mined_too = ohem_cross_entropy(conf, targets, positives, 3, factors)
    assert torch.equal(mined.cpu(), mined_too.cpu())
    losses = F.cross_entropy(conf.reshape(-1, 4), targets.clamp(min=0).long().reshape(-1),
                             reduction="none").reshape(2, 40)
    extra = ((factors[targets.clamp(min=0).long()] - 1) * losses)[targets > 0].sum()
    assert float(weighted) == pytest.approx(float(plain + extra), rel=1e-5)


def test_a_recipe_that_rescores_masks_needs_the_network_for_it():
    with pytest.raises(ValueError, match="use_maskiou=True, so the loss needs"):
        MultiBoxLoss.from_config(get_config("yolact_plus_base"))
    with pytest.raises(ValueError, match="must not be given"):
        MultiBoxLoss.from_config(get_config("yolact_base"), torch.nn.Identity())
