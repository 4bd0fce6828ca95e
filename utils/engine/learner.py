"""The network and what trains it: its first weights, its loss, its optimiser, their average."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import dataclass
from typing import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
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
from utils.errors import UserError
from utils.optimizer import FlatOptimizer, build_optimizer
from utils.weights.loading import load_backbone, load_for_fine_tuning
from yolact import Yolact, build_yolact

MIN_BATCH_FOR_BN = 6
"""Images below which pretrained batch-norm statistics stay frozen, as in the original."""

AVERAGE_RAMP = 2000
"""Applied steps after which the decay of an average has reached 63 % of its final value."""

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Learner:
    """A network on its device with everything that a step changes it by."""

    model: Yolact
    network: nn.Module
    """`model`, wrapped for several processes."""
    criterion: MultiBoxLoss
    optimizer: FlatOptimizer
    precision: Precision
    average: WeightAverage | None
    """None where the raw weights are scored and saved."""
    device: torch.device

    def raw_weights(self) -> dict[str, Tensor]:
        """The float32 weights that the next step starts from, by their names in the network."""
        with self.precision.float32_weights(self.model):
            return self.model.state_dict()

    def weights(self) -> dict[str, Tensor]:
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
                  class_names: Sequence[str], factors: Sequence[float] | None) -> Learner:
    """Build and load the network, then what trains it.

    `args` names the start weights, --sync_bn and --fused_loss; `precision` is not yet prepared;
    `per_card` are the images of a batch; `factors` `[C]` weigh the confidence loss of each class.
    """
    row_losses = choose_row_losses(args.fused_loss, device, per_card,
                                   len(make_priors(config.at_largest_side())))
    model = build_model(args, config, per_card, processes.world_size, class_names)
    return assemble_learner(config, model, precision, processes, device, factors, row_losses)


def assemble_learner(config: Config, model: Yolact, precision: Precision, processes: Processes,
                     device: torch.device, factors: Sequence[float] | None = None,
                     row_losses: RowLosses = cross_entropy) -> Learner:
    """Move a network to its device and put what trains it around it; see `build_learner`."""
    model = model.to(device).train()
    if prefers_channels_last(device):
        model.use_channels_last()
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
                       class_names: Sequence[str]) -> tuple[str | None, bool]:
    """Load what --weights names, or else the backbone's file; returns what was loaded, for the
    user, or None, and whether the backbone is pretrained.

    A run that goes on from a checkpoint loads nothing here, but is as pretrained as it was.
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
        most = CROSS_ENTROPY_ROWS // priors
        if most:
            advice = (f"give --batch_size={most} or less, with --accumulate for as many images a "
                      "step, or leave it out")
    else:
        problem = kernel_problem("cross_entropy", device)
    if problem:
        raise UserError(f"--fused_loss is the Ascend plugin's cross entropy, but {problem}; "
                        f"{advice}")
    return npu_cross_entropy


class WeightAverage:
    """Exponential moving average of the trained parameters and of batch norm's running statistics,
    on the device: what is scored and saved, while the raw weights train.

    Polyak and Juditsky's averaging in the exponential form that detection trainers use; the decay
    starts at 0 and approaches its final value as 1 - exp(-steps / AVERAGE_RAMP), so that short
    trainings and the first steps are not held back by their random start.

    An update is a dozen operators for the whole network and asks the device for nothing. A step
    that was not applied changes nothing. How many were applied is the optimiser's count, so there
    is no other state than the average itself. Statistics of frozen batch norm are left alone.
    """

    def __init__(self, model: nn.Module, optimizer: FlatOptimizer, decay: float) -> None:
        self._model = model
        self._optimizer = optimizer
        self._decay = decay
        self._flat = optimizer.flat.clone()
        self._buffers: list[Tensor] = []
        self._views: dict[str, Tensor] = {}
        self._name_parameters()
        self._statistics = self._name_statistics()

    def update(self) -> None:
        """Take in the weights after a step of the optimiser."""
        with torch.no_grad():
            ramp = torch.expm1(self._optimizer.steps.float() * (-1.0 / AVERAGE_RAMP))
            share = (ramp * self._decay + 1.0) * self._optimizer.applied
            kept = 1.0 - share
            # In place and without a temporary, from operators that the optimisers use as well.
            self._flat.mul_(kept).addcmul_(self._optimizer.flat, share)
            if self._buffers:
                # Statistics of a step that was not applied may be NaN, also times 0.
                found = torch.where(self._optimizer.step_finite, torch.cat(self._buffers),
                                    self._statistics)
                self._statistics.mul_(kept).addcmul_(found, share)

    def apply_to(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` with the averages in place of what they are averages of."""
        return {name: self._views.get(name, value) for name, value in state_dict.items()}

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside the block the network has the averages for its weights, to be scored."""
        raw = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self.apply_to(raw))
        try:
            yield
        finally:
            self._model.load_state_dict(raw)

    def share(self, processes: Processes) -> None:
        """Give every process the main one's average of statistics, which are those saved."""
        if processes.world_size > 1 and self._buffers:
            dist.broadcast(self._statistics, 0)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the averages from a saved network.

        Raises:
            UserError: a tensor is missing or of another shape.
        """
        for name, view in self._views.items():
            if name not in tensors or tensors[name].shape != view.shape:
                raise UserError(f"the weights to resume from have no average of '{name}'; the file "
                                "is damaged or belongs to another network")
        for name, view in self._views.items():
            view.copy_(tensors[name])

    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        with torch.no_grad():
            self._flat.copy_(self._optimizer.flat)
            if self._buffers:
                self._statistics.copy_(torch.cat(self._buffers))

    def _name_parameters(self) -> None:
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for parameter, master in self._optimizer.master_weights():
            start = master.storage_offset() - self._optimizer.flat.storage_offset()
            self._views[names[id(parameter)]] = (
                self._flat[start:start + master.numel()].view(master.shape))

    def _name_statistics(self) -> Tensor:
        """The flat average of the running statistics, with its parts among the views."""
        names: list[str] = []
        for prefix, module in self._model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                names += [f"{prefix}.{name}" for name in _STATISTICS]
        buffers = dict(self._model.named_buffers())
        self._buffers = [buffers[name] for name in names]
        if not names:
            return self._flat[:0]
        flat, start = torch.cat(self._buffers), 0
        for name, buffer in zip(names, self._buffers):
            self._views[name] = flat[start:start + buffer.numel()]
            start += buffer.numel()
        return flat
