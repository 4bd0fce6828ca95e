"""The network: backbone -> feature pyramid -> prototypes and the shared head (Bolya et al., 2019).

Letters: B batch, S input side, P priors, C classes with background, k prototypes, h x w prototype
size, hs x ws semantic size.
"""

from __future__ import annotations

import copy
from typing import Any, Sequence, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from backbone import BatchNorm2d, DarkNet, ResNet, build_backbone
from data.config import Config
from layers.anchors import make_priors
from layers.deform_conv import DeformConv2d
from layers.heads import FPN, MaskIouNet, PredictionHead, ProtoNet


class Yolact(nn.Module):
    """YOLACT as `build_yolact` puts it together.

    `state_dict()` has the keys of dbolya/yolact. The priors and the pixel statistics follow the
    module's device, stay float32 and are not in it. `bn_frozen` tells whether `freeze_bn`
    was called.

    Args:
        backbone: gives the feature maps that `fpn` takes.
        fpn: pyramid; its finest level feeds `proto_net` and the semantic branch.
        proto_net: prototype masks.
        head: shared by all levels.
        priors: float32 `[P,4]` cx cy w h of every input side that `forward` takes.
        features: channels of the pyramid levels.
        num_classes: C.
        input_size: S; the side of images in evaluation.
        pixel_mean, pixel_std: RGB in 0..255, applied to uint8 images.
        maskiou_net: re-scores masks (YOLACT++). `forward` does not run it: in training the loss
            does, in evaluation `layers.masks.mask_scores`, both with masks that `forward` does
            not have. None without mask re-scoring.
    """

    def __init__(self, backbone: ResNet | DarkNet, fpn: FPN, proto_net: ProtoNet,
                 head: PredictionHead, priors: dict[int, Tensor], features: int, num_classes: int,
                 input_size: int, pixel_mean: Sequence[float],
                 pixel_std: Sequence[float], maskiou_net: MaskIouNet | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.proto_net = proto_net
        self.maskiou_net = maskiou_net
        self.fpn = fpn
        # A list of one: the original names the head it shares over the levels `.0`.
        self.prediction_layers = nn.ModuleList([head])
        self.semantic_seg_conv = nn.Conv2d(features, num_classes - 1, 1)
        self.input_size = input_size
        self.channels_last = False  # in memory, whatever the images come in; not its shapes
        # Plain attributes, moved by `_apply`: non-persistent buffers do not exist on torch 1.5.
        self.priors = dict(priors)
        self.pixel_mean = torch.tensor(pixel_mean, dtype=torch.float32).view(1, 3, 1, 1)
        self.pixel_std = torch.tensor(pixel_std, dtype=torch.float32).view(1, 3, 1, 1)
        self.bn_frozen = False
        self._frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predict from images `[B,3,S,S]` RGB.

        uint8 images are normalised here; float images are taken as normalised already.

        Returns:
            loc: `[B,P,4]` regression outputs, see `layers.box_ops.decode`.
            conf: `[B,P,C]` logits, class 0 is background.
            mask: `[B,P,k]` mask coefficients in -1..1.
            proto: `[B,h,w,k]` prototype masks, 0 or more.
            priors: `[P,4]` cx cy w h.
            segm: `[B,C-1,hs,ws]` semantic logits, in training mode only.
        """
        height, side = (int(length) for length in images.shape[2:])  # tensors where it is traced
        if height != side or side not in self.priors:
            raise ValueError(f"images are {list(images.shape)}, expected [B, 3, {self.input_size}, "
                             f"{self.input_size}]")
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).sub_(self.pixel_mean).div_(self.pixel_std)
        # Normalised in float32; parameters in half precision then want images of their type.
        images = images.to(self.semantic_seg_conv.weight.dtype)
        levels = self.fpn(self.backbone(images))
        loc, conf, mask = self.prediction_layers[0](levels)
        predictions = {"loc": loc, "conf": conf, "mask": mask, "proto": self.proto_net(levels[0]),
                       "priors": self.priors[side]}
        if self.training:
            predictions["segm"] = self.semantic_seg_conv(levels[0])
        return predictions

    def use_channels_last(self) -> None:
        """Compute with the channels last in memory; changes rounding alone.

        One thread of a CPU would have MKL do convolutions of one pixel as products of matrices,
        which took twice as long as oneDNN on an AMD EPYC. PyTorch leaves dilated ones to oneDNN, as
        it does all with more threads, and to one pixel a dilation is nothing.
        """
        self.channels_last = True
        if self.semantic_seg_conv.weight.device.type == "cpu" and torch.backends.mkl.is_available():
            for module in self.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                    module.dilation = (2, 2)

    def freeze_bn(self) -> None:
        """Fix batch normalisation: running statistics, no gradient for weight and bias.

        Stays so across `train()`. For pretrained backbones with small batches; from scratch the
        running statistics mean nothing.
        """
        self.bn_frozen = True
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.eval()
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)

    def freeze_backbone(self, stages: int | None = None) -> None:
        """Fix the backbone, or its stem and first `stages` stages; stays so across `train()`.

        Parameters have no gradient, batch normalisation uses its running statistics.
        """
        backbone = self.backbone
        stem = [child for child in backbone.children() if child is not backbone.layers]
        self._frozen = [backbone] if stages is None else stem + list(backbone.layers)[:stages]
        for module in self._frozen:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Yolact:
        """Set the mode of every module, except of what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self.bn_frozen:
            self.freeze_bn()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Yolact:
        super()._apply(*args, **kwargs)
        device = self.semantic_seg_conv.weight.device
        self.priors = {side: priors.to(device) for side, priors in self.priors.items()}
        self.pixel_mean = self.pixel_mean.to(device)
        self.pixel_std = self.pixel_std.to(device)
        return self


def for_inference(network: Yolact) -> Yolact:
    """A copy in evaluation mode, without gradients, with batch normalisation in the convolutions.

    It has another `state_dict` than the network, and results that differ from it by rounding.
    """
    ready = copy.deepcopy(network).eval()
    for module in list(ready.modules()):
        children = list(module.named_children())
        for (_, first), (name, second) in zip(children, children[1:]):
            if isinstance(first, (nn.Conv2d, DeformConv2d)) and isinstance(second, BatchNorm2d):
                first.weight, first.bias = fuse_conv_bn_weights(
                    first.weight, first.bias, cast(Tensor, second.running_mean),
                    cast(Tensor, second.running_var), second.eps, second.weight, second.bias)
                setattr(module, name, nn.Identity())
    return ready.requires_grad_(False)


def _init_xavier(network: Yolact) -> None:
    """Initial weights of everything but the backbone, as in the original."""
    inside_backbone = set(network.backbone.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module not in inside_backbone:
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))


def build_yolact(config: Config) -> Yolact:
    """Build the network of `config` with random weights, in training mode, on the CPU."""
    backbone = build_backbone(config)
    features = config.fpn_features
    network = Yolact(
        backbone=backbone,
        fpn=FPN([backbone.channels[stage] for stage in config.selected_layers], features,
                config.fpn_num_downsample),
        proto_net=ProtoNet(features, config.proto_features, config.num_prototypes),
        head=PredictionHead(features, config.head_features, config.num_anchors,
                            config.num_classes, config.num_prototypes),
        priors={side: make_priors(config.at_side(side))
                for side in (config.max_size, *config.multi_scale)},
        features=features, num_classes=config.num_classes,
        input_size=config.max_size, pixel_mean=config.pixel_mean, pixel_std=config.pixel_std,
        maskiou_net=MaskIouNet(config.num_classes) if config.use_maskiou else None)
    _init_xavier(network)
    return network
