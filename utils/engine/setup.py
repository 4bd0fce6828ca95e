"""What a training is made of, built from the command line before the first step."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Callable, Sequence

import torch

from data.classes import class_factors, match_categories
from data.coco import CocoDataset
from data.config import Config
from data.datasets import find_dataset, open_dataset, refuse_empty
from data.loader import TrainDataset, TrainLoader
from layers.anchors import make_priors
from layers.deform_conv import convolve_recordably
from layers.detection import Detect
from utils.amp import build_precision
from utils.cli import print_lines
from utils.device import pin_memory_supported
from utils.device_graph import GraphedStep, prepare_graphs
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing, broadcast_from_main
from utils.engine.batch_size import TrainStep, automatic_batch
from utils.engine.learner import Learner, build_learner
from utils.engine.observer import StepRecords
from utils.engine.saving import BestScore, SavePlan, Saver
from utils.engine.train_flags import AUTO, images_per_card
from utils.errors import UserError
from utils.inference.detector import Detector
from utils.inference.evaluation import Evaluation, choose_images
from utils.schedule import LearningRate

VALIDATION_SHARE = 0.1
"""Part of a training's time that validations take at most where no interval is asked for."""


@dataclass(frozen=True)
class Validation:
    """Scoring the network on validation images while it trains."""

    evaluation: Evaluation
    detector: Detector
    interval: int
    """Iterations between two validations."""
    at_end: bool = False
    """Another one follows the last iteration."""


@dataclass(frozen=True)
class Training:
    """A training that is ready for its first step."""

    config: Config
    learner: Learner
    sharing: Sharing
    schedule: LearningRate
    dataset: CocoDataset
    loader: TrainLoader
    validation: Validation | None
    """None where this run does not validate."""
    records: StepRecords
    best: BestScore
    saver: Saver
    not_validated: str = "--validation_epoch=1 for every epoch"
    """Why there is no validation, or how to have one."""
    device_graph: bool = False
    """Steps are recorded on the device and replayed."""

    @property
    def processes(self) -> Processes:
        """All of the run."""
        return self.sharing.processes

    @property
    def images_per_step(self) -> int:
        """Of all cards."""
        return self.loader.batch_size * self.sharing.shares

    def recorded(self, step: Callable[..., None]) -> tuple[Callable[..., None], int]:
        """`step`, recorded on the device and replayed where this run asks for it, and how many
        places of batches it then needs of `data.loader.prefetch`.
        """
        if not self.device_graph:
            return step, 0
        graphed = GraphedStep(step, self.learner.device, self.processes.world_size > 1)
        return graphed, self.sharing.micro_batches

    def nothing_improves(self) -> bool:
        """Whether as many validations as --early_stopping found nothing better; main process."""
        return 0 < self.config.early_stopping <= self.best.since


def build_training(args: argparse.Namespace, processes: Processes, device: torch.device,
                   step: TrainStep, launch: str, resumed: str | None = None) -> Training:
    """Build everything from the command line, in the order in which mistakes are cheapest.

    `step` is one update, which --batch_size=auto tries; `launch` comes from `launch_id`; `resumed`
    is the checkpoint that `Saver.resume` will be called with, if any.
    """
    config: Config = args.recipe
    if args.device_graph:
        prepare_graphs(device)
    precision = build_precision(args.opt_level, args.loss_scale, args.amp_dtype, device)
    dataset = open_dataset(config.dataset, args.data, args.train_images, args.train_info, "train")
    dataset.check_images_exist()
    config = config.replace(num_classes=len(dataset.categories) + 1)
    evaluation, absent = build_evaluation(args, config, dataset.class_names, processes, device)
    factors: Sequence[float] | None = None
    if config.class_weights:
        factors = class_factors(config.class_weights, dataset.class_names,
                                list(dataset.report.objects_per_category.values()))
    per_card = (automatic_batch(args, config, dataset, processes, device, step, resumed)
                if args.batch_size == AUTO and args.batch_alloc is None
                else images_per_card(args, config.batch_size, processes.world_size))
    sharing = Sharing(processes, device, args.accumulate)
    samples = TrainDataset.from_config(
        dataset, config, lambda recipe: make_priors(recipe).numpy(), args.seed)
    loader = TrainLoader(
        samples, per_card, args.num_workers, rank=processes.rank, world_size=processes.world_size,
        pin_memory=pin_memory_supported(device), pack_masks=device.type != "cpu",
        parts=args.accumulate)
    schedule = LearningRate.from_config(config, per_card * sharing.shares, not args.no_autoscale,
                                        loader.epoch_size)
    learner = build_learner(args, config, precision, processes, device, per_card,
                            dataset.class_names, factors)
    if args.device_graph and device.type == "npu":
        convolve_recordably(learner.model)
    validation = None
    if evaluation is not None:
        # As many images at a time as the card has memory to train with: more than enough to score.
        evaluation = dataclasses.replace(evaluation, batch_size=per_card)
        detector = Detector(learner.model, Detect.from_config(config), device)
        validation, absent = plan_validation(
            args, evaluation, detector, loader.epoch_size, schedule.max_iter,
            per_card * sharing.shares)
    if config.early_stopping and validation is None:
        raise UserError(f"--early_stopping={config.early_stopping} counts validations, and there "
                        f"are none: {absent}")
    records, best = StepRecords(precision.scale_floor, sharing.on_any_card), BestScore()
    plan = SavePlan(config.name, args.save_folder, args.save_interval,
                    args.keep_latest_interval if args.keep_latest else None,
                    not args.train_performance, not args.no_interrupt)
    saver = Saver(learner, plan, records, best,
                  identity_of(args, config, dataset, learner, schedule, per_card * sharing.shares),
                  loader.epoch_size, launch, processes.is_main)
    return Training(config, learner, sharing, schedule, dataset, loader, validation, records, best,
                    saver, absent or Training.not_validated, args.device_graph)


