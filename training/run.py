"""What a training run is made of, built from the command line before the first step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import torch
from torch import nn

from data.checks.statistics import measure
from data.class_weights import class_factors
from data.coco import CocoDataset
from data.config import NOT_FROZEN, WHOLE_BACKBONE, Config, get_config
from data.datasets import open_dataset
from data.loader import TrainLoader, build_train_loader
from data.targets import ground_truth_slots
from layers.anchors import make_priors
from layers.multibox_loss import MultiBoxLoss
from layers.sync_batch_norm import convert
from training.batch_size import choose_batch_size, resumed_batch_size
from training.best_score import BestScore
from training.kernels import choose_row_losses, choose_sgd, fused_loss_limit
from training.memory import Trial, estimate
from training.start_weights import load_start_weights
from training.step_records import StepRecords
from utils.amp import Precision, batch_norm_parameters, build_precision
from utils.device import pin_memory_supported
from utils.distributed.parallel import Sharing, wrap
from utils.distributed.processes import Processes
from utils.ema import WeightAverage
from utils.errors import UserError
from utils.optimizer import FlatOptimizer, build_optimizer
from utils.out_of_memory import Demand
from utils.run_folder import RunFolder
from utils.schedule import LearningRate
from utils.train_flags import AUTO, images_per_card
from yolact import Yolact, build_yolact

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
        raise UserError("--early_stopping={} counts validations, and there are none; give "
                        "--validation_epoch=1 to validate after every epoch".format(
                            config.early_stopping))
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
            raise UserError("--freeze={} keeps the backbone as it starts, and it starts at random; "
                            "give --backbone_weights or --weights, or train all of it".format(
                                config.freeze))
        model.freeze_backbone(None if config.freeze == WHOLE_BACKBONE else int(config.freeze))
    if pretrained and per_card < MIN_BATCH_FOR_BN:
        print("Batch norm stays frozen: {} images per card are fewer than {}".format(
            per_card, MIN_BATCH_FOR_BN))
        model.freeze_bn()
    elif args.sync_bn:
        print("Batch norm over all cards: {} layers".format(convert(model)))
    return model


def automatic_batch(args: argparse.Namespace, config: Config, dataset: CocoDataset,
                    processes: Processes, device: torch.device, resumed: Optional[str]) -> int:
    """Images per card for --batch_size=auto; a resumed training keeps what it had."""
    choice = None
    if resumed is not None:
        choice = resumed_batch_size(resumed, processes.world_size * args.accumulate)
    if choice is None:
        copies = int(processes.world_size > 1) + int(config.ema_decay > 0)
        trial = Trial(config.at_largest_side().to_dict(), ground_truth_slots(dataset.max_objects),
                      (args.opt_level, args.loss_scale, args.amp_dtype), copies)
        limits = {}
        if args.fused_loss:
            limits["what the fused loss takes"] = fused_loss_limit(
                len(make_priors(config.at_largest_side())))
        choice = choose_batch_size(trial, device, processes, args.accumulate, len(dataset),
                                   args.num_workers, more_limits=limits)
    if processes.is_main:
        print("Batch size auto : {}".format(choice.sentence), flush=True)
    return choice.batch_size


def build_run(args: argparse.Namespace, processes: Processes, device: torch.device,
              resumed: Optional[str] = None) -> Run:
    """Build everything from the command line, in the order in which mistakes are cheapest.

    `resumed` is the checkpoint that `resume` will be called with, if any.
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
    per_card = (automatic_batch(args, config, dataset, processes, device, resumed)
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
        pack_masks=device.type != "cpu", parts=sharing.parts,
        priors_of_sides={side: make_priors(config.at_side(side)).numpy()
                         for side in config.multi_scale})
    model = build_model(args, config, per_card, dataset.class_names).to(device)
    optimizer = build_optimizer(
        config, model, last=batch_norm_parameters(model) if precision.level == "O2" else (),
        sgd=choose_sgd(args.fused_optimizer, config.optimizer, device, precision.level))
    precision.prepare(model, optimizer)
    records = StepRecords(precision.scale_floor, sharing.on_any_card)
    average = WeightAverage(model, optimizer, config.ema_decay) if config.ema_decay else None
    network = wrap(model, processes, device)
    criterion = MultiBoxLoss.from_config(config, model.maskiou_net, factors,
                                         row_losses).to(device)
    return Run(args, config, processes, sharing, device, model, network, criterion, optimizer,
               learning_rate, loader, dataset, validation_set, records, BestScore(), precision,
               average)


def demand_of(run: Run) -> Demand:
    """What a step of this training asks of a card's memory, for when that runs out."""
    return Demand(run.loader.batch_size,
                  lambda: estimate(run.config.at_largest_side(), run.model, run.optimizer,
                                   run.precision.level),
                  run.sharing.parts)
