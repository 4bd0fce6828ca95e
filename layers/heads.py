"""What stands on the backbone: feature pyramid, prototype masks, the head shared by all levels, and
the network that re-scores masks.

Letters: B batch, P priors, C classes with background, k prototypes, H x W size of a level.
"""

from __future__ import annotations

from typing import Sequence, cast

import torch
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

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
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

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
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


class MaskIouNet(nn.Module):
    """IoU of a soft mask with its object's true mask, were the object of each class.

    The mask re-scoring of YOLACT++ (Bolya et al., 2020, section 6): 3x3 convolutions with stride 2,
    a 1x1 convolution to C-1 and the maximum over what is left of the mask. They have no padding, so
    that masks need 63 pixels a side.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 1
        for features in (8, 16, 32, 64, 128):
            layers += [nn.Conv2d(previous, features, 3, stride=2), nn.ReLU(inplace=True)]
            previous = features
        layers += [nn.Conv2d(previous, num_classes - 1, 1), nn.ReLU(inplace=True)]
        self.maskiou_net = nn.Sequential(*layers)

    def forward(self, masks: Tensor) -> Tensor:
        """Soft masks `[n,1,h,w]` in 0..1, zero outside of their boxes -> `[n,C-1]`, 0 or more."""
        # Where the parameters are in half precision, the loss that this is called from is not.
        x = self.maskiou_net(masks.to(next(self.parameters()).dtype))
        return F.max_pool2d(x, x.shape[2:]).flatten(1).to(masks.dtype)
