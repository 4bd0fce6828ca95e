"""ImageNet weights for a backbone, from the files that the original and torchvision publish."""

from __future__ import annotations

import os
import re
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.safe_load import load_tensors

_SHOWN = 3


class BackboneReport(NamedTuple):
    """What `load_backbone` did."""

    path: str
    """File that was read, absolute."""
    loaded: int
    """Tensors of the backbone that were set."""
    unused: Tuple[str, ...]
    """Names in the file that the backbone has no place for; the classifier is not counted."""

    def __str__(self) -> str:
        left_out = ", {} names unused ({})".format(
            len(self.unused), _some(self.unused)) if self.unused else ""
        return "{} tensors from {}{}".format(self.loaded, self.path, left_out)


def load_backbone(backbone: nn.Module, path: str) -> BackboneReport:
    """Set every weight of `backbone` from the file at `path`.

    Understands torchvision's names (`layer1.0.conv1.weight`), the backbone's own
    (`layers.0.0.conv1.weight`), a `module.` in front of either, and a dictionary that holds them
    under `state_dict`. The classifier (`fc`) is left out, and batch counters may be missing, as
    they are in files older than torch 0.4.1.

    Raises:
        UserError: the file is missing or not a checkpoint, lacks a weight, or holds one of another
            shape. The backbone is unchanged then.
    """
    if not os.path.exists(path):
        raise UserError(
            "no backbone weights '{}': looked for {}; put the file there, or pass "
            "--backbone_weights none to train from scratch".format(
                os.path.basename(path), os.path.abspath(path)))
    found = _rename(load_tensors(path), path)
    own = backbone.state_dict()
    needed = [name for name in own if not name.endswith(".num_batches_tracked")]
    missing = [name for name in needed if name not in found]
    if missing:
        raise UserError("'{}' lacks {} of the {} weights of this backbone ({}); it belongs to "
                        "another backbone, choose the file that the configuration names".format(
                            path, len(missing), len(needed), _some(missing)))
    wrong = ["{} is {}, expected {}".format(name, list(found[name].shape), list(own[name].shape))
             for name in own if name in found and found[name].shape != own[name].shape]
    if wrong:
        raise UserError("'{}' has {} weights of another shape ({}); it belongs to another "
                        "backbone, choose the file that the configuration names".format(
                            path, len(wrong), _some(wrong)))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in found:
                tensor.copy_(found[name])
    return BackboneReport(path=os.path.abspath(path),
                          loaded=sum(name in found for name in own),
                          unused=tuple(name for name in found if name not in own))


def _rename(content: Dict[str, Any], path: str) -> Dict[str, Tensor]:
    """Weights under the backbone's own names, without the classifier."""
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError("'{}' holds a {} under {!r}, expected tensors by name; it is not a "
                            "backbone's weights".format(path, type(value).__name__, name))
        if name.startswith("module."):
            name = name[len("module."):]
        if name.startswith("fc."):
            continue
        name = re.sub(r"^layer(\d+)\.", lambda match: "layers.{}.".format(int(match.group(1)) - 1),
                      name)
        found[name] = value
    return found


def _some(items: Sequence[str]) -> str:
    more = ", ..." if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
