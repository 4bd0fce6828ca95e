"""SGD by a fused optimiser of a device's plugin, behind the interface of the flat optimisers."""

from __future__ import annotations

from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from utils.optimizer import FlatSGD, Groups


class FusedSGD(FlatSGD):
    """`FlatSGD` whose update is made by another optimiser's kernels, with the same result.

    The plugin's optimiser moves every parameter, gradient and momentum into buffers of its own,
    by the size of the storage that each lies in, and keeps the gradients' place for good. Given the
    network's parameters it would therefore break the flat buffer, refuse gradients that are None,
    and take DistributedDataParallel's buckets for its own. Here it gets one parameter, the flat
    buffer, with one gradient that the network's are copied to; the views follow the storage.

    It has no guard. Whether an update may be applied is read by the host, once in each step, which
    is why this is not the default.

    Args:
        groups: see `FlatOptimizer`; one weight decay for all.
        kernel: makes the optimiser from parameters, `lr`, `momentum` and `weight_decay`, such as
            `layers.fused_ops.npu_fused_sgd` and `library_fused_sgd`.
        momentum, weight_decay, clip_norm: see `FlatOptimizer`.
    """

    def __init__(self, groups: Groups, kernel: Callable[..., Any], momentum: float = 0.9,
                 weight_decay: float = 0.0, clip_norm: float = 0.0) -> None:
        super().__init__(groups, momentum, weight_decay, clip_norm)
        if any(decay != weight_decay for _, decay in self._decayed):
            raise ValueError("a fused optimiser has one weight decay for all parameters")
        self._whole = nn.Parameter(self._flat)
        self._whole.grad = torch.zeros_like(self._flat)
        self.kernel = kernel([self._whole], lr=0.0, momentum=momentum, weight_decay=weight_decay)
        self._share_momentum()

    def _update(self, grad: Tensor, lr: float) -> None:
        if not bool(self.step_finite):
            return
        assert self._whole.grad is not None
        self._whole.grad.copy_(grad)
        self.kernel.param_groups[0]["lr"] = lr
        self.kernel.step()
        # The first step has moved both to buffers of the kernel's.
        self._addresses = [p.data_ptr() for p in self.parameters]
        self._buffers["momentum"] = self.kernel.state[self._whole]["momentum_buffer"]

    def restart_kernel(self) -> None:
        """Call after a library has replaced the methods and the state of `kernel`.

        The library that casts makes its state at the first `zero_grad`, without which there is no
        first step, and drops the gradient and copies the momentum there.
        """
        self.kernel.zero_grad()
        self._whole.grad = torch.zeros_like(self._flat)
        self._share_momentum()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        super().load_state_dict(state)
        self._share_momentum()

    def _share_momentum(self) -> None:
        self.kernel.state[self._whole]["momentum_buffer"] = self._buffers["momentum"]
