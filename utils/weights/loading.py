"""Put a file's weights into a network: all of them, or for fine-tuning all but the classes' own."""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError, printable, some
from utils.weights.files import WeightsFile, read_weights
from utils.weights.names import COUNTER

_HEAD = re.compile(r"^prediction_layers\.\d+\.conf_layer\.|^semantic_seg_conv\.")
_RESCORING = re.compile(r"^maskiou_net\.maskiou_net\.(\d+)\.")
_DEFORMABLE = re.compile(r"\.conv2\.(bias|conv_offset_mask\.(weight|bias))$")
# The original's early files have pyramid levels that it drops, and classifiers are of no use.
_SUPERFLUOUS = re.compile(r"^fpn\.downsample_layers\.\d+\.|^(backbone\.)?fc\.")


class LoadReport(NamedTuple):
    """What loading did, tensor by tensor."""

    source: WeightsFile
    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    """Tensors of the network that keep their initial values."""
    unused: tuple[str, ...]
    """Names in the file that have no place in the network."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"] if self.loaded else []
        if self.source.renamed:
            parts.append(f"renamed ({'; '.join(self.source.renamed)})")
        if self.reinitialised:
            parts.append(f"{len(self.reinitialised)} re-initialised "
                         f"({', '.join(self.reinitialised)})")
        if self.unused:
            parts.append(f"{len(self.unused)} unused ({some(self.unused)})")
        first = f"{self.source}: {'; '.join(parts)}" if parts else str(self.source)
        return "\n".join(map(printable, [first] + self.source.warnings))


def load_network(model: nn.Module, source: WeightsFile, fresh: Sequence[str] = ()) -> LoadReport:
    """Set every tensor of `model` but `fresh` from a file of the same network with the same class
    count.

    Batch counters may be missing. Nothing is changed where the file does not fit.

    Raises:
        UserError: tensors are missing or foreign, or shapes differ (another class count, for one);
            names the first of them.
    """
    own = model.state_dict()
    missing, foreign, wrong = _differences(own, source, fresh)
    if missing or foreign:
        lists = [f"{len(names)} {what}" + (f" (first: {some(names)})" if names else "")
                 for what, names in (("tensors missing", missing), ("unknown", foreign))]
        what = f"the file is {source.contents}, " if source.contents else ""
        raise UserError(f"'{source.path}' does not hold this network: {', '.join(lists)}; "
                        f"{what}check --config")
    if wrong:
        name = next((name for name in wrong if "conf_layer.weight" in name), list(wrong)[0])
        semantic, hint = "semantic_seg_conv.weight", "check --config"
        if semantic in wrong:
            hint = (f"the file was trained for {len(source.tensors[semantic])} classes, the "
                    f"dataset has {len(own[semantic])}: give it with --weights to train on from it")
        raise UserError(f"'{source.path}' does not fit this network: {wrong[name]} "
                        f"({len(wrong)} tensors differ); {hint}")
    return _copy(own, source, fresh)


def load_for_fine_tuning(model: nn.Module, source: WeightsFile,
                         class_names: Sequence[str]) -> LoadReport:
    """Set the tensors of `model` from weights that may have been trained for other classes.

    With other classes the layers that belong to them keep their initial values: class scores,
    semantic segmentation, and the last layer of mask re-scoring. The classes are others if their
    number differs, or if the names of both are known and differ. `model` is newly built, for the
    classes `class_names` of the data to train on.

    Raises:
        UserError: the file belongs to another recipe, or is a backbone alone.
    """
    contents = source.contents
    if contents is not None and not contents.is_network:
        raise UserError(f"'{source.path}' holds a {contents.backbone} alone, expected weights of a "
                        "whole network; give it with --backbone_weights")
    other_classes = contents is not None and (contents.num_classes != len(class_names) or (
        source.class_names is not None and source.class_names != list(class_names)))
    fresh = class_dependent(list(model.state_dict())) if other_classes else []
    return load_network(model, source, fresh)


def load_backbone(backbone: nn.Module, path: str) -> LoadReport:
    """Set every weight of `backbone` from the file at `path`.

    Understands every kind of file that `utils.weights.files` reads: torchvision's names
    (`layer1.0.conv1.weight`), the backbone's own (`layers.0.0.conv1.weight`), DarkNet's binaries,
    and whole networks, whose backbone is taken. The classifier (`fc`) is left out, and batch
    counters may be missing, as they are in files older than torch 0.4.1. Deformable convolutions
    take the kernels of plain ones and keep their own initial values for what plain ones lack.

    Raises:
        UserError: the file is missing or not a checkpoint, lacks a weight, or holds one of another
            shape. The backbone is unchanged then.
    """
    if not os.path.exists(path):
        raise UserError(f"no backbone weights '{os.path.basename(path)}': looked for "
                        f"{os.path.abspath(path)}; put the file there, or pass --backbone_weights "
                        "none to train from scratch")
    source = read_weights(path)
    if source.contents is not None and source.contents.is_network:
        prefix = "backbone."
        source = WeightsFile(path, f"backbone of {source.contents}", {
            name[len(prefix):]: value for name, value in source.tensors.items()
            if name.startswith(prefix)}, source.renamed, source.unused, source.warnings)
    own = backbone.state_dict()
    fresh = [name for name in own if _DEFORMABLE.search(name) and name not in source.tensors]
    missing, _, wrong = _differences(own, source, fresh)
    for problem, names in ((f"lacks {len(missing)} of the weights of this backbone", missing),
                           (f"has {len(wrong)} weights of another shape", list(wrong.values()))):
        if names:
            raise UserError(f"'{path}' {problem} ({some(names)}); it belongs to another backbone, "
                            "choose the file that the configuration names")
    report = _copy(own, source, fresh)
    return report._replace(unused=tuple(name for name in report.unused
                                        if not name.startswith("fc.")))


def class_dependent(names: Sequence[str]) -> list[str]:
    """Those of a network's tensors whose meaning depends on the classes."""
    layers = [int(match.group(1)) for match in map(_RESCORING.match, names) if match]
    last = f"maskiou_net.maskiou_net.{max(layers)}." if layers else None
    return [name for name in names
            if _HEAD.match(name) or (last is not None and name.startswith(last))]


def _differences(own: dict[str, Tensor], source: WeightsFile,
                 fresh: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Names that the file lacks, that are foreign to the network, and phrases of other shapes."""
    missing = [name for name in own if name not in source.tensors and name not in fresh
               and not name.endswith(COUNTER)]
    foreign = [name for name in source.tensors if name not in own and not _SUPERFLUOUS.match(name)]
    wrong = {name: f"{name} is {list(source.tensors[name].shape)}, expected {list(value.shape)}"
             for name, value in own.items() if name in source.tensors and name not in fresh
             and source.tensors[name].shape != value.shape}
    return missing, foreign, wrong


def _copy(own: dict[str, Tensor], source: WeightsFile, fresh: Sequence[str]) -> LoadReport:
    """Copy what is in both, except `fresh`, into the tensors that `own` refers to."""
    loaded = [name for name in own if name in source.tensors and name not in fresh]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(source.tensors[name])
    unused = [name for name in source.tensors if name not in own] + source.unused
    return LoadReport(source, tuple(loaded), tuple(fresh), tuple(unused))
