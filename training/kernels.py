"""Which kernels a training runs where it has a choice: PyTorch's or the plugin's fused ones."""

from __future__ import annotations

import functools
from typing import Callable

import torch

from layers.fused_ops import (
    CROSS_ENTROPY_ROWS,
    library_fused_sgd,
    library_fused_sgd_problem,
    npu_cross_entropy,
    npu_cross_entropy_problem,
    npu_fused_sgd,
    npu_fused_sgd_problem,
)
from layers.ohem import cross_entropy
from utils.device import has_autocast
from utils.errors import UserError
from utils.fused_optimizer import FusedSGD
from utils.optimizer import FlatSGD


def choose_sgd(fused: bool, optimizer: str, device: torch.device,
               level: str = "O0") -> Callable[..., FlatSGD]:
    """What makes the optimiser: ours, or with --fused_optimizer the Ascend plugin's.

    The plugin for PyTorch 1.5 and 1.8 has none; there it is that of the library that casts.

    Raises:
        UserError: it does not work here, at this --opt_level or with the recipe's `optimizer`.
    """
    if not fused:
        return FlatSGD
    kernel = npu_fused_sgd if has_autocast() else library_fused_sgd
    problem = "" if optimizer == "sgd" else "the recipe's optimiser is {}".format(optimizer)
    if not problem and device.type != "npu":
        problem = "this device is {}".format(device.type)
    if not problem:
        problem = (npu_fused_sgd_problem(device) if has_autocast()
                   else library_fused_sgd_problem(device, level))
    if problem:
        raise UserError("--fused_optimizer is the Ascend plugin's SGD, but {}; leave it out"
                        .format(problem))
    return functools.partial(FusedSGD, kernel=kernel)


def choose_row_losses(fused: bool, device: torch.device, images: int,
                      priors: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What computes the confidence loss: PyTorch, or with --fused_loss the Ascend plugin.

    Raises:
        UserError: the plugin's operator does not work here, or not for `images` of `priors` each.
    """
    if not fused:
        return cross_entropy
    problem, advice = "", "leave it out"
    if device.type != "npu":
        problem = "this device is {}".format(device.type)
    elif images * priors > CROSS_ENTROPY_ROWS:
        problem = ("it takes {} rows at most, and {} x {} (images, priors of each) are {}".format(
            CROSS_ENTROPY_ROWS, images, priors, images * priors))
        most = fused_loss_limit(priors)
        if most:
            advice = ("give --batch_size={} or less, with --accumulate for as many images a step, "
                      "or leave it out".format(most))
    else:
        problem = npu_cross_entropy_problem(device)
    if problem:
        raise UserError("--fused_loss is the Ascend plugin's cross entropy, but {}; {}".format(
            problem, advice))
    return npu_cross_entropy


def fused_loss_limit(priors: int) -> int:
    """Images of a card's batch that --fused_loss allows, where each has so many priors."""
    return CROSS_ENTROPY_ROWS // priors
