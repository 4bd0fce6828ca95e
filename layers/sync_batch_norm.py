"""Batch norm over the images of all cards, in plain PyTorch: it runs on every backend."""

from __future__ import annotations

from typing import Any, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverCards(torch.autograd.Function):
    """Sum of a tensor over all processes; the gradient is summed in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches of all cards.

    Every card must have equally many pixels. Parameters, buffers and evaluation are unchanged;
    batches are not counted, as nowhere in this network.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise `[B, C, h, w]`."""
        if not self.training or not dist.is_initialized():
            return super().forward(features)
        # In float32: squares of half-precision features overflow.
        wide = features.float()
        mean, variance, count = self._statistics(wide)
        self._update(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        normalised = wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return normalised.to(features.dtype)

    def _statistics(self, features: Tensor) -> Tuple[Tensor, Tensor, int]:
        # The mean first, then squares of differences: sums of squares alone would lose digits.
        world = dist.get_world_size()
        count = features.numel() // features.shape[1] * world
        mean = _SumOverCards.apply(features.mean(dim=(0, 2, 3))) / world
        centred = features - mean.view(1, -1, 1, 1)
        variance = _SumOverCards.apply((centred * centred).mean(dim=(0, 2, 3))) / world
        return mean, variance, count

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None
        unbiased = variance * (count / max(count - 1, 1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - self.momentum).add_(value, alpha=self.momentum)


def convert(module: nn.Module) -> int:
    """Make every `nn.BatchNorm2d` in `module` a `SyncBatchNorm2d`, in place; returns how many.

    Only the class of the modules changes: parameters and buffers stay the same objects.
    """
    found = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    for child in found:
        child.__class__ = SyncBatchNorm2d
    return len(found)
