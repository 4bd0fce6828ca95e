"""Modulated deformable convolution (DCNv2, Zhu et al., 2018): one interface, three ways to run it.

A 3x3 convolution whose nine taps are read at learned offsets from the grid, each times a learned
factor in 0..1. On an NPU the plugin's operator runs, elsewhere torchvision's where it is installed
and works, and plain PyTorch otherwise; `deform_conv_backend` says which. The results agree.

Letters: B batch, H x W size of the input, h x w of the output, T = 9 taps by row and column.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.fused_ops import NpuDeformConv, kernel_problem, without_casts
from utils.errors import first_line

_LOG = logging.getLogger(__name__)

BACKENDS = ("npu", "torchvision", "plain")


@functools.lru_cache(maxsize=None)
def deform_conv_backend(device: torch.device) -> str:
    """Which of `BACKENDS` runs on `device`. It is found out once: on an NPU by a trial run.

    The plain one on an accelerator is slower and is logged as a warning with its reason.
    """
    kind = "npu" if device.type == "npu" else "torchvision"
    problem = (kernel_problem("deform_conv", device) if kind == "npu"
               else _torchvision_problem(device))
    if problem and device.type != "cpu":
        _LOG.warning("deformable convolution runs as plain PyTorch on %s: %s", device, problem)
    return "plain" if problem else kind


def modulated_deform_conv2d(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                            bias: Tensor | None = None, stride: int = 1, padding: int = 1,
                            backend: str | None = None) -> Tensor:
    """Convolve `x` at displaced positions; zero outside of the input, bilinear between pixels.

    Args:
        x: `[B, in, H, W]`.
        offset: `[B, 2T, h, w]` in pixels, y and x of the first tap, of the second, and so on.
        mask: `[B, T, h, w]`, factor on each tap.
        weight: `[out, in, kh, kw]`, T = kh * kw.
        bias: `[out]`.
        stride: of the undisplaced grid, the same in both directions.
        padding: of the undisplaced grid, the same on all sides.
        backend: one of `BACKENDS`; by default that of `deform_conv_backend(x.device)`.

    Returns:
        `[B, out, h, w]` of `x`'s type. Half-precision inputs are computed in float32.
    """
    taps = weight.shape[2] * weight.shape[3]
    if offset.shape[1] != 2 * taps or mask.shape[1] != taps:
        raise ValueError(f"offset and mask have {offset.shape[1]} and {mask.shape[1]} channels, "
                         f"expected {2 * taps} and {taps}")
    run = {"npu": NpuDeformConv.apply, "torchvision": _convolve_by_torchvision,
           "plain": convolve_plainly}[backend or deform_conv_backend(x.device)]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_casts(x.device):  # the kernels take float32 only
        result = run(x.to(kind), offset.to(kind), mask.to(kind), weight.to(kind),
                     None if bias is None else bias.to(kind), stride, padding)
    return result.to(x.dtype)


class DeformConv2d(nn.Module):
    """Modulated deformable convolution that predicts its own offsets and factors.

    `weight`, `bias` and the convolution `conv_offset_mask` (first y and x offset of each tap, then
    the logits of the factors) are named as in published YOLACT++ weights. With its start values,
    zero offsets and factors of one half, it is half an ordinary convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1,
                 padding: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.taps = kernel_size * kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size,
                                               kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * self.taps, kernel_size, stride=stride,
                                          padding=padding)
        self.backend: str | None = None
        """Fixes one of `BACKENDS`; None chooses by the device."""
        bound = 1 / math.sqrt(in_channels * self.taps)
        nn.init.uniform_(self.weight, -bound, bound)
        self.zero_offsets()

    def zero_offsets(self) -> None:
        """Start from the undisplaced grid."""
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(cast(Tensor, self.conv_offset_mask.bias))

    def forward(self, x: Tensor) -> Tensor:
        """`[B,in,H,W] -> [B,out,h,w]`."""
        offset, logits = self.conv_offset_mask(x).split([2 * self.taps, self.taps], 1)
        return modulated_deform_conv2d(x, offset, torch.sigmoid(logits), self.weight, self.bias,
                                       self.stride, self.padding, self.backend)


def convolve_recordably(model: nn.Module) -> None:
    """Convolve in plain PyTorch from now on: the NPU's operator is compiled when it first runs, and
    such ones cannot be recorded into a device graph.
    """
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            module.backend = "plain"


