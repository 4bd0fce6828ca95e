"""Names of tensors: from what other programs write to the network's own, and what they tell.

The network's own names are those of dbolya/yolact: `backbone.layers.0.0.conv1.weight`; a backbone
alone has them without `backbone.`, and torchvision's `layer1.0.conv1.weight` becomes
`layers.0.0.conv1.weight`.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError

COUNTER = ".num_batches_tracked"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights", "params",
             "ema_state_dict", "state_dict_ema", "model_ema", "ema", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.", "yolact.")
_STAGE = re.compile(r"^(backbone\.)?layer(\d+)\.")
_PADDLE_RULE = "_mean, _variance -> running_mean, running_var"
_RUN_STATE = {"format", "config", "class_names"}


class NamedTensors(NamedTuple):
    """A file's tensors under the network's own names."""

    tensors: dict[str, Tensor]
    renamed: list[str]
    """What was changed in the names."""
    unused: list[str]
    """Names in the file that are no weights, or stand for the same tensor as another."""


def own_names(content: Mapping[Any, Any], path: str) -> NamedTensors:
    """Take the tensors out of a file's content and give them the network's own names.

    Raises:
        UserError: there are no tensors by name.
    """
    content, unused = _unwrap(content, path)
    found = {name: value for name, value in content.items()
             if isinstance(name, str) and isinstance(value, Tensor)}
    unused += [str(name) for name in content if name not in found]
    if not found:
        name, value = next(iter(content.items()), ("nothing", None))
        raise UserError(f"'{path}' holds a {type(value).__name__} under {str(name)[:40]!r}, "
                        "expected tensors by name; it is not a network's weights")
    renamed: list[str] = []
    for _ in _PREFIXES:  # wrappers put their prefixes before one another's
        for prefix in _PREFIXES:
            inside = {name[len(prefix):]: value for name, value in found.items()
                      if name.startswith(prefix)}
            # A criterion or an average may have tensors of its own beside the network's.
            if len(inside) == len(found) or not _network(found) and _network(inside):
                renamed.append(f"'{prefix}' removed")
                unused += [name for name in found if not name.startswith(prefix)]
                found = inside
    result: dict[str, Tensor] = {}
    for name, value in found.items():
        own, rule = _own_name(name)
        if own != name and own in found:  # the original's early files have every stage twice
            unused.append(name)
            continue
        result[own] = value
        if rule and rule not in renamed:
            renamed.append(rule)
        counter = own[:-len(".running_var")] + COUNTER
        if rule == _PADDLE_RULE and own.endswith(".running_var") and counter not in found:
            result[counter] = torch.zeros((), dtype=torch.int64)
    return NamedTensors(result, renamed, unused)


def _network(names: Iterable[str]) -> bool:
    """Whether the names are, at least in part, those of a whole network."""
    return any(name.startswith("backbone.") for name in names)


def _unwrap(content: Mapping[Any, Any], path: str,
            levels: int = 3) -> tuple[Mapping[Any, Any], list[str]]:
    """The state dict inside a checkpoint, and the names of what stands beside it.

    Where there are weights and their average (EMA), it is the weights.
    """
    if set(content) >= _RUN_STATE:
        raise UserError(f"'{path}' is the state of a training run and holds no weights; give the "
                        ".pth file beside it")
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if not isinstance(inner, dict) or not levels:
            continue
        tensors, unused = _unwrap(inner, path, levels - 1)
        if any(isinstance(value, Tensor) for value in tensors.values()):
            return tensors, unused + [str(name) for name in content if name != wrapper]
    return content, []


def _own_name(name: str) -> tuple[str, str]:
    """The network's own name, and what was changed."""
    stage = _STAGE.match(name)
    if stage is not None:
        return (f"{stage.group(1) or ''}layers.{int(stage.group(2)) - 1}.{name[stage.end():]}",
                "layer1.. -> layers.0..")
    for paddle, own in (("._mean", ".running_mean"), ("._variance", ".running_var")):
        if name.endswith(paddle):
            return name[:-len(paddle)] + own, _PADDLE_RULE
    return name, ""


def paddle_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as a Paddle network has them; batch counters that count nothing are left out."""
    result = {}
    for name, value in tensors.items():
        if name.endswith(COUNTER) and int(value) == 0:
            continue
        name = re.sub(r"\.running_mean$", "._mean", name)
        result[re.sub(r"\.running_var$", "._variance", name)] = value
    return result


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in published files: a ResNet alone has torchvision's."""
    if "conv1.weight" not in tensors:
        return dict(tensors)
    return {re.sub(r"^layers\.(\d+)\.", lambda stage: f"layer{int(stage.group(1)) + 1}.", name):
            value for name, value in tensors.items()}


class Contents(NamedTuple):
    """What a set of tensors is, by its names."""

    is_network: bool
    """A whole YOLACT; else a backbone alone."""
    backbone: str
    num_classes: int | None
    """Foreground classes of a network."""
    is_plus: bool

    def __str__(self) -> str:
        if not self.is_network:
            return f"{self.backbone} backbone"
        return (f"YOLACT{'++' if self.is_plus else ''}, {self.backbone}, {self.num_classes} "
                "classes")


def identify(tensors: Mapping[str, Tensor]) -> Contents | None:
    """What the tensors belong to, or None."""
    semantic = tensors.get("semantic_seg_conv.weight")
    is_network = (semantic is not None and semantic.dim() > 0
                  and "prediction_layers.0.conf_layer.weight" in tensors)
    backbone = _identify_backbone(tensors, "backbone." if is_network else "")
    if backbone is None:
        return None
    is_plus = any(".conv_offset_mask." in name or name.startswith("maskiou_net.")
                  for name in tensors)
    classes = len(semantic) if is_network and semantic is not None else None
    return Contents(is_network, backbone, classes, is_plus)


def _identify_backbone(tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    if prefix + "_preconv.0.weight" in tensors:
        return "DarkNet"
    if prefix + "conv1.weight" not in tensors or prefix + "layers.0.0.conv1.weight" not in tensors:
        return None
    pattern = re.compile(re.escape(prefix) + r"layers\.\d+\.\d+\.conv1\.weight$")
    blocks = sum(pattern.match(name) is not None for name in tensors)
    if prefix + "layers.0.0.conv3.weight" not in tensors:
        return "ResNet of basic blocks"
    # A stem and a classifier around three convolutions a block give a ResNet its number.
    return f"ResNet-{3 * blocks + 2}"
