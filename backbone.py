"""Backbones: ResNet (He et al., 2015), DarkNet-53 (Redmon and Farhadi, 2018), and their batch norm.

Both return the feature maps of chosen stages, finest first. Module names follow dbolya/yolact, so
that published weights load as they are. Letters: B batch, S input side in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from layers.deform_conv import DeformConv2d

if TYPE_CHECKING:
    from data.config import Config


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that does not count its batches.

    The count only matters for a cumulative average (`momentum=None`), which nothing here uses, and
    would cost one small device operator for every layer and step. The buffer stays in the
    state_dict for compatibility with published weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, self.momentum or 0.0, self.eps)


class _SumOverCards(torch.autograd.Function):
    """Sum of a tensor over all processes; the gradient is summed in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverCards.forward(ctx, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of the batches of all cards.

    In plain PyTorch, so that it runs on every backend. Every card must have equally many pixels.
    Parameters, buffers and evaluation are unchanged; batches are not counted.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Normalise `[B, C, h, w]`."""
        if not self.training or not dist.is_initialized():
            return super().forward(features)
        wide = features.float()  # squares of half-precision features overflow
        world = dist.get_world_size()
        # The mean first, then squares of differences: sums of squares alone would lose digits.
        mean = _SumOverCards.apply(wide.mean(dim=(0, 2, 3))) / world
        centred = wide - mean.view(1, -1, 1, 1)
        variance = _SumOverCards.apply((centred * centred).mean(dim=(0, 2, 3))) / world
        count = wide.numel() // wide.shape[1] * world
        unbiased = variance.detach() * (count / max(count - 1, 1))
        for running, value in ((self.running_mean, mean.detach()), (self.running_var, unbiased)):
            assert running is not None and self.momentum is not None
            running.mul_(1 - self.momentum).add_(value, alpha=self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        normalised = wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return normalised.to(features.dtype)


def synchronise_batch_norm(module: nn.Module) -> int:
    """Make every `nn.BatchNorm2d` in `module` a `SyncBatchNorm2d`, in place; returns how many.

    Only the class of the modules changes: parameters and buffers stay the same objects.
    """
    found = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    for child in found:
        child.__class__ = SyncBatchNorm2d
    return len(found)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `[B,in,H,W] -> [B,width,H/stride,W/stride]`."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1,
                 downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        # In place: batch normalisation needs its input for the backward pass, not its output.
        return F.relu_(x.add_(shortcut))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 around a shortcut; `[B,in,H,W] -> [B,4*width,H/s,W/s]`.

    With `deformable` the 3x3 convolution is a `DeformConv2d` (YOLACT++).
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1,
                 downsample: nn.Module | None = None, deformable: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2: nn.Module
        if deformable:
            self.conv2 = DeformConv2d(width, width, 3, stride=stride, padding=1)
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = BatchNorm2d(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return F.relu_(x.add_(shortcut))


class ResNet(nn.Module):
    """ResNet without its classifier.

    Args:
        layers: blocks in each stage.
        block: `Bottleneck` or `BasicBlock`.
        base_width: channels of the stem and width of the first stage; doubles with each stage.
        selected_layers: stages (0-based) whose feature maps are returned, finest first.
        dcn_layers: how many of each stage's last blocks may be deformable; none by default.
        dcn_interval: of these, those whose index in the stage is a multiple of it.

    `channels` holds the output channels of every stage; stage i has stride `4 * 2**i`.
    """

    def __init__(self, layers: Sequence[int],
                 block: type[BasicBlock] | type[Bottleneck] = Bottleneck,
                 base_width: int = 64, selected_layers: Sequence[int] = (1, 2, 3),
                 dcn_layers: Sequence[int] = (0, 0, 0, 0), dcn_interval: int = 1) -> None:
        super().__init__()
        self.selected_layers = tuple(selected_layers)
        self.channels = tuple(base_width * 2 ** i * block.expansion for i in range(len(layers)))
        # The stages come before the stem: this is the order of the published state_dict.
        self.layers = nn.ModuleList()
        self.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(base_width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = base_width
        for i, num_blocks in enumerate(layers):
            deformable = [n + dcn_layers[i] >= num_blocks and n % dcn_interval == 0
                          for n in range(num_blocks)]
            self.layers.append(_resnet_stage(block, in_channels, base_width * 2 ** i, deformable,
                                             stride=1 if i == 0 else 2))
            in_channels = self.channels[i]
        _init_kaiming(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B,3,S,S]` normalised RGB -> feature maps of the selected stages, finest first."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        return _run_stages(self.layers, x, self.selected_layers)


def _resnet_stage(block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int,
                  deformable: Sequence[bool], stride: int) -> nn.Sequential:
    """A stage with a block for each entry of `deformable`."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
            BatchNorm2d(out_channels))
    # Only a Bottleneck knows the keyword.
    extra: list[dict[str, Any]] = [{"deformable": True} if here else {} for here in deformable]
    return nn.Sequential(block(in_channels, width, stride, downsample, **extra[0]),
                         *(block(out_channels, width, **more) for more in extra[1:]))


