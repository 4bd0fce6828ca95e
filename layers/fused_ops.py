"""Operators of the Ascend plugin, and whether each may be used: `layers.kernel_trials` finds out.

Beside `utils.device` the only file that names the plugin. Nothing is imported or asked for before
a tensor on an NPU needs it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any, Iterator, List, Optional, Tuple, cast

import torch
from torch import Tensor, nn

CROSS_ENTROPY_ROWS = 199999
"""Most rows that the plugin's documents agree on: up to 200000 in one, fewer in another."""

TRIAL_SECONDS = 600
"""A first use may have to compile kernels."""

VERDICT = "trial of the plugin:"
"""Begins the line in which a trial says what is wrong, or nothing."""


def operator(name: str) -> Any:
    """The plugin's operator `name`, or None. On the Ascend PyTorch 1.5 they are in torch itself.

    Where there is a plugin, torch's own attribute of that name is a shim that only raises.
    """
    plugin = importlib.util.find_spec("torch_npu") is not None
    return getattr(importlib.import_module("torch_npu") if plugin else torch, name, None)


class _NpuDeformConv(torch.autograd.Function):
    """`npu_deformable_conv2d` and its backward operator, float32 only.

    The operators want the 3 * k * k offset channels as all x, then all y, then the mask, and return
    what they sampled so that the backward pass need not sample again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                bias: Optional[Tensor], stride: int, padding: int) -> Tensor:
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
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, packed, sampled = ctx.saved_tensors
        grad_x, grad_weight, grad_packed, grad_bias = operator("npu_deformable_conv2dbk")(
            x, grad.contiguous(), sampled, weight, packed, **ctx.geometry)
        grad_ox, grad_oy, grad_mask = grad_packed.chunk(3, 1)
        grad_offset = torch.stack((grad_oy, grad_ox), 2).flatten(1, 2)
        return (grad_x, grad_offset, grad_mask, grad_weight, grad_bias if ctx.has_bias else None,
                None, None)


def npu_deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                      bias: Optional[Tensor], stride: int, padding: int) -> Tensor:
    """Modulated deformable convolution by the plugin's operator; see `layers.deform_conv`."""
    return _NpuDeformConv.apply(x, offset, mask, weight, bias, stride, padding)


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


def npu_fused_sgd(parameters: List[nn.Parameter], lr: float, momentum: float,
                  weight_decay: float) -> Any:
    """The plugin's `NpuFusedSGD`, see `utils.fused_optimizer`."""
    optim = importlib.import_module("torch_npu.optim")
    return optim.NpuFusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def library_fused_sgd(parameters: List[nn.Parameter], lr: float, momentum: float,
                      weight_decay: float) -> Any:
    """The `NpuFusedSGD` of apex, for PyTorch 1.5 and 1.8; `amp.initialize` has to take it over."""
    optim = importlib.import_module("apex.optimizers")
    return optim.NpuFusedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def library_initialized(kernel: Any, level: str, device: torch.device) -> Any:
    """`kernel`, an optimiser of apex, as `utils.amp.Precision` has apex take it over."""
    amp = importlib.import_module("apex.amp")
    amp.initialize(nn.Linear(1, 1).to(device), kernel, opt_level=level, loss_scale=1.0,
                   combine_grad=True, verbosity=0)
    kernel.zero_grad()
    return kernel


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


def npu_deform_conv_problem(device: torch.device) -> str:
    """Why `npu_deform_conv2d` must not be used on `device`; empty if it may."""
    return _problem("deform_conv", device)


def npu_fused_sgd_problem(device: torch.device) -> str:
    """Why `npu_fused_sgd` must not be used on `device`; empty if it may."""
    return _problem("fused_sgd", device)


def library_fused_sgd_problem(device: torch.device, level: str) -> str:
    """Why `library_fused_sgd` must not be used on `device` at this --opt_level; empty if it may."""
    if level == "O0":
        return (f"on PyTorch {torch.__version__} it is apex's, which works at --opt_level O1 and "
                "O2 only")
    return _problem("library_sgd_" + level, device)


def npu_cross_entropy_problem(device: torch.device) -> str:
    """Why `npu_cross_entropy` must not be used on `device`; empty if it may."""
    return _problem("cross_entropy", device)


def _problem(kernel: str, device: torch.device) -> str:
    """What is wrong with a kernel on `device`.

    The trial runs in a process of its own: an operator that fails leaves the plugin's queue of
    launches broken, and what is queued later silently never runs.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [root, os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in paths if path))
    try:
        done = subprocess.run([sys.executable, "-m", "layers.kernel_trials", kernel, str(device)],
                              env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the trial of the plugin's operator did not end in {TRIAL_SECONDS} s"
    verdicts = [line[len(VERDICT):].strip() for line in done.stdout.splitlines()
                if line.startswith(VERDICT)]
    if not verdicts:
        return f"the trial of the plugin's operator ended with code {done.returncode}"
    return verdicts[-1]
