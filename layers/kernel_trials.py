"""Trials of the plugin's kernels: each beside its reference in plain PyTorch, on a device.

    python -m layers.kernel_trials KERNEL npu:0

`layers.fused_ops` starts them, each in a process of its own.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from layers import fused_ops
from layers.deform_conv import convolve_plainly
from layers.ohem import cross_entropy

PROBE_TOLERANCE = 2e-2
"""Largest deviation from the reference, relative to its largest value. Shortened float32 (HF32)
stays below; a wrong order of channels does not."""

FLOAT32_TOLERANCE = 1e-5

CROSS_ENTROPY_TOLERANCE = 1e-4
"""Relative for values above 1, absolute below. The plugin's own test allows a thousandth."""

DeformConv = Callable[[Tensor, Tensor, Tensor, Tensor, Optional[Tensor], int, int], Tensor]
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def try_deform_conv(device: torch.device, reference: DeformConv) -> str:
    """Run `npu_deform_conv2d` here, forward and backward with stride 1 and 2.

    Returns what is wrong with it beside `reference` on the CPU; empty if nothing is.
    """
    for name in ("npu_deformable_conv2d", "npu_deformable_conv2dbk"):
        if fused_ops.operator(name) is None:
            return f"the plugin has no operator {name}"
    for stride in (1, 2):
        inputs = _probe_inputs(stride)
        expected = _results(reference, inputs, stride)
        try:
            found = [x.cpu() for x in _results(
                fused_ops.npu_deform_conv2d, [x.to(device) for x in inputs], stride)]
        except Exception as error:  # the plugin raises whatever its libraries raise
            return f"the plugin's operator failed its trial ({_first_line(error)})"
        for left, right in zip(found, expected):
            if not bool((left - right).abs().max() <= PROBE_TOLERANCE * right.abs().max()):
                return "the plugin's operator deviates from the reference in its trial"
    return ""


def try_fused_sgd(device: torch.device, level: str = "") -> str:
    """Take steps with `npu_fused_sgd`, or at a level `library_fused_sgd`, beside PyTorch's SGD.

    What is compared is a view of the parameter, made before the first step. Returns what is wrong.
    """
    settings: Dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    start = _wave(24, 0.7)
    expected = nn.Parameter(start.clone())
    reference = torch.optim.SGD([expected], **settings)
    flat = start.to(device)
    view, whole = flat[8:16], nn.Parameter(flat)
    try:
        if level:
            fused = fused_ops.library_initialized(
                fused_ops.library_fused_sgd([whole], **settings), level, device)
        else:
            fused = fused_ops.npu_fused_sgd([whole], **settings)
        whole.grad = torch.zeros_like(flat)
        for step in range(3):
            gradient = _wave(24, 1.1 + step)
            expected.grad = gradient
            whole.grad.copy_(gradient)
            reference.step()
            fused.step()
        found = view.cpu()
    except Exception as error:  # the plugin raises whatever its libraries raise
        return f"the fused optimiser failed its trial ({_first_line(error)})"
    if not bool((found - expected.detach()[8:16]).abs().max() <= FLOAT32_TOLERANCE):
        return "the fused optimiser deviates from the reference in its trial"
    return ""


