"""Optimisers whose parameters live in one flat buffer, guarded against non-finite gradients.

A step is a dozen operators for the network, whatever its number of tensors, and reads nothing
back to the host: whether the update may be applied is decided on the device. On a CPU, where memory
is what costs, PyTorch's own kernels update each tensor in one pass.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError

if TYPE_CHECKING:
    from data.config import Config

LARGEST_NORM = 1e18
"""Gradient norms from here on count as not finite. The sum of squares overflows float32 at 1.8e19;
devices that saturate instead of overflowing (Ascend 910A) end there too, so the test sees both."""

ALIGNMENT = 128
"""Elements (512 bytes) that every parameter starts a multiple of in the flat buffer: unaligned
weights make convolutions fall back to slow kernels."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as PyTorch has them."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return `loss` unchanged, but with NaN gradients everywhere if it is not finite.

    An infinite or NaN loss may have finite gradients for some or all parameters. Multiplied by
    1 + 0 * loss, which is 1 or NaN, it sends NaN back instead. DDP then adds it into the reduced
    gradients of every card, and since all cards test the same reduced values, all of them skip the
    step or none does, without a collective of its own and without reading the loss.
    """
    return loss * (1 + 0 * loss.detach())


@functools.lru_cache(maxsize=None)
def has_fused_update() -> bool:
    """Whether PyTorch has an optimiser's update for the CPU in one pass (from 2.4 on)."""
    try:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, fused=True)  # type: ignore[call-arg]
    except (RuntimeError, TypeError):  # another device's alone, or unknown
        return False
    return True


