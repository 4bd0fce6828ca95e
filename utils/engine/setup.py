"""What a training run is made of, built from the command line before the first step."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import nn

from data.classes import class_factors
from data.coco import CocoDataset
from data.config import NOT_FROZEN, WHOLE_BACKBONE, Config, get_config
from data.datasets import open_dataset
from data.loader import TrainLoader, build_train_loader
from data.targets import ground_truth_slots
from data.tools.statistics import measure
from layers.anchors import make_priors
from layers.fused_ops import (
    CROSS_ENTROPY_ROWS,
    npu_cross_entropy,
    npu_cross_entropy_problem,
)
from layers.multibox_loss import MultiBoxLoss
from layers.ohem import cross_entropy
from layers.sync_batch_norm import convert
from utils.amp import Precision, batch_norm_parameters, build_precision
from utils.checkpoint import load_for_inference
from utils.device import pin_memory_supported
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing, wrap
from utils.ema import WeightAverage
from utils.engine.batch_size import TrainStep, Trial, choose_batch_size, resumed_batch_size
from utils.engine.records import BestScore, StepRecords
from utils.engine.train_flags import AUTO, images_per_card
from utils.errors import UserError
from utils.optimizer import FlatOptimizer, build_optimizer
from utils.run_folder import RunFolder
from utils.schedule import LearningRate
from utils.weights.loading import load_backbone, load_for_fine_tuning
from yolact import Yolact, build_yolact


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
        problem = f"this device is {device.type}"
    elif images * priors > CROSS_ENTROPY_ROWS:
        problem = (f"it takes {CROSS_ENTROPY_ROWS} rows at most, and {images} x {priors} (images, "
                   f"priors of each) are {images * priors}")
        most = fused_loss_limit(priors)
        if most:
            advice = (f"give --batch_size={most} or less, with --accumulate for as many images a "
                      "step, or leave it out")
    else:
        problem = npu_cross_entropy_problem(device)
    if problem:
        raise UserError(f"--fused_loss is the Ascend plugin's cross entropy, but {problem}; "
                        f"{advice}")
    return npu_cross_entropy


def fused_loss_limit(priors: int) -> int:
    """Images of a card's batch that --fused_loss allows, where each has so many priors."""
    return CROSS_ENTROPY_ROWS // priors


def load_start_weights(model: Any, args: argparse.Namespace, configured_backbone: str,
                       class_names: Sequence[str]) -> Tuple[Optional[str], bool]:
    """Load what `--weights` or else `--backbone_weights` names.

    A run that goes on from a checkpoint loads nothing here, but is as pretrained as it was.

    Args:
        model: newly built network; its `backbone` is loaded alone where `--weights` is not given.
        args: the command line.
        configured_backbone: the recipe's backbone file, or "none".
        class_names: of the training data.

    Returns:
        What was loaded, for the user, or None; and whether the backbone is pretrained.
    """
    backbone = args.backbone_weights or configured_backbone
    pretrained = args.weights is not None or backbone != "none"
    if args.resume is not None or not pretrained:
        return None, pretrained
    if args.weights is not None:
        stored = load_for_inference(args.weights)
        report = load_for_fine_tuning(model, stored.weights, len(class_names), class_names,
                                      stored.class_names)
        return f"Weights : {report}", True
    path = backbone if os.path.exists(backbone) else os.path.join(args.save_folder, backbone)
    return f"Backbone : {load_backbone(model.backbone, path)}", True


MIN_BATCH_FOR_BN = 6
"""Images per card below which pretrained batch-norm statistics stay frozen, as in the original."""


@dataclass
class Run:
    """Everything the loop works with."""

    args: argparse.Namespace
    config: Config
    processes: Processes
    sharing: Sharing
    device: torch.device
    model: Yolact
    network: nn.Module
    """`model`, wrapped for several processes."""
    criterion: MultiBoxLoss
    optimizer: FlatOptimizer
    learning_rate: LearningRate
    loader: TrainLoader
    dataset: CocoDataset
    validation_set: Optional[CocoDataset]
    """None where this run does not validate."""
    records: StepRecords
    best: BestScore
    precision: Precision
    average: Optional[WeightAverage]
    """None where the raw weights are scored and saved."""
    folder: Optional[RunFolder] = None
    """None in all processes but the main one, and where none is written."""
    folder_before: Optional[Dict[str, Any]] = None
    """`RunFolder.origin` of the run that is resumed."""

    def nothing_improves(self) -> bool:
        """Whether as many validations as --early_stopping found nothing better; main process."""
        return 0 < self.config.early_stopping <= self.best.since


