"""Differences between PyTorch versions, seen from outside."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from utils.compat import can_load_weights_only, loader_generator


def test_weights_only_reads_the_state_of_an_optimiser_where_it_is_used(tmp_path):
    if not can_load_weights_only():
        assert int(torch.__version__.split(".")[0]) < 2
        return
    path = str(tmp_path / "state.pth")
    torch.save({"lr": 1e-3, "step": 3, "weight": torch.ones(2)}, path)
    assert torch.load(path, weights_only=True)["lr"] == 1e-3


def test_a_seeded_loader_leaves_the_global_generator_alone():
    options = loader_generator(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(DataLoader([1, 2], batch_size=1, **options))
    assert len(batches) == 2
    if options:
        assert torch.equal(torch.get_rng_state(), before)