def build_evaluation(args: argparse.Namespace, config: Config, class_names: Sequence[str],
                     processes: Processes, device: torch.device) -> tuple[Evaluation | None, str]:
    """What a validation scores, or None and why there is none, if not by --validation_epoch.

    The data is read now, so that a mistake shows before hours of training.
    """
    asked = args.validation_epoch
    if asked is not None and asked < 1:
        return None, ""
    if asked is None:
        absent = absent_validation(args, config)
        if broadcast_from_main(bool(absent), processes, device):  # hosts may see different disks
            return None, absent
    try:
        dataset = open_dataset(config.dataset, args.data, args.valid_images, args.valid_info,
                               "val")
        indices = choose_images(len(dataset), args.validation_size)
        refuse_empty(dataset, indices)
        dataset.check_images_exist(indices)
        ids, notes = match_categories(class_names, len(class_names), dataset.categories,
                                      "the training data", dataset.annotation_file,
                                      args.map_classes)
    except UserError as error:
        if asked is not None:
            raise
        raise UserError(f"{error}; --validation_epoch=-1 trains without validation") from error
    if processes.is_main:
        print_lines(notes)
    return Evaluation(dataset, ids, indices, num_workers=args.num_workers, processes=processes,
                      loader_timeout=args.loader_timeout), ""


def absent_validation(args: argparse.Namespace, config: Config) -> str:
    """Why this run validates nothing where it is not asked to; empty if there is a set for it."""
    if args.train_performance:
        return "--train_performance measures speed alone"
    if args.valid_images is not None or args.valid_info is not None:
        return ""
    if args.data is None:
        return "no validation set: --valid_images and --valid_info name one"
    try:
        find_dataset(config.dataset, args.data, None, None, "val")
    except UserError as error:
        return f"no validation set: {error}"
    return ""


def plan_validation(args: argparse.Namespace, evaluation: Evaluation, detector: Detector,
                    epoch_size: int, max_iter: int, images_per_step: int
                    ) -> tuple[Validation | None, str]:
    """When to validate; or None, and why not.

    What is not asked for follows from numbers of images alone, so that a resumed run validates
    after the same iterations: as many epochs apart as keep validations to `VALIDATION_SHARE` of
    the time, and at the end, unless that takes longer than the whole training. A validation image
    counts as one of training: a forward pass, then masks and run lengths; for the smallest network
    that was measured at 0.8 of one.
    """
    if args.validation_epoch is not None:
        return Validation(evaluation, detector, epoch_size * args.validation_epoch), ""
    cost = len(evaluation.indices) / images_per_step  # in iterations
    if cost > max_iter:
        return None, (f"one of {len(evaluation.indices)} images would take longer than this "
                      "training; --validation_epoch and --validation_size set when and how many")
    epochs = max(1, math.ceil(cost / (VALIDATION_SHARE * epoch_size)))
    return Validation(evaluation, detector, epoch_size * epochs, at_end=True), ""


def identity_of(args: argparse.Namespace, config: Config, dataset: CocoDataset, learner: Learner,
                schedule: LearningRate, global_batch: int) -> dict:
    """What makes two runs the same training; a resumed run has to agree with all of it."""
    return {
        "config": config.to_dict(),
        "class_names": dataset.class_names,
        "category_ids": [category.id for category in dataset.categories],
        "num_images": len(dataset),
        "annotations": dataset.annotations.checksum,
        "global_batch": global_batch,
        "learning_rate": schedule.state_dict(),
        "seed": args.seed,
        "bn_frozen": learner.model.bn_frozen,
        "sync_bn": args.sync_bn,
        "precision": learner.precision.name,
    }
