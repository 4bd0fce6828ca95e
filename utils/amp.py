"""The plan of precision: in which type the network computes, and how its loss is scaled.

    O0    everything in float32
    O1    parameters and gradients in float32; convolutions and matrix products run in half
    O2    the network's parameters in half too, except batch norm's; master weights in float32

Losses, box encoding and softmax are computed in float32 at every level. float16 has few exponents,
so the loss is multiplied by a scale before the backward pass and the gradients are divided by it
afterwards; bfloat16 needs none. Nothing here waits for the device: scale, verdict and counters are
tensors on it, where the scalers of PyTorch and of the plugin read one to three values in each step.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, ContextManager, Iterable, Iterator

import torch
from torch import Tensor, nn

from utils.device import (
    casting_library,
    clear_overflow,
    half_type_problem,
    has_autocast,
    overflow_since_clear,
    saturates,
)
from utils.errors import UserError, nearest
from utils.optimizer import FlatOptimizer

LEVELS = ("O0", "O1", "O2")
TYPES = {"auto": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}
INFERENCE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FIRST_SCALE = 2.0 ** 16
GOOD_STEPS_TO_GROW = 2000
LOWEST_SCALE = 1.0
"""Gradients that overflow unscaled are not the scale's fault."""
HIGHEST_SCALE = 2.0 ** 127
"""The last power of two in float32; float16 overflows long before."""