def resolve_config(args: argparse.Namespace) -> Config:
    """The recipe with the command line's changes."""
    stored = args.stored_config
    config = get_config(args.config) if stored is None else Config.from_dict(stored)
    flags = ("dataset", "pred_scales", "lr", "momentum", "decay", "gamma", "max_iter", "ema_decay",
             "schedule", "clip_grad_norm", "early_stopping", "freeze", "class_weights",
             "multi_scale", "multi_scale_interval")
    changes = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    config = config.replace(**changes)
    if config.early_stopping and args.validation_epoch < 1:
        raise UserError(f"--early_stopping={config.early_stopping} counts validations, and there "
                        "are none; give --validation_epoch=1 to validate after every epoch")
    return config


def build_model(args: argparse.Namespace, config: Config, per_card: int,
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
        model.freeze_backbone(None if config.freeze == WHOLE_BACKBONE else int(config.freeze))
    if pretrained and per_card < MIN_BATCH_FOR_BN:
        print(f"Batch norm stays frozen: {per_card} images per card are fewer than "
              f"{MIN_BATCH_FOR_BN}")
        model.freeze_bn()
    elif args.sync_bn:
        print(f"Batch norm over all cards: {convert(model)} layers")
    return model


def automatic_batch(args: argparse.Namespace, config: Config, dataset: CocoDataset,
                    processes: Processes, device: torch.device, step: TrainStep,
                    resumed: Optional[str]) -> int:
    """Images per card for --batch_size=auto; a resumed training keeps what it had."""
    choice = None
    if resumed is not None:
        choice = resumed_batch_size(resumed, processes.world_size * args.accumulate)
    if choice is None:
        copies = int(processes.world_size > 1) + int(config.ema_decay > 0)
        trial = Trial(config.at_largest_side(), ground_truth_slots(dataset.max_objects),
                      (args.opt_level, args.loss_scale, args.amp_dtype), copies)
        limits = {}
        if args.fused_loss:
            limits["what the fused loss takes"] = fused_loss_limit(
                len(make_priors(config.at_largest_side())))
        choice = choose_batch_size(trial, device, processes, args.accumulate, len(dataset),
                                   step, args.num_workers, more_limits=limits)
    if processes.is_main:
        print(f"Batch size auto : {choice.sentence}", flush=True)
    return choice.batch_size


def build_run(args: argparse.Namespace, processes: Processes, device: torch.device,
              step: TrainStep, resumed: Optional[str] = None) -> Run:
    """Build everything from the command line, in the order in which mistakes are cheapest.

    `step` is `train.train_step`, for the trial steps of --batch_size=auto; `resumed` is the
    checkpoint that `resume` will be called with, if any.
    """
    config = resolve_config(args)
    precision = build_precision(args.opt_level, args.loss_scale, args.amp_dtype, device)
    dataset = open_dataset(config.dataset, args.data, args.train_images, args.train_info, "train",
                           strict=args.strict)
    dataset.check_images_exist()
    validation_set = None
    if args.validation_epoch > 0:  # read now, so that a mistake shows before hours of training
        validation_set = open_dataset(config.dataset, args.data, args.valid_images,
                                      args.valid_info, "val")
        validation_set.check_images_exist()
    config = config.replace(num_classes=len(dataset.categories) + 1)
    factors = None
    if config.class_weights:
        factors = class_factors(config.class_weights, dataset.class_names,
                                measure("train", dataset).objects_per_class.tolist())
    per_card = (automatic_batch(args, config, dataset, processes, device, step, resumed)
                if args.batch_size == AUTO and args.batch_alloc is None
                else images_per_card(args, config.batch_size, processes.world_size))
    row_losses = choose_row_losses(args.fused_loss, device, per_card,
                                   len(make_priors(config.at_largest_side())))
    sharing = Sharing(processes, device, args.accumulate)
    learning_rate = LearningRate.from_config(
        config, per_card * sharing.shares, autoscale=not args.no_autoscale)
    loader = build_train_loader(
        dataset, config, make_priors(config).numpy(), batch_size=per_card,
        num_workers=args.num_workers, seed=args.seed, rank=processes.rank,
        world_size=processes.world_size, pin_memory=pin_memory_supported(device),
        pack_masks=device.type != "cpu", parts=sharing.micro_batches,
        priors_of_sides={side: make_priors(config.at_side(side)).numpy()
                         for side in config.multi_scale})
    model = build_model(args, config, per_card, dataset.class_names).to(device)
    optimizer = build_optimizer(
        config, model, last=batch_norm_parameters(model) if precision.level == "O2" else ())
    precision.prepare(model, optimizer)
    records = StepRecords(precision.scale_floor, sharing.on_any_card)
    average = WeightAverage(model, optimizer, config.ema_decay) if config.ema_decay else None
    network = wrap(model, processes, device)
    criterion = MultiBoxLoss.from_config(config, model.maskiou_net, factors,
                                         row_losses).to(device)
    return Run(args, config, processes, sharing, device, model, network, criterion, optimizer,
               learning_rate, loader, dataset, validation_set, records, BestScore(), precision,
               average)
