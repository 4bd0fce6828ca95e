"""Online hard example mining over the priors, with static shapes."""

from __future__ import annotations

from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def hardest_negatives(scores: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` highest scores of each row.

    Args:
        scores: float `[B, P]`, at least 0; 0 where a prior must not be mined.
        count: integer `[B, 1]`, how many to mark in each row.

    Returns:
        bool `[B, P]`. Exactly `count` per row are marked, also among equal scores.
    """
    order = scores.sort(dim=1, descending=True)[1]
    position = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    # The rank of a prior is the inverse permutation of the order: one scatter, no second sort. Of
    # 32 bits: the cores of an Ascend card scatter none of 64.
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, position.expand_as(order))
    return rank < count


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row, in plain PyTorch.

    Args:
        logits: float `[N, C]`.
        labels: int64 `[N]`, 0..C-1.

    Returns:
        float `[N]`.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def ohem_cross_entropy(conf: Tensor, class_targets: Tensor, num_positives: Tensor,
                       negpos_ratio: float,
                       class_factors: Optional[Tensor] = None,
                       row_losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy
                       ) -> Tuple[Tensor, Tensor]:
    """Cross entropy summed over all positives and the hardest negatives of each image.

    A negative's hardness is its log-sum-exp minus its background logit (YOLACT, Liu et al.'s SSD),
    which is the cross entropy itself. The log-sum-exp is taken by rows; the original subtracts
    the largest logit of the whole batch, so that rows 100 below it are never mined.

    Args:
        conf: float `[B, P, C]` logits.
        class_targets: integer `[B, P]`, class 1..C-1, 0 background, -1 neutral.
        num_positives: integer `[B]`, number of priors with a class above 0.
        negpos_ratio: negatives mined for each positive.
        class_factors: float `[C]`, what the loss of each class's positives is multiplied by; that
            of the background has to be 1. Mining does not see them. None is 1 for all.
        row_losses: `cross_entropy`, or a kernel in its place. It never gets a label out of range.

    Returns:
        0-d float, the sum over the batch; bool `[B, P]`, the mined negatives.
    """
    batch, priors, classes = conf.shape
    # Class -1 is out of range for the kernels (undefined on NPU); neutral rows are masked below.
    labels = class_targets.clamp(min=0).long()
    losses = row_losses(conf.reshape(-1, classes), labels.reshape(-1)).reshape(batch, priors)
    background = class_targets == 0
    count = (num_positives * negpos_ratio).clamp(max=priors - 1).unsqueeze(1)
    mined = hardest_negatives(losses.detach() * background, count) & background
    if class_factors is not None:
        losses = losses * class_factors.index_select(0, labels.reshape(-1)).view_as(losses)
    return (losses * (mined | (class_targets > 0))).sum(), mined
