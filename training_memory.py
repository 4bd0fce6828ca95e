"""How much memory a training takes on a card, before it starts."""

from __future__ import annotations

import torch

from data.config import Config
from utils.memory import MemoryNeed, output_bytes
from utils.optimizer import FlatOptimizer
from yolact import Yolact, build_yolact

SAMPLE_SIDE = 138
"""Input side at which an estimate looks at the layers' outputs."""
WITHOUT_HOOKS = 1.05
"""Activations / outputs of layers: losses, batch and what lies between the layers."""
UPDATE_COPIES = 2.3
"""What the optimiser makes while it works (the flat gradient and a temporary), in sizes of all
trained parameters; the gradients themselves are one more. Both factors were read off the NPU
plugin's allocator."""


def estimate(config: Config, model: Yolact, optimizer: FlatOptimizer) -> MemoryNeed:
    """Memory of one card for training `model` in float32; nothing runs on the device.

    Against the peaks of the NPU plugin's allocator at 550 px: ResNets within 3 %, Darknet 15 % too
    low, YOLACT++ 30 % too low, whose deformable convolutions keep more than they put out.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    trained = optimizer.flat.numel() * optimizer.flat.element_size()
    fixed = parameters + buffers + trained * len(optimizer.buffer_names)
    return MemoryNeed(fixed, int(_outputs_per_image(config, model) * WITHOUT_HOOKS),
                      int(fixed + trained * UPDATE_COPIES))


def _outputs_per_image(config: Config, model: Yolact) -> float:
    """Bytes of the layers' outputs; they grow with the area of the input, so a small one is run."""
    twin = build_yolact(_shrunk(config))
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    if model.bn_frozen:
        twin.freeze_bn()
    image = torch.zeros(1, 3, twin.input_size, twin.input_size, dtype=torch.uint8)
    return output_bytes(twin, lambda: twin(image)) * (config.max_size / twin.input_size) ** 2


def _shrunk(config: Config) -> Config:
    side = min(SAMPLE_SIDE, config.max_size)
    scales = tuple(tuple(s * side / config.max_size for s in level) for level in config.pred_scales)
    return config.replace(max_size=side, pred_scales=scales, use_maskiou=False)