class DarkNetBlock(nn.Module):
    """1x1 to half the channels, 3x3 back, added to the input; shape is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _darknet_conv(channels, channels // 2, kernel_size=1)
        self.conv2 = _darknet_conv(channels // 2, channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        # Not in place: the leaky ReLU before needs both of its results for the backward pass.
        return x + self.conv2(self.conv1(x))


class DarkNet(nn.Module):
    """DarkNet without its classifier.

    Args:
        layers: residual blocks in each stage, (1, 2, 8, 8, 4) for DarkNet-53.
        selected_layers: stages (0-based) whose feature maps are returned, finest first.

    `channels` holds the output channels of every stage; stage i has stride `2 * 2**i`.
    """

    def __init__(self, layers: Sequence[int], selected_layers: Sequence[int] = (2, 3, 4)) -> None:
        super().__init__()
        self.selected_layers = tuple(selected_layers)
        self.channels = tuple(64 * 2 ** i for i in range(len(layers)))
        self.layers = nn.ModuleList()
        self._preconv = _darknet_conv(3, 32, kernel_size=3)
        in_channels = 32
        for channels, num_blocks in zip(self.channels, layers):
            blocks = [DarkNetBlock(channels) for _ in range(num_blocks)]
            self.layers.append(nn.Sequential(
                _darknet_conv(in_channels, channels, kernel_size=3, stride=2), *blocks))
            in_channels = channels
        _init_kaiming(self, negative_slope=0.1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """`[B,3,S,S]` normalised RGB -> feature maps of the selected stages, finest first."""
        return _run_stages(self.layers, self._preconv(x), self.selected_layers)


def _darknet_conv(in_channels: int, out_channels: int, kernel_size: int,
                  stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride,
                  padding=kernel_size // 2, bias=False),
        BatchNorm2d(out_channels),
        nn.LeakyReLU(0.1, inplace=True))


def _run_stages(stages: nn.ModuleList, x: Tensor, selected: tuple[int, ...]) -> list[Tensor]:
    features = []
    for i, stage in enumerate(stages):
        x = stage(x)
        if i in selected:
            features.append(x)
    return features


def _init_kaiming(backbone: nn.Module, negative_slope: float = 0.0) -> None:
    """Start values for training from scratch; batch normalisation keeps its ones and zeros."""
    for module in backbone.modules():
        if isinstance(module, (nn.Conv2d, DeformConv2d)):
            nn.init.kaiming_normal_(module.weight, a=negative_slope, mode="fan_out",
                                    nonlinearity="leaky_relu")
    for module in backbone.modules():
        if isinstance(module, DeformConv2d):
            module.zero_offsets()


def build_backbone(config: Config) -> ResNet | DarkNet:
    """Build the backbone that `config` names, with random weights."""
    selected = config.selected_layers
    if config.backbone == "darknet53":
        return DarkNet((1, 2, 8, 8, 4), selected)
    if config.backbone == "resnet_mini":
        return ResNet((2, 2, 2, 2), BasicBlock, base_width=32, selected_layers=selected)
    blocks = {"resnet101": (3, 4, 23, 3), "resnet50": (3, 4, 6, 3)}[config.backbone]
    return ResNet(blocks, selected_layers=selected, dcn_layers=config.dcn_layers,
                  dcn_interval=config.dcn_interval)
