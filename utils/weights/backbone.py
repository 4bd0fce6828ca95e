"""ImageNet weights for a backbone, from the files that the original and others publish."""

from __future__ import annotations

import os
import re
from typing import Dict, Sequence

from torch import nn

from utils.errors import UserError
from utils.weights.formats.darknet import DARKNET53
from utils.weights.files import read_weights
from utils.weights.loading import LoadReport, load_into_backbone


def load_backbone(backbone: nn.Module, path: str) -> LoadReport:
    """Set every weight of `backbone` from the file at `path`.

    Understands every kind of file that `utils.weights.files` reads: torchvision's names
    (`layer1.0.conv1.weight`), the backbone's own (`layers.0.0.conv1.weight`), DarkNet's binaries,
    and whole networks, whose backbone is taken. The classifier (`fc`) is left out, and batch
    counters may be missing, as they are in files older than torch 0.4.1.

    Raises:
        UserError: the file is missing or not a checkpoint, lacks a weight, or holds one of another
            shape. The backbone is unchanged then.
    """
    if not os.path.exists(path):
        raise UserError(
            "no backbone weights '{}': looked for {}; put the file there, or pass "
            "--backbone_weights none to train from scratch".format(
                os.path.basename(path), os.path.abspath(path)))
    return load_into_backbone(backbone, read_weights(path, _darknet_blocks(backbone)))


def _darknet_blocks(backbone: nn.Module) -> Sequence[int]:
    """Residual blocks of each stage, if it is a DarkNet."""
    blocks: Dict[int, int] = {}
    for name in backbone.state_dict():
        block = re.match(r"layers\.(\d+)\.(\d+)\.conv1\.0\.weight$", name)
        if block is not None:
            blocks[int(block.group(1))] = int(block.group(2))
    return tuple(blocks[stage] for stage in sorted(blocks)) or DARKNET53
