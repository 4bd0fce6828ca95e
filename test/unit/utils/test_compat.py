"""Differences between PyTorch versions, seen from outside."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from utils.compat import iterate, loader_generator
from utils.errors import UserError


def test_a_seeded_loader_leaves_the_global_generator_alone():
    options = loader_generator(3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(DataLoader([1, 2], batch_size=1, **options))
    assert len(batches) == 2
    if options:
        assert torch.equal(torch.get_rng_state(), before)


class BrokenLoader:
    """A loader whose connection to its workers breaks while a batch is fetched."""

    def __init__(self, error, num_workers):
        self.error, self.num_workers = error, num_workers

    def __iter__(self):
        yield 1
        raise self.error


@pytest.mark.parametrize("error", [
    ConnectionResetError(104, "Connection reset by peer"), EOFError(), BrokenPipeError(),
    ConnectionRefusedError(), RuntimeError("DataLoader worker (pid 7) is killed by signal: 9")])
def test_a_worker_that_dies_at_any_moment_is_one_sentence(error):
    batches = iterate(BrokenLoader(error, 2))
    assert next(batches) == 1
    with pytest.raises(UserError, match=r"was lost \(.+\): .* lower --num_workers, now 2"):
        next(batches)
    with pytest.raises(type(error)):  # no worker that could have been lost
        list(iterate(BrokenLoader(error, 0)))
