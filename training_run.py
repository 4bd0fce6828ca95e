"""What a training run is made of: built from the command line, saved, and resumed.

`train.py` holds the loop; everything here happens before it, or between two of its steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import torch
from torch import nn

from data.coco import CocoDataset
from data.config import Config, get_config
from data.datasets import open_dataset
from data.loader import TrainLoader, build_train_loader
from layers.anchors import make_priors
from layers.multibox_loss import MultiBoxLoss
from layers.sync_batch_norm import convert
from utils import checkpoint
from utils.amp import Precision, batch_norm_parameters, build_precision
from utils.best_score import BestScore
from utils.checkpoint import CheckpointName
from utils.device import pin_memory_supported
from utils.optimizer import FlatOptimizer, build_optimizer
from utils.parallel import Sharing, wrap
from utils.processes import Processes
from utils.schedule import LearningRate
from utils.start_weights import load_start_weights
from utils.step_records import StepRecords
from utils.train_flags import images_per_card
from utils.training_state import check_same_run, pack_state, unpack_state
from utils.weight_formats import read_weights
from utils.weight_loading import load_network
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


def resolve_config(args: argparse.Namespace) -> Config:
    """The recipe with the command line's changes."""
    config = get_config(args.config)
    flags = ("dataset", "pred_scales", "lr", "momentum", "decay", "gamma", "max_iter")
    changes = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    return config.replace(**changes)


def build_model(args: argparse.Namespace, config: Config, per_card: int,
                class_names: Sequence[str]) -> Yolact:
    """Network with its first weights; batch norm frozen where pretrained and batches small."""
    model = build_yolact(config)
    report, pretrained = load_start_weights(model, args, config.backbone_weights, class_names)
    if report is not None:
        print(report)
    if pretrained and per_card < MIN_BATCH_FOR_BN:
        print("Batch norm stays frozen: {} images per card are fewer than {}".format(
            per_card, MIN_BATCH_FOR_BN))
        model.freeze_bn()
    elif args.sync_bn:
        print("Batch norm over all cards: {} layers".format(convert(model)))
    return model


def build_run(args: argparse.Namespace, processes: Processes, device: torch.device) -> Run:
    """Build everything from the command line, in the order in which mistakes are cheapest."""
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
    per_card = images_per_card(args, config.batch_size, processes.world_size)
    sharing = Sharing(processes, device, args.accumulate)
    learning_rate = LearningRate.from_config(
        config, per_card * sharing.shares, autoscale=not args.no_autoscale)
    loader = build_train_loader(
        dataset, config, make_priors(config).numpy(), batch_size=per_card,
        num_workers=args.num_workers, seed=args.seed, rank=processes.rank,
        world_size=processes.world_size, pin_memory=pin_memory_supported(device),
        pack_masks=device.type != "cpu", parts=sharing.parts)
    model = build_model(args, config, per_card, dataset.class_names).to(device)
    optimizer = build_optimizer(
        config, model, last=batch_norm_parameters(model) if precision.level == "O2" else ())
    precision.prepare(model, optimizer)
    records = StepRecords(precision.scale_floor, sharing.on_any_card)
    network = wrap(model, processes, device)
    return Run(args, config, processes, sharing, device, model, network,
               MultiBoxLoss.from_config(config, model.maskiou_net), optimizer, learning_rate,
               loader, dataset, validation_set, records, BestScore(), precision)


def identity_of(run: Run) -> Dict[str, Any]:
    """What makes two runs the same training; a resumed run has to agree with all of it."""
    return {
        "config": run.config.to_dict(),
        "class_names": run.dataset.class_names,
        "category_ids": [category.id for category in run.dataset.categories],
        "num_images": len(run.dataset),
        "global_batch": run.loader.batch_size * run.sharing.shares,
        "learning_rate": run.learning_rate.state_dict(),
        "seed": run.args.seed,
        "bn_frozen": run.model.bn_frozen,
        "precision": run.precision.name,
    }


def weights_of(run: Run) -> Dict[str, torch.Tensor]:
    """The weights that are saved, scored and handed on, under their names in the network."""
    with run.precision.float32_weights(run.model):
        return run.model.state_dict()


def save(run: Run, done: int, interrupt: bool = False) -> Optional[str]:
    """Write the checkpoint of iteration `done`; only the main process does. Returns its path."""
    if not run.processes.is_main or run.args.train_performance:
        return None
    folder = run.args.save_folder
    older = checkpoint.list_checkpoints(folder, run.config.name)
    name = CheckpointName(run.config.name, done // run.loader.epoch_size, done, interrupt)
    state = pack_state(identity_of(run), done, run.loader.epoch_size, run.optimizer, run.records,
                       run.best, run.precision)
    path = checkpoint.save_checkpoint(name, folder, weights_of(run), state)
    print("Saved weights : {}".format(path), flush=True)
    for old in older:
        parsed = CheckpointName.parse(old)
        assert parsed is not None
        replaced = parsed.interrupt if interrupt else (
            run.args.keep_latest and parsed.iteration % run.args.keep_latest_interval != 0)
        if replaced and old != path:
            checkpoint.remove_checkpoint(old)
    return path


def resume(run: Run, weights_path: str) -> int:
    """Load a checkpoint into `run`; returns the iteration to go on from.

    With the full state beside the weights the run goes on exactly. Weights alone (the original's
    files, for one) start a fresh optimiser at --start_iter or at the iteration in the name.
    """
    with run.precision.float32_weights(run.model):
        print("Weights : {}".format(load_network(run.model, read_weights(weights_path))))
    state = checkpoint.load_state(weights_path)
    if state is None:
        named = CheckpointName.parse(weights_path)
        start = run.args.start_iter if run.args.start_iter >= 0 else (
            named.iteration if named else 0)
        print("Resumed weights only : {} (no {}); the optimiser starts afresh at iteration {}"
              .format(weights_path, checkpoint.state_path(weights_path), start))
        return start
    check_same_run(identity_of(run), state, weights_path)
    start = unpack_state(state, run.optimizer, run.records, run.best, run.precision, run.device)
    print("Resumed : {} at iteration {}".format(weights_path, start))
    return start