class LossScale:
    """What the loss is multiplied by: fixed, or halved after an overflow and doubled after 2000
    good steps in a row, the numbers of torch.amp.GradScaler and of its forerunner. `value` is
    always the same 0-d float32 tensor; `used` is what it was before the last update.
    """

    def __init__(self, device: torch.device, fixed: float | None = None) -> None:
        self.fixed = fixed
        self.value = torch.full((), fixed or FIRST_SCALE, dtype=torch.float32, device=device)
        self.used = self.value.clone()
        self._good_steps = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, finite: Tensor) -> None:
        """Adapt to a step whose gradients were finite or not (0-d, the same on all cards)."""
        if self.fixed is not None:
            return
        self.used.copy_(self.value)
        good = finite.float()
        self._good_steps.add_(1).mul_(good)
        grow = self._good_steps >= GOOD_STEPS_TO_GROW
        factor = torch.add(grow.float(), good, alpha=0.5) + 0.5
        self.value.mul_(factor).clamp_(LOWEST_SCALE, HIGHEST_SCALE)
        self._good_steps.masked_fill_(grow, 0.0)

    def state_dict(self) -> dict[str, float]:
        """Plain numbers; waits for the device."""
        return {"scale": float(self.value), "good_steps": int(self._good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put back what `state_dict` returned."""
        self.value.fill_(state["scale"])
        self.used.fill_(state["scale"])
        self._good_steps.fill_(state["good_steps"])


class Precision:
    """How a training step computes; `build_precision` makes it from the command line.

    On PyTorch 1.5 and 1.8 a library of its own casts (`utils.device.casting_library`). It is used
    by its public interface. `initialize` patches PyTorch's functions (O1) or the network (O2).
    Patched functions cast wherever they are called, so `disable_casts` is entered at once and left
    for the forward pass of the network alone: neither the loss nor an optimiser's or validation's
    tensors are cast. `scale_loss` with a scale of 1 and no optimiser does one thing, dropping the
    half copies of the weights after each backward pass, without which the next forward would see
    the weights of the first. Its scaler is not used: it asks the device for the verdict of each
    step.

    `level` is one of `LEVELS`, `dtype` float16 or bfloat16 (not used at O0), `scale` None for an
    unscaled loss; `library` casts at O1 where PyTorch does not.
    """

    def __init__(self, level: str = "O0", device: torch.device | None = None,
                 dtype: torch.dtype = torch.float16, scale: LossScale | None = None,
                 library: Any = None) -> None:
        self.level = level
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.scale = scale
        self.used_scale = None if scale is None else scale.used
        """Scale of the last step."""
        self._library = library
        self._no_casts: Any = None
        """The library's context in which it casts nothing; entered but in the forward pass."""
        # In float32 too: a 910A convolves in float16 at every level, and turns NaN into 0.
        self._reads_register = saturates(self.device)
        self._overflow: Tensor | None = None
        self._master_weights: list[tuple[nn.Parameter, Tensor]] = []
        self._optimizer: FlatOptimizer | None = None

    @property
    def name(self) -> str:
        """For messages, and for the identity of a run: "O1, float16, loss scale dynamic"."""
        if self.level == "O0":
            return "O0"
        scale = "none" if self.scale is None else (
            "dynamic" if self.scale.fixed is None else f"{self.scale.fixed:g}")
        return f"{self.level}, {str(self.dtype).split('.')[-1]}, loss scale {scale}"

    @property
    def scale_floor(self) -> float:
        """Loss scale at which, or below, an overflow is not answered by a lower one."""
        return math.inf if self.scale is None or self.scale.fixed else LOWEST_SCALE

    def prepare(self, model: nn.Module, optimizer: FlatOptimizer) -> None:
        """Convert the network; after its optimiser is made and before it is wrapped."""
        kept = {id(p) for p in batch_norm_parameters(model)}
        chosen = [p for p in model.parameters() if id(p) not in kept] if self.level == "O2" else []
        # Before the library: it rounds all of them.
        self._master_weights = [(p, p.detach().clone()) for p in chosen if not p.requires_grad]
        if self._library is not None:
            self._library.initialize(model, opt_level=self.level, loss_scale=1.0, verbosity=0)
            if self.level == "O1":
                self._stop_casts()
        if self.level != "O2":
            return
        for parameter, _ in self._master_weights:
            parameter.data = parameter.data.to(self.dtype)
        optimizer.halve(chosen, self.dtype)
        numbers = {id(p) for p in chosen}
        self._master_weights += [(p, values) for p, values in optimizer.master_weights()
                                 if id(p) in numbers]
        self._optimizer = optimizer

    def forward(self) -> ContextManager[Any]:
        """Context for the forward pass of the network, and of nothing else; `backward` follows."""
        if self._reads_register:
            clear_overflow(self.device)
        if self.level != "O1":
            return contextlib.ExitStack()  # nothing
        if self._library is not None:
            return self._casts()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextlib.contextmanager
    def _casts(self) -> Iterator[None]:
        self._no_casts.__exit__(None, None, None)
        try:
            yield
        finally:
            self._stop_casts()

    def _stop_casts(self) -> None:
        self._no_casts = self._library.disable_casts()
        self._no_casts.__enter__()

    def widen(self, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's output in float32."""
        return {name: value.float() for name, value in predictions.items()}

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, added to those that are there."""
        scaled = loss if self.scale is None else loss * self.scale.value
        if self.level == "O1" and self._library is not None:
            with self._library.scale_loss(scaled, []) as unchanged:
                unchanged.backward()
        else:
            scaled.backward()
        if self._reads_register:
            found = overflow_since_clear(self.device)
            self._overflow = found if self._overflow is None else self._overflow + found

    def take_overflow(self) -> Tensor | None:
        """0-d, above 0 if this card's register saw an overflow since the last call, in a forward
        pass, a loss or a backward pass; else None.

        None on devices whose numbers show it themselves: there the reduced gradients are not
        finite, on all cards alike.
        """
        overflow, self._overflow = self._overflow, None
        return overflow

    def step(self, optimizer: FlatOptimizer, lr: float | None,
             overflow: Tensor | None = None) -> None:
        """Update the parameters unless a gradient overflowed, then the scale."""
        optimizer.step(lr, None if self.scale is None else self.scale.value, overflow)
        if self.scale is not None:
            self.scale.update(optimizer.applied)

    @contextlib.contextmanager
    def float32_weights(self, model: nn.Module) -> Iterator[None]:
        """Context in which `model` has its float32 parameters: to save, load and evaluate it.

        The half parameters are taken out and put back as the objects they are: giving them other
        data would cut the hooks that DistributedDataParallel has in them.
        """
        wide = {id(p): nn.Parameter(values, requires_grad=False)
                for p, values in self._master_weights}
        taken = [(module, name, parameter) for module in model.modules()
                 for name, parameter in module._parameters.items() if id(parameter) in wide]
        for module, name, parameter in taken:
            module._parameters[name] = wide[id(parameter)]
        try:
            yield
        finally:
            for module, name, parameter in taken:
                module._parameters[name] = parameter
            if self._optimizer is not None:
                self._optimizer.renew_half()
                for parameter, values in self._master_weights:
                    if not parameter.requires_grad:
                        parameter.data.copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {} if self.scale is None else self.scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        if self.scale is not None and state:
            self.scale.load_state_dict(state)


def batch_norm_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Weights and biases of all kinds of batch norm."""
    return [p for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for p in module.parameters(recurse=False)]


def build_precision(opt_level: str, loss_scale: str | None, amp_dtype: str,
                    device: torch.device) -> Precision:
    """Precision from the values of --opt_level, --loss_scale (None: by type) and --amp_dtype.

    Raises:
        UserError: an unknown value, or what this device or this PyTorch cannot do.
    """
    for flag, value, known in (("opt_level", opt_level, LEVELS), ("amp_dtype", amp_dtype, TYPES)):
        if value not in known:
            raise UserError(f"--{flag} is '{value}'{nearest(value, known) or '.'} Known: "
                            f"{', '.join(known)}.")
    fixed = _fixed_scale(loss_scale)
    if opt_level == "O0":
        if loss_scale is not None or amp_dtype != "auto":
            flag = "amp_dtype" if loss_scale is None else "loss_scale"
            raise UserError(f"--{flag} means nothing at --opt_level=O0, where everything is "
                            "float32; leave it out or choose O1")
        return Precision(device=device)
    dtype = TYPES[amp_dtype]
    library = None
    if not has_autocast():
        library = casting_library(device)
        if dtype != torch.float16:
            raise UserError(f"--amp_dtype={amp_dtype} needs PyTorch 2, this is "
                            f"{torch.__version__}; leave it out")
    problem = half_type_problem(device, dtype)
    if problem:
        raise UserError(f"--opt_level={opt_level} --amp_dtype={amp_dtype}: {problem}; choose "
                        "another type or O0")
    scaled = loss_scale is not None or dtype == torch.float16
    return Precision(opt_level, device, dtype, LossScale(device, fixed) if scaled else None,
                     library)


def inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type in which a network finds objects: one of `INFERENCE_TYPES`, or what `auto` takes.

    `auto` is bfloat16 on a CPU or a CUDA card that computes it, and float32 elsewhere.

    Raises:
        UserError: this device or this PyTorch cannot compute in that type.
    """
    if precision == "auto":
        computes = device.type == "cuda" or (device.type == "cpu" and cpu_computes_bfloat16())
        precision = "bfloat16" if computes and not half_type_problem(
            device, torch.bfloat16) else "float32"
    dtype = INFERENCE_TYPES[precision]
    problem = "" if dtype == torch.float32 else half_type_problem(device, dtype)
    if problem:
        raise UserError(f"--precision={precision}: {problem}; choose float32 or auto")
    return dtype


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for it; without, PyTorch is slower than float32."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _fixed_scale(text: str | None) -> float | None:
    """The number in --loss_scale; None for `dynamic` and for nothing."""
    if text is None or text == "dynamic":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= HIGHEST_SCALE:
        raise UserError(f"--loss_scale is '{text}', expected dynamic or a number above 0, such as "
                        "128")
    return value
