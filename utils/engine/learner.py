"""The network and what trains it: its first weights, its loss, its optimiser."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import dataclass
from typing import Dict, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from backbone import synchronise_batch_norm
from data.config import NOT_FROZEN, WHOLE_BACKBONE, Config
from layers.anchors import make_priors
from layers.fused_ops import CROSS_ENTROPY_ROWS, kernel_problem, npu_cross_entropy
from layers.multibox_loss import MultiBoxLoss, RowLosses, cross_entropy
from utils.amp import Precision, batch_norm_parameters
from utils.checkpoint import load_for_inference
from utils.device import prefers_channels_last
from utils.distributed.processes import Processes
from utils.distributed.sharing import wrap
from utils.ema import WeightAverage
from utils.errors import UserError
from utils.optimizer import FlatOptimizer, build_optimizer
from utils.weights.loading import load_backbone, load_for_fine_tuning
from yolact import Yolact, build_yolact

MIN_BATCH_FOR_BN = 6
"""Images below which pretrained batch-norm statistics stay frozen, as in the original."""


@dataclass(frozen=True)
class Learner:
    """A network on its device with everything that a step changes it by."""

    model: Yolact
    network: nn.Module
    """`model`, wrapped for several processes."""
    criterion: MultiBoxLoss
    optimizer: FlatOptimizer
    precision: Precision
    average: Optional[WeightAverage]
    """None where the raw weights are scored and saved."""
    device: torch.device

    def raw_weights(self) -> Dict[str, Tensor]:
        """The float32 weights that the next step starts from, by their names in the network."""
        with self.precision.float32_weights(self.model):
            return self.model.state_dict()

    def weights(self) -> Dict[str, Tensor]:
        """The weights that are saved, scored and handed on: the averages where they are kept."""
        raw = self.raw_weights()
        return raw if self.average is None else self.average.apply_to(raw)

    @contextlib.contextmanager
    def scored_weights(self, processes: Processes) -> Iterator[None]:
        """Context in which `model` has the weights that `weights` returns."""
        with self.precision.float32_weights(self.model):
            if self.average is None:
                yield
                return
            self.average.share(processes)
            with self.average.in_place_of_weights():
                yield


def build_learner(args: argparse.Namespace, config: Config, precision: Precision,
                  processes: Processes, device: torch.device, per_card: int,
                  class_names: Sequence[str], factors: Optional[Sequence[float]]) -> Learner:
    """Build and load the network, then what trains it.

    `args` names the start weights, --sync_bn and --fused_loss; `precision` is not yet prepared;
    `per_card` are the images of a batch; `factors` `[C]` weigh the confidence loss of each class.
    """
    row_losses = choose_row_losses(args.fused_loss, device, per_card,
                                   len(make_priors(config.at_largest_side())))
    model = build_model(args, config, per_card, processes.world_size, class_names)
    return assemble_learner(config, model, precision, processes, device, factors, row_losses)


def assemble_learner(config: Config, model: Yolact, precision: Precision, processes: Processes,
                     device: torch.device, factors: Optional[Sequence[float]] = None,
                     row_losses: RowLosses = cross_entropy) -> Learner:
    """Move a network to its device and put what trains it around it; see `build_learner`."""
    model = model.to(device).train()
    model.channels_last = prefers_channels_last(device)
    last = batch_norm_parameters(model) if precision.level == "O2" else ()
    optimizer = build_optimizer(config, model, last=last)
    precision.prepare(model, optimizer)
    average = WeightAverage(model, optimizer, config.ema_decay) if config.ema_decay else None
    criterion = MultiBoxLoss.from_config(config, model.maskiou_net, factors, row_losses).to(device)
    return Learner(model, wrap(model, processes, device), criterion, optimizer, precision, average,
                   device)


def build_model(args: argparse.Namespace, config: Config, per_card: int, cards: int,
                class_names: Sequence[str]) -> Yolact:
    """Network with its first weights; batch norm frozen where pretrained and batches small.

    Raises:
        UserError: a backbone is to be frozen that nothing was loaded into.
    """
    model = build_yolact(config)
    report, pretrained = load_start_weights(model, args, config.backbone_weights, class_names)
    if report is not None:
        print(report)
    if config.freeze != NOT_FROZEN:
        if not pretrained:
            raise UserError(f"--freeze={config.freeze} keeps the backbone as it starts, and it "
                            "starts at random; give --backbone_weights or --weights, or train all "
                            "of it")
        freeze_stages(model, config)
    images = per_card * cards if args.sync_bn else per_card
    if pretrained and images < MIN_BATCH_FOR_BN:
        print(f"Batch norm stays frozen: {images} images "
              f"{'on all cards' if args.sync_bn else 'per card'} are fewer than {MIN_BATCH_FOR_BN}")
        model.freeze_bn()
    elif args.sync_bn:
        print(f"Batch norm over all cards: {synchronise_batch_norm(model)} layers")
    return model


def freeze_stages(model: Yolact, config: Config) -> None:
    """Fix what a recipe's `freeze` names."""
    if config.freeze != NOT_FROZEN:
        model.freeze_backbone(None if config.freeze == WHOLE_BACKBONE else int(config.freeze))


def load_start_weights(model: Yolact, args: argparse.Namespace, backbone: str,
                       class_names: Sequence[str]) -> Tuple[Optional[str], bool]:
    """Load what --weights names, or else the backbone's file.

    A run that goes on from a checkpoint loads nothing here, but is as pretrained as it was.

    Returns:
        What was loaded, for the user, or None; and whether the backbone is pretrained.
    """
    pretrained = args.weights is not None or backbone != "none"
    if args.resume is not None or not pretrained:
        return None, pretrained
    if args.weights is not None:
        report = load_for_fine_tuning(model, load_for_inference(args.weights), class_names)
        return f"Weights : {report}", True
    path = backbone if os.path.exists(backbone) else os.path.join(args.save_folder, backbone)
    return f"Backbone : {load_backbone(model.backbone, path)}", True


def choose_row_losses(fused: bool, device: torch.device, images: int, priors: int) -> RowLosses:
    """What computes the confidence loss: PyTorch, or with --fused_loss the Ascend plugin.

    Raises:
        UserError: the plugin's operator does not work here, or not for `images` of `priors` each.
    """
    if not fused:
        return cross_entropy
    problem, advice = "", "leave it out"
    if device.type != "npu":
        problem = f"this device is {device.type}"
    elif images * priors > CROSS_ENTROPY_ROWS:
        problem = (f"it takes {CROSS_ENTROPY_ROWS} rows at most, and {images} x {priors} (images, "
                   f"priors of each) are {images * priors}")
        most = fused_loss_limit(priors)
        if most:
            advice = (f"give --batch_size={most} or less, with --accumulate for as many images a "
                      "step, or leave it out")
    else:
        problem = kernel_problem("cross_entropy", device)
    if problem:
        raise UserError(f"--fused_loss is the Ascend plugin's cross entropy, but {problem}; "
                        f"{advice}")
    return npu_cross_entropy


def fused_loss_limit(priors: int) -> int:
    """Images of a card's batch that --fused_loss allows, where each has so many priors."""
    return CROSS_ENTROPY_ROWS // priors
