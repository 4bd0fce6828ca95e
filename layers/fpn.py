"""Feature pyramid network (Lin et al., 2017) with the extra levels of RetinaNet."""

from __future__ import annotations

from typing import List, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Turns backbone feature maps into pyramid levels that share one channel count.

    Args:
        in_channels: channels of the backbone maps, finest first.
        features: channels of every level.
        num_downsample: extra levels above the coarsest map, each by a 3x3 convolution of stride 2
            without activation, as in the original.
    """

    def __init__(self, in_channels: Sequence[int], features: int, num_downsample: int) -> None:
        super().__init__()
        # Both lists run from the coarsest map to the finest, the order of the published weights.
        self.lat_layers = nn.ModuleList(
            [nn.Conv2d(channels, features, 1) for channels in reversed(in_channels)])
        self.pred_layers = nn.ModuleList(
            [nn.Conv2d(features, features, 3, padding=1) for _ in in_channels])
        self.downsample_layers = nn.ModuleList(
            [nn.Conv2d(features, features, 3, stride=2, padding=1) for _ in range(num_downsample)])

    def forward(self, maps: List[Tensor]) -> List[Tensor]:
        """Feature maps `[B,in_channels[i],H_i,W_i]`, finest first -> levels, finest first."""
        levels = []
        merged = None
        for lateral, predict, feature_map in zip(self.lat_layers, self.pred_layers, maps[::-1]):
            x = lateral(feature_map)
            if merged is not None:
                x.add_(F.interpolate(merged, size=x.shape[-2:], mode="bilinear",
                                     align_corners=False))
            merged = x
            levels.append(F.relu_(predict(merged)))
        levels.reverse()
        for downsample in self.downsample_layers:
            levels.append(downsample(levels[-1]))
        return levels
