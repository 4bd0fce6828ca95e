"""Differences between PyTorch versions, seen from outside."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from utils.compat import loader_generator


def test_a_seeded_loader_leaves_the_global_generator_alone():
    options = loader_generator(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(DataLoader([1, 2], batch_size=1, **options))
    assert len(batches) == 2
    if options:
        assert torch.equal(torch.get_rng_state(), before)
