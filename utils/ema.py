"""Exponential moving average of the weights: what is scored and saved, while the raw ones train.

Polyak and Juditsky's averaging in the exponential form that detection trainers use; the decay
starts at 0 and approaches its final value as 1 - exp(-steps / RAMP), so that short trainings and
the first steps are not held back by their random start.
"""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator, List, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed.processes import Processes
from utils.errors import UserError
from utils.optimizer import FlatOptimizer

RAMP = 2000
"""Applied steps after which the decay has reached 63 % of its final value."""

STATISTICS = ("running_mean", "running_var")


class WeightAverage:
    """Average of the trained parameters and of batch norm's running statistics, on the device.

    An update is a dozen operators for the whole network and asks the device for nothing. A step
    that was not applied changes nothing. How many were applied is the optimiser's count, so there
    is no other state than the average itself.

    Args:
        model: the network in training mode; statistics of frozen batch norm are left alone.
        optimizer: of its parameters.
        decay: final decay, in (0, 1).
    """

    def __init__(self, model: nn.Module, optimizer: FlatOptimizer, decay: float) -> None:
        self._model = model
        self._optimizer = optimizer
        self._decay = decay
        self._flat = optimizer.flat.clone()
        self._buffers: List[Tensor] = []
        self._views: Dict[str, Tensor] = {}
        self._name_parameters()
        self._statistics = self._name_statistics()

    def update(self) -> None:
        """Take in the weights after a step of the optimiser."""
        with torch.no_grad():
            ramp = torch.expm1(self._optimizer.steps.float() * (-1.0 / RAMP))
            share = (ramp * self._decay + 1.0) * self._optimizer.applied
            kept = 1.0 - share
            # In place and without a temporary, from operators that the optimisers use as well.
            self._flat.mul_(kept).addcmul_(self._optimizer.flat, share)
            if self._buffers:
                # Statistics of a step that was not applied may be NaN, also times 0.
                found = torch.where(self._optimizer.step_finite, torch.cat(self._buffers),
                                    self._statistics)
                self._statistics.mul_(kept).addcmul_(found, share)

    def apply_to(self, state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
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
        names: List[str] = []
        for prefix, module in self._model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                names += [f"{prefix}.{name}" for name in STATISTICS]
        buffers = dict(self._model.named_buffers())
        self._buffers = [buffers[name] for name in names]
        if not names:
            return self._flat[:0]
        flat, start = torch.cat(self._buffers), 0
        for name, buffer in zip(names, self._buffers):
            self._views[name] = flat[start:start + buffer.numel()]
            start += buffer.numel()
        return flat
