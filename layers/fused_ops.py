"""Operators of the Ascend plugin, and trials of each beside its reference in plain PyTorch.

    python -m layers.fused_ops KERNEL npu:0

An operator is used where its trial passes; the trial runs in a process of its own. Beside
`utils.device` the only file that names the plugin. Nothing is imported or asked for before a tensor
on an NPU needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any, Callable, Iterator, List, Sequence, Tuple, cast

import torch
from torch import Tensor

from utils.errors import first_line

CROSS_ENTROPY_ROWS = 199999
"""Most rows that the plugin's documents agree on: up to 200000 in one, fewer in another."""

TRIAL_SECONDS = 600
"""A first use may have to compile kernels."""

VERDICT = "trial of the plugin:"
"""Begins the line in which a trial says what is wrong, or nothing."""

PROBE_TOLERANCE = 2e-2
"""Largest deviation from the reference, relative to its largest value. Shortened float32 (HF32)
stays below; a wrong order of channels does not."""

CROSS_ENTROPY_TOLERANCE = 1e-4
"""Relative for values above 1, absolute below. The plugin's own test allows a thousandth."""

Kernel = Callable[..., Tensor]
Probe = Tuple[List[Tensor], Tuple[Any, ...]]
"""Arguments whose gradients are compared, and those after them."""


def operator(name: str) -> Any:
    """The plugin's operator `name`, or None. On the Ascend PyTorch 1.5 they are in torch itself.

    Where there is a plugin, torch's own attribute of that name is a shim that only raises.
    """
    plugin = importlib.util.find_spec("torch_npu") is not None
    return getattr(importlib.import_module("torch_npu") if plugin else torch, name, None)


class NpuDeformConv(torch.autograd.Function):
    """The convolution of `layers.deform_conv` by `npu_deformable_conv2d` and its backward operator.

    Float32 only. The operators want the 3 * k * k offset channels as all x, then all y, then the
    mask, and return what they sampled so that the backward pass need not sample again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                bias: Tensor | None, stride: int, padding: int) -> Tensor:
        packed = torch.cat((offset[:, 1::2], offset[:, 0::2], mask), 1)
        ctx.geometry = {
            "kernel_size": [weight.shape[3], weight.shape[2]],
            "stride": [1, 1, stride, stride],
            "padding": [padding] * 4,
            "dilation": [1, 1, 1, 1],
            "groups": 1,
            "deformable_groups": 1,
            "modulated": True,
        }
        ctx.has_bias = bias is not None
        result, sampled = operator("npu_deformable_conv2d")(x, weight, packed, bias,
                                                            **ctx.geometry)
        ctx.save_for_backward(x, weight, packed, sampled)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, packed, sampled = ctx.saved_tensors
        grad_x, grad_weight, grad_packed, grad_bias = operator("npu_deformable_conv2dbk")(
            x, grad.contiguous(), sampled, weight, packed, **ctx.geometry)
        grad_ox, grad_oy, grad_mask = grad_packed.chunk(3, 1)
        grad_offset = torch.stack((grad_oy, grad_ox), 2).flatten(1, 2)
        return (grad_x, grad_offset, grad_mask, grad_weight, grad_bias if ctx.has_bias else None,
                None, None)


@contextlib.contextmanager
def without_casts(device: torch.device) -> Iterator[None]:
    """Nothing in here is cast to half precision: not by PyTorch, nor by apex on PyTorch 1.x."""
    # At its end apex's own context turns casts on, whatever they were before.
    library = sys.modules.get("apex.amp")
    handle = getattr(getattr(library, "_amp_state", None), "handle", None)
    with contextlib.ExitStack() as stack:
        if handle is not None and handle.is_active():
            stack.enter_context(cast(Any, library).disable_casts())
        if hasattr(torch, "autocast"):  # from 1.10
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def npu_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row by the plugin's operator: one kernel each way instead of three.

    Args:
        logits: float32 `[N, C]`, N at most `CROSS_ENTROPY_ROWS`.
        labels: int64 `[N]`, 0..C-1. CANN allows no other, also where `ignore_index` names it; so
            that is not offered.

    Returns:
        float32 `[N]`, differentiable.
    """
    return operator("npu_cross_entropy_loss")(logits, labels, reduction="none")[0]