def convolve_plainly(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                     bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Sample every tap as a weighted sum of four rows of a pixel table, then multiply once.

    The table holds the pixels as rows of channels with a border of zeros, one wide before and two
    after, so that no position needs a case of its own.
    """
    batch, channels, height, width = x.shape
    out_height, out_width = offset.shape[2:]
    y, x_ = _positions(offset, weight.shape[2], weight.shape[3], stride, padding)  # [B, h, w, T]
    y, x_ = y.clamp(-1, height), x_.clamp(-1, width)
    top, left = y.detach().floor(), x_.detach().floor()
    down, right = y - top, x_ - left
    factor = mask.permute(0, 2, 3, 1)  # [B, h, w, T]
    lower = down * factor
    upper = factor - lower
    upper_right, lower_right = upper * right, lower * right
    weights = torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right),
                          -1)  # [B, h, w, T, 4]

    pitch = width + 3
    table = F.pad(x, [1, 2, 1, 2]).permute(0, 2, 3, 1).reshape(-1, channels)  # [B*(H+3)*(W+3), in]
    image = torch.arange(batch, device=x.device).reshape(-1, 1, 1, 1) * ((height + 3) * pitch)
    corner = ((top + 1) * pitch + (left + 1)).long() + image  # [B, h, w, T]
    index = torch.stack((corner, corner + 1, corner + pitch, corner + (pitch + 1)),
                        -1)  # [B, h, w, T, 4]

    rows = _weighted_rows(table, index.reshape(-1, 4), weights.reshape(-1, 4))  # [B*h*w*T, in]
    columns = rows.reshape(batch * out_height * out_width, -1)  # [B*h*w, T*in]
    kernel = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])  # [T*in, out]
    result = columns.mm(kernel) if bias is None else torch.addmm(bias, columns, kernel)
    result = result.reshape(batch, out_height, out_width, -1)
    return result.permute(0, 3, 1, 2).contiguous()  # [B, out, h, w]


def _positions(offset: Tensor, kernel_height: int, kernel_width: int, stride: int,
               padding: int) -> tuple[Tensor, Tensor]:
    """Where the taps read: y and x in pixels, `[B, h, w, T]` each."""
    batch, _, height, width = offset.shape
    steps: dict[str, Any] = {"dtype": offset.dtype, "device": offset.device}
    taps = torch.arange(kernel_height * kernel_width, **steps)
    tap_y = (taps / kernel_width).floor()
    grid_y = torch.arange(height, **steps).reshape(-1, 1, 1) * stride + (tap_y - padding)
    grid_x = torch.arange(width, **steps).reshape(-1, 1) * stride + (
        taps - tap_y * kernel_width - padding)
    moved = offset.reshape(batch, -1, 2, height, width).permute(2, 0, 3, 4, 1)  # [2, B, h, w, T]
    return moved[0] + grid_y, moved[1] + grid_x


def _weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`result[n] = sum over i < 4 of weights[n, i] * table[index[n, i]]`, `[N, channels]`."""
    # PyTorch 1.8 fails an assertion of its own in float64, and where only weights take gradients.
    trusted = table.dtype == torch.float32 and (table.requires_grad or not weights.requires_grad)
    if table.device.type == "cpu" and trusted:
        # One pass that never holds the four rows of all samples at once.
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)
    return _weighted_rows_by_gather(table, index, weights)


def _weighted_rows_by_gather(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same from operators that every accelerator runs without a wait."""
    result = table.index_select(0, index[:, 0]) * weights[:, :1]
    for i in range(1, 4):
        result = result + table.index_select(0, index[:, i]) * weights[:, i:i + 1]
    return result


def _convolve_by_torchvision(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor,
                             bias: Tensor | None, stride: int, padding: int) -> Tensor:
    # Imported where it is needed: torchvision is optional, and slow to import.
    from torchvision.ops import deform_conv2d

    return deform_conv2d(x, offset, weight, bias, stride=stride, padding=padding, mask=mask)


def _torchvision_problem(device: torch.device) -> str:
    """Why torchvision's operator cannot be used on `device`; empty if it can. Tries it."""
    try:
        probe = torch.zeros(1, 9, 3, 3, device=device)
        with torch.no_grad():
            _convolve_by_torchvision(probe[:, :1], torch.cat((probe, probe), 1), probe,
                                     probe[:, :1], None, 1, 1)
    except ImportError:
        return "torchvision is not installed"
    except Exception as error:  # kernels of another PyTorch raise anything
        return f"torchvision's operator does not work here: {first_line(error)}"
    return ""
