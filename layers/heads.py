"""YOLACT's two branches on the pyramid: prototype masks, and the head shared by all levels.

Letters: B batch, P priors, C classes with background, k prototypes, H x W size of a level.
"""

from __future__ import annotations

from typing import List, Tuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProtoNet(nn.Sequential):
    """Prototype masks at twice the size of the finest level: `[B,in,H,W] -> [B,2H,2W,k]`."""

    def __init__(self, in_channels: int, features: int, num_prototypes: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, features, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            # The original has a ReLU here, which changes nothing: interpolation between values
            # that are not negative. The place is kept for the numbering of the weights.
            nn.Identity(),
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(features, num_prototypes, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class PredictionHead(nn.Module):
    """Boxes, classes and mask coefficients of every prior, from one head for all levels.

    Args:
        in_channels: channels of every level.
        features: channels of the 3x3 convolution in front of the three outputs.
        num_anchors: priors at each position.
        num_classes: C.
        num_prototypes: k.
    """

    def __init__(self, in_channels: int, features: int, num_anchors: int, num_classes: int,
                 num_prototypes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.upfeature = nn.Sequential(nn.Conv2d(in_channels, features, 3, padding=1),
                                       nn.ReLU(inplace=True))
        self.bbox_layer = nn.Conv2d(features, num_anchors * 4, 3, padding=1)
        self.conf_layer = nn.Conv2d(features, num_anchors * num_classes, 3, padding=1)
        self.mask_layer = nn.Conv2d(features, num_anchors * num_prototypes, 3, padding=1)

    def forward(self, levels: List[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """Levels `[B,in,H_i,W_i]` -> loc `[B,P,4]`, conf `[B,P,C]` logits, mask `[B,P,k]` in -1..1.

        Priors run by level, row, column, anchor. The three output convolutions run as one, and the
        levels are joined before the outputs are split: an eighth of the operators of the plain
        spelling, forward and backward, with the same numbers.
        """
        layers = (self.bbox_layer, self.conf_layer, self.mask_layer)
        # Cast here, under autocast, and not for each level anew.
        kind = levels[0].dtype
        weight = torch.cat([layer.weight for layer in layers]).to(kind)
        bias = torch.cat([cast(Tensor, layer.bias) for layer in layers]).to(kind)
        outputs = []
        for level in levels:
            x = F.conv2d(self.upfeature(level), weight, bias, padding=1)
            outputs.append(x.flatten(2).transpose(1, 2))
        joined = torch.cat(outputs, 1)
        loc, conf, mask = joined.split([layer.out_channels for layer in layers], 2)
        batch = joined.shape[0]
        return (loc.reshape(batch, -1, 4), conf.reshape(batch, -1, self.num_classes),
                torch.tanh(mask).reshape(batch, -1, self.num_prototypes))