def kernel_problem(kernel: str, device: torch.device) -> str:
    """Why `kernel` (`deform_conv`, `cross_entropy`) must not be used on `device`; empty if it may.

    The trial runs in a process of its own: an operator that fails leaves the plugin's queue of
    launches broken, and what is queued later silently never runs.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [root, os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path))
    try:
        done = subprocess.run([sys.executable, "-m", "layers.fused_ops", kernel, str(device)],
                              env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the trial of the plugin's operator did not end in {TRIAL_SECONDS} s"
    verdicts = [line[len(VERDICT):].strip() for line in done.stdout.splitlines()
                if line.startswith(VERDICT)]
    if not verdicts:
        return f"the trial of the plugin's operator ended with code {done.returncode}"
    return verdicts[-1]


def try_deform_conv(device: torch.device, reference: Kernel) -> str:
    """Run `NpuDeformConv` here, forward and backward with stride 1 and 2.

    Returns what is wrong with it beside `reference` on the CPU; empty if nothing is.
    """
    probes: list[Probe] = []
    side, channels = 8, 16
    for stride in (1, 2):
        out = (side - 1) // stride + 1
        x, offset, mask, weight, bias = (
            _wave(shape, 1.7 + 0.31 * n) for n, shape in enumerate((
                (1, channels, side, side), (1, 18, out, out), (1, 9, out, out),
                (channels, channels, 3, 3), (channels,))))
        # Offsets of up to two pixels, at least a tenth away from whole ones, where gradients jump.
        offset = (2 * offset).floor() + 0.5 + 0.4 * torch.cos(7 * offset)
        probes.append(([x, offset, 0.5 + 0.5 * mask, weight, bias], (stride, 1)))
    return _trial(("npu_deformable_conv2d", "npu_deformable_conv2dbk"), NpuDeformConv.apply,
                  reference, device, probes,
                  lambda expected: PROBE_TOLERANCE * expected.abs().max())


def try_cross_entropy(device: torch.device, reference: Kernel) -> str:
    """Run `npu_cross_entropy` here, forward and backward, on a few sizes of rows and classes.

    The logits are common values, far apart, beyond the range of exp, and a row with NaN: a loss
    that is not finite has to stay so, or a training that has failed would go on.

    Returns what is wrong with it beside `reference` on the CPU; empty if nothing is.
    """
    probes: list[Probe] = []
    for rows, classes in ((37, 2), (1000, 21), (20000, 81)):
        logits = 8 * _wave((rows, classes), 1.7)
        logits[3::10] *= 100
        logits[4::10] += 100
        logits[5::10] -= 120
        logits[7::10] = 0
        logits[6, 0] = float("nan")
        probes.append(([logits], (torch.arange(rows) * 7 % classes,)))
    return _trial(("npu_cross_entropy_loss",), npu_cross_entropy, reference, device, probes,
                  lambda expected: CROSS_ENTROPY_TOLERANCE * expected.abs().clamp(min=1))


def _trial(operators: Sequence[str], kernel: Kernel, reference: Kernel, device: torch.device,
           probes: Sequence[Probe], tolerance: Kernel) -> str:
    """What is wrong with `kernel` on `device`: its results, or its gradients, of any probe."""
    for name in operators:
        if operator(name) is None:
            return f"the plugin has no operator {name}"
    for leaves, others in probes:
        expected = _with_gradients(reference, leaves, others, torch.device("cpu"))
        try:
            found = _with_gradients(kernel, leaves, others, device)
        except Exception as error:  # the plugin raises whatever its libraries raise
            return f"the plugin's operator failed its trial ({first_line(error)})"
        for left, right in zip(found, expected):
            unknown = torch.isnan(right)
            near = (left - right).abs() <= tolerance(right)
            if not bool((torch.isnan(left) == unknown).all() & (near | unknown).all()):
                return "the plugin's operator deviates from the reference in its trial"
    return ""


def _with_gradients(compute: Kernel, leaves: Sequence[Tensor], others: Sequence[Any],
                    device: torch.device) -> list[Tensor]:
    """A result and the gradients of the leaves for fixed weights, of which every third is 0."""
    with torch.enable_grad():
        leaves = [x.detach().to(device).requires_grad_() for x in leaves]
        result = compute(*leaves, *(x.to(device) if torch.is_tensor(x) else x for x in others))
        weights = _wave((result.numel(),), 0.7)
        weights[::3] = 0
        gradients = torch.autograd.grad(result, leaves, weights.reshape(result.shape).to(device))
    return [x.detach().cpu() for x in [result, *gradients]]


def _wave(shape: tuple[int, ...], step: float) -> Tensor:
    """A fixed formula: no random state is touched."""
    place = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32)
    return torch.sin(place * step).reshape(shape)


def main(argv: Sequence[str]) -> int:
    """Run the trial of a kernel on a device; print what is wrong, or nothing."""
    from layers.deform_conv import convolve_plainly  # it imports this file
    from layers.multibox_loss import cross_entropy

    operator("npu_deformable_conv2d")  # the plugin makes the device known
    runtime: Any = getattr(torch, "npu", None)  # as `utils.device.prepare` has it
    if hasattr(runtime, "set_compile_mode"):
        runtime.set_compile_mode(jit_compile=False)
    if hasattr(runtime, "config"):
        runtime.config.allow_internal_format = False
    device = torch.device(argv[1])
    problem = (try_cross_entropy(device, cross_entropy) if argv[0] == "cross_entropy"
               else try_deform_conv(device, convolve_plainly))
    print(VERDICT + problem, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