def try_cross_entropy(device: torch.device, reference: CrossEntropy) -> str:
    """Run `npu_cross_entropy` here, forward and backward, on a few sizes of rows and classes.

    Returns what is wrong with it beside `reference` on the CPU; empty if nothing is.
    """
    if fused_ops.operator("npu_cross_entropy_loss") is None:
        return "the plugin has no operator npu_cross_entropy_loss"
    for rows, classes in ((37, 2), (1000, 21), (20000, 81)):
        logits, labels = _probe_rows(rows, classes)
        expected = _losses_and_gradients(reference, logits, labels)
        try:
            found = [x.cpu() for x in _losses_and_gradients(
                fused_ops.npu_cross_entropy, logits.to(device), labels.to(device))]
        except Exception as error:  # the plugin raises whatever its libraries raise
            return f"the plugin's operator failed its trial ({_first_line(error)})"
        if not all(_agree(left, right) for left, right in zip(found, expected)):
            return "the plugin's operator deviates from the reference in its trial"
    return ""


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether values are equal but for rounding, and NaN where NaN is expected."""
    unknown = torch.isnan(expected)
    near = (found - expected).abs() <= CROSS_ENTROPY_TOLERANCE * expected.abs().clamp(min=1)
    return bool((torch.isnan(found) == unknown).all() & (near | unknown).all())


def _probe_rows(rows: int, classes: int) -> Tuple[Tensor, Tensor]:
    """Logits and labels: common values, far apart, beyond the range of exp, and a row with NaN.

    A loss that is not finite has to stay so, or a training that has failed would go on.
    """
    logits = 8 * _wave(rows * classes, 1.7).reshape(rows, classes)
    logits[3::10] *= 100
    logits[4::10] += 100
    logits[5::10] -= 120
    logits[7::10] = 0
    logits[6, 0] = float("nan")
    return logits, torch.arange(rows) * 7 % classes


def _losses_and_gradients(cross_entropy: CrossEntropy, logits: Tensor,
                          labels: Tensor) -> Tuple[Tensor, Tensor]:
    """The rows' losses and the gradient for weights of which every third is 0."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = cross_entropy(leaf, labels)
        weights = _wave(len(labels), 0.7)
        weights[::3] = 0
        gradient, = torch.autograd.grad(losses, [leaf], weights.to(losses.device))
    return losses.detach(), gradient


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wave(length: int, step: float) -> Tensor:
    """A fixed formula: no random state is touched."""
    return torch.sin(torch.arange(1, 1 + length, dtype=torch.float32) * step)


def _probe_inputs(stride: int) -> List[Tensor]:
    """x, offset, mask, weight, bias."""
    side, channels = 8, 16
    out = (side - 1) // stride + 1
    shapes = ((1, channels, side, side), (1, 18, out, out), (1, 9, out, out),
              (channels, channels, 3, 3), (channels,))
    waves = [_wave(torch.Size(shape).numel(), 1.7 + 0.31 * n).reshape(shape)
             for n, shape in enumerate(shapes)]
    # Offsets of up to two pixels, at least a tenth away from whole ones, where gradients jump.
    waves[1] = (2 * waves[1]).floor() + 0.5 + 0.4 * torch.cos(7 * waves[1])
    waves[2] = 0.5 + 0.5 * waves[2]
    return waves


def _results(convolve: DeformConv, inputs: List[Tensor], stride: int) -> List[Tensor]:
    """The output and the gradients of all inputs for a fixed output gradient."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        x, offset, mask, weight, bias = leaves
        out = convolve(x, offset, mask, weight, bias, stride, 1)
        pattern = torch.cos(torch.arange(out.numel(), dtype=torch.float32) * 0.7)
        grads = torch.autograd.grad(out, leaves, pattern.reshape(out.shape).to(out.device))
    return [out.detach()] + list(grads)


TRIALS: Mapping[str, Callable[[torch.device], str]] = {
    "cross_entropy": functools.partial(try_cross_entropy, reference=cross_entropy),
    "deform_conv": functools.partial(try_deform_conv, reference=convolve_plainly),
    "fused_sgd": try_fused_sgd,
    "library_sgd_O1": functools.partial(try_fused_sgd, level="O1"),
    "library_sgd_O2": functools.partial(try_fused_sgd, level="O2"),
}


def main(argv: Sequence[str]) -> int:
    """Run the trial of a kernel on a device; print what is wrong, or nothing."""
    fused_ops.operator("npu_deformable_conv2d")  # the plugin makes the device known
    runtime = getattr(torch, "npu", None)
    config = getattr(runtime, "config", None)
    if config is not None:
        config.allow_internal_format = False  # as `utils.device` has it
    print(fused_ops.VERDICT + TRIALS[argv[0]](torch.device(argv[1])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