class FlatOptimizer:
    """What the optimisers share: the flat buffer, the flat gradient, the guard and the state.

    On construction every parameter's data is copied into one flat float32 tensor and becomes a
    view of it; the parameter objects stay the same, `load_state_dict` of the model still works in
    place. Convert and move the model before; `step` raises if the views were replaced since.

    Args:
        parameters: float32, all on one device.
        weight_decay: of these.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        undecayed: more parameters, which lie behind and have no weight decay.
        factors: what else an applied update multiplies by, and others by 1.
        fused: on the CPU, update by PyTorch's kernels, see `has_fused_update`. They take gradients
            where they are; the results differ in the last bit.

    Attributes:
        flat: all parameters as one float32 tensor, padded; to be changed only in place.
        step_finite: 0-d bool tensor, whether the last step was applied.
        applied: 0-d float32 tensor, the same as 1 or 0.
        grad_norm: 0-d tensor, norm of the last whole gradient before clipping.
        steps: 0-d int32 tensor, number of applied steps.
    """

    buffer_names: tuple[str, ...] = ()

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.0,
                 clip_norm: float = 0.0, undecayed: Iterable[nn.Parameter] = (),
                 factors: Sequence[float] = (), fused: bool = False) -> None:
        decayed = list(parameters)
        self.parameters = decayed + list(undecayed)
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        device = self.parameters[0].device
        self._pads = [-p.numel() % ALIGNMENT for p in self.parameters]
        self._fillers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._half: Tensor | None = None
        self.flat = self._gather([p.detach() for p in self.parameters])
        for parameter, view in zip(self.parameters, self._views(self.flat)):
            parameter.data = view
        self._fused = fused
        self._addresses = [p.data_ptr() for p in self.parameters]
        self._num_decayed = len(decayed)
        self._decayed = sum(p.numel() + pad for p, pad in zip(decayed, self._pads))
        self._buffers = {name: torch.zeros_like(self.flat) for name in self.buffer_names}
        # Whether it is applied, minus the learning rate, and the factors: of a finite step and of
        # another. One choice between the two on the device is all that a step does to skip.
        self._lr = 0.0
        self._of_finite = torch.tensor([1.0, 0.0, *factors], device=device)
        self._rate = self._of_finite[1]
        self._of_skipped = torch.tensor([0.0, 0.0] + [1.0] * len(factors), device=device)
        self.applied = torch.ones((), dtype=torch.float32, device=device)
        self.steps = torch.zeros((), dtype=torch.int32, device=device)  # 64 bits are slow on NPU
        self.step_finite = torch.ones((), dtype=torch.bool, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)

    def halve(self, chosen: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        """From now on the network computes with `chosen` in `dtype`; the flat buffer stays float32.

        These parameters become views of a flat copy in `dtype`, which one cast renews after each
        step. Call it before anything (DistributedDataParallel) hooks into their gradients.
        """
        numbers = {id(parameter) for parameter in chosen}
        self._fused = False  # its kernels want gradients of the parameters' type
        self._half = self.flat.to(dtype)
        for parameter, view in zip(self.parameters, self._views(self._half)):
            if id(parameter) in numbers:
                parameter.data = view
        self._addresses = [p.data_ptr() for p in self.parameters]

    def master_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its float32 values: itself, or what `halve` keeps for it."""
        return list(zip(self.parameters, self._views(self.flat)))

    def renew_half(self) -> None:
        """Round the float32 values anew to what `halve` shows the network."""
        if self._half is not None:
            self._half.copy_(self.flat)

    def zero_grad(self) -> None:
        """Drop all gradients; the next backward makes new ones."""
        for parameter in self.parameters:
            parameter.grad = None

    def set_rate(self, lr: float) -> None:
        """Learning rate of the steps from now on; a tensor on the device is filled if it changes,
        so that a recorded step, which is replayed without this module, has it as well.
        """
        if lr != self._lr:
            self._lr = lr
            self._fill_rate(lr)

    def _fill_rate(self, lr: float) -> None:
        self._rate.fill_(-lr)

    def step(self, lr: float | None = None, scale: Tensor | None = None,
             overflow: Tensor | None = None) -> None:
        """Apply one update from the parameters' `.grad` (None counts as zeros).

        Args:
            lr: learning rate; None for that of `set_rate`.
            scale: 0-d tensor that the gradients were multiplied by, and are divided by here.
            overflow: 0-d tensor, above 0 where the gradients are wrong although they look finite.

        If a gradient is not finite, parameters, buffers and the step count stay exactly as they
        are, which costs no wait: the gradient is emptied by a masked fill before it meets a buffer,
        and every factor of the update becomes the neutral one.
        """
        self._check_views()
        if lr is not None:
            self.set_rate(lr)
        with torch.no_grad():
            grads = self._gradients()
            if scale is not None:
                for grad in grads:
                    grad.div_(scale)
            norms = [_norm(grad) for grad in grads]
            self.grad_norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
            self.step_finite = self.grad_norm < LARGEST_NORM
            if overflow is not None:
                self.step_finite = self.step_finite & (overflow <= 0)
            if self.clip_norm > 0:
                factor = (self.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1)
                for grad in grads:
                    grad.mul_(factor)
            self.applied, rate, *factors = torch.where(
                self.step_finite, self._of_finite, self._of_skipped).unbind()
            if self._fused:
                self._update_each(grads, 1 - self.applied)
            else:
                self._update(grads[0], rate, *factors)
            self.steps += self.step_finite
            self.renew_half()

    def _update(self, grad: Tensor, rate: Tensor, *factors: Tensor) -> None:
        """Change `flat` by `grad`; `rate` is minus the learning rate, 0 in a skipped step."""
        raise NotImplementedError

    def _update_each(self, grads: list[Tensor], skipped: Tensor) -> None:
        """Change each parameter by its gradient, by PyTorch's kernels; not where `skipped` is 1."""
        raise NotImplementedError

    def _gradients(self) -> list[Tensor]:
        """What a step may change and updates by: the flat gradient, or one for each parameter."""
        if self._fused:
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return [self._gather([p.grad for p in self.parameters])]

    def _gather(self, tensors: Sequence[Any]) -> Tensor:
        """One padded flat float32 tensor of `tensors`, None where zeros stand in.

        A single cat, and where types change one more for each run of a type, with one cast.
        """
        runs: list[tuple[torch.dtype, list[Tensor]]] = []
        for tensor, parameter, pad in zip(tensors, self.parameters, self._pads):
            dtype = parameter.dtype
            if not runs or runs[-1][0] != dtype:
                runs.append((dtype, []))
            pieces = runs[-1][1]
            if tensor is None:
                pieces.append(self._filler(parameter.numel() + pad, dtype))
                continue
            pieces.append(tensor.reshape(-1))
            if pad:
                pieces.append(self._filler(pad, dtype))
        if len(runs) == 1 and runs[0][0] == torch.float32:
            return torch.cat(runs[0][1])
        parts = [torch.cat(pieces).float() for _, pieces in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _filler(self, length: int, dtype: torch.dtype) -> Tensor:
        """Zeros: views, made once for each length, of one tensor for each type."""
        if (length, dtype) not in self._fillers:
            longest = max(p.numel() for p in self.parameters) + ALIGNMENT
            whole = self._fillers.setdefault((longest, dtype), torch.zeros(
                longest, dtype=dtype, device=self.parameters[0].device))
            self._fillers[length, dtype] = whole[:length]
        return self._fillers[length, dtype]

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, start = [], 0
        for parameter, pad in zip(self.parameters, self._pads):
            views.append(flat[start:start + parameter.numel()].view(parameter.shape))
            start += parameter.numel() + pad
        return views

    def _check_views(self) -> None:
        if [p.data_ptr() for p in self.parameters] != self._addresses:
            raise RuntimeError("a parameter no longer lives in the optimiser's flat buffer: the "
                               "model was moved or converted after it was built")

    def state_dict(self) -> dict[str, Any]:
        """CPU tensors for each parameter in order and plain types; waits for the device."""
        return {
            "optimizer": type(self).__name__,
            "steps": int(self.steps),
            "buffers": {name: [view.cpu().clone() for view in self._views(flat)]
                        for name, flat in self._buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            UserError: the state belongs to another optimiser or to other parameters; nothing has
                been changed then.
        """
        found, buffers = state.get("optimizer"), state.get("buffers", {})
        if found != type(self).__name__ or set(buffers) != set(self.buffer_names):
            raise UserError(f"the checkpoint holds the state of optimiser {found}, this run uses "
                            f"{type(self).__name__}; choose the same configuration")
        shapes = [tuple(p.shape) for p in self.parameters]
        for name, tensors in buffers.items():
            if [tuple(tensor.shape) for tensor in tensors] != shapes:
                raise UserError(f"the checkpoint's optimiser state '{name}' is for {len(tensors)} "
                                f"tensors of other shapes than the model's {len(shapes)}; choose "
                                "the same configuration")
        for name, tensors in buffers.items():
            for view, tensor in zip(self._views(self._buffers[name]), tensors):
                view.copy_(tensor)
        self.steps.fill_(int(state["steps"]))


class FlatSGD(FlatOptimizer):
    """SGD with momentum and (coupled) weight decay, by the formula of `torch.optim.SGD`."""

    buffer_names = ("momentum",)

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.9,
                 weight_decay: float = 0.0, clip_norm: float = 0.0, fused: bool = False) -> None:
        super().__init__(parameters, weight_decay, clip_norm, factors=(momentum,), fused=fused)
        self._momentum = momentum
        self._velocities = self._views(self._buffers["momentum"])

    def _update(self, grad: Tensor, rate: Tensor, *factors: Tensor) -> None:
        momentum, = factors
        if self.weight_decay:
            grad.add_(self.flat, alpha=self.weight_decay)
        grad.masked_fill_(~self.step_finite, 0.0)
        velocity = self._buffers["momentum"]
        velocity.mul_(momentum).add_(grad)
        self.flat.add_(torch.mul(velocity, rate, out=grad))

    def _update_each(self, grads: list[Tensor], skipped: Tensor) -> None:
        from torch.optim.sgd import sgd  # not in every version

        sgd(list(self.parameters), grads, list(self._velocities), fused=True, found_inf=skipped,
            weight_decay=self.weight_decay, momentum=self._momentum, lr=self._lr, dampening=0.0,
            nesterov=False, maximize=False)


class FlatAdamW(FlatOptimizer):
    """Adam with decoupled weight decay, by the formula of `torch.optim.AdamW`."""

    buffer_names = ("mean", "square")

    def __init__(self, parameters: Iterable[nn.Parameter],
                 weight_decay: float = 0.0, clip_norm: float = 0.0,
                 undecayed: Iterable[nn.Parameter] = (), fused: bool = False) -> None:
        super().__init__(parameters, weight_decay, clip_norm, undecayed, (1.0, *BETAS), fused)
        self._means, self._squares = map(self._views, self._buffers.values())
        self._log_betas = torch.tensor([math.log(beta) for beta in BETAS], device=self.flat.device)

    def _fill_rate(self, lr: float) -> None:
        super()._fill_rate(lr)
        if self.weight_decay:
            self._of_finite[2].fill_(1 - float(np.float32(lr * self.weight_decay)))

    def _update(self, grad: Tensor, rate: Tensor, *factors: Tensor) -> None:
        kept, beta1, beta2 = factors
        grad.masked_fill_(~self.step_finite, 0.0)
        if self.weight_decay:
            self.flat[:self._decayed].mul_(kept)
        mean, square = self._buffers["mean"], self._buffers["square"]
        mean.mul_(beta1).add_(grad, alpha=1 - BETAS[0])
        square.mul_(beta2).addcmul_(grad, grad, value=1 - BETAS[1])
        # 1 - beta^n in float32 loses half its digits for small n; expm1 keeps them.
        corrections = -torch.expm1(self._log_betas * (self.steps + 1).float())
        correction1, correction2 = corrections.unbind()
        root = torch.div(square, correction2, out=grad).sqrt_().add_(EPSILON)
        self.flat.addcmul_(torch.div(mean, root, out=root).mul_(rate), self.applied / correction1)

    def _update_each(self, grads: list[Tensor], skipped: Tensor) -> None:
        from torch.optim.adamw import adamw  # not in every version

        border = self._num_decayed
        for part, decay in ((slice(border), self.weight_decay), (slice(border, None), 0.0)):
            # The kernel counts each parameter's steps itself; `steps` is the same for all.
            steps = list(self.steps.float().repeat(len(grads[part])).unbind())
            adamw(
                list(self.parameters[part]), grads[part], self._means[part], self._squares[part],
                [], steps, fused=True, found_inf=skipped, amsgrad=False, beta1=BETAS[0],
                beta2=BETAS[1], lr=self._lr, weight_decay=decay, eps=EPSILON, maximize=False)


def _norm(grad: Tensor) -> Tensor:
    """0-d; of a contiguous tensor."""
    # By rows first: one sum over millions of squares is 4 % off on some versions' CPU.
    rows = grad.view(-1, ALIGNMENT) if grad.numel() % ALIGNMENT == 0 else grad.view(1, -1)
    return rows.norm(dim=1).norm()


def build_optimizer(config: Config, model: nn.Module,
                    last: Iterable[nn.Parameter] = ()) -> FlatOptimizer:
    """Optimiser of a recipe for the trainable parameters of `model`.

    SGD decays everything, as the original; AdamW only tensors of more than one dimension. Those in
    `last` come behind the others, so that parameters which share a type lie together.
    """
    behind = {id(p) for p in last}
    trainable = sorted((p for p in model.parameters() if p.requires_grad),
                       key=lambda p: id(p) in behind)
    fused = trainable[0].device.type == "cpu" and has_fused_update()
    if config.optimizer == "sgd":
        return FlatSGD(trainable, momentum=config.momentum, weight_decay=config.decay,
                       clip_norm=config.clip_grad_norm, fused=fused)
    return FlatAdamW([p for p in trainable if p.dim() > 1], weight_decay=config.decay,
                     clip_norm=config.clip_grad_norm,
                     undecayed=[p for p in trainable if p.dim() <= 1], fused=fused)
