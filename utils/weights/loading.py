"""Put a file's weights into a network: all of them, or for fine-tuning all but the classes' own."""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple
import torch
from torch import Tensor, nn
from utils.errors import UserError
from utils.weights.files import WeightsFile, some
from utils.weights.names import COUNTER
import os
from typing import Dict, Sequence
from torch import nn
from utils.weights.darknet import DARKNET53
from utils.weights.files import read_weights

_HEAD = re.compile(r"^prediction_layers\.\d+\.conf_layer\.|^semantic_seg_conv\.")
_RESCORING = re.compile(r"^maskiou_net\.maskiou_net\.(\d+)\.")
_DEFORMABLE = re.compile(r"\.conv2\.(bias|conv_offset_mask\.(weight|bias))$")
# The original's early files have pyramid levels that it drops, and classifiers are of no use.
_SUPERFLUOUS = re.compile(r"^fpn\.downsample_layers\.\d+\.|^(backbone\.)?fc\.")


class LoadReport(NamedTuple):
    """What loading did, tensor by tensor."""

    source: WeightsFile
    loaded: Tuple[str, ...]
    reinitialised: Tuple[str, ...]
    """Tensors of the network that keep their initial values."""
    unused: Tuple[str, ...]
    """Names in the file that have no place in the network."""

    def __str__(self) -> str:
        parts = ["{} tensors loaded".format(len(self.loaded))]
        if self.source.renamed:
            parts.append("renamed ({})".format("; ".join(self.source.renamed)))
        if self.reinitialised:
            parts.append("{} re-initialised ({})".format(len(self.reinitialised),
                                                         ", ".join(self.reinitialised)))
        if self.unused:
            parts.append("{} unused ({})".format(len(self.unused), some(self.unused)))
        return "\n".join(["{}: {}".format(self.source, "; ".join(parts))]
                         + self.source.warnings)


def load_network(model: nn.Module, source: WeightsFile) -> LoadReport:
    """Set every tensor of `model` from a file of the same network with the same class count.

    Batch counters may be missing. Nothing is changed where the file does not fit.

    Raises:
        UserError: tensors are missing or foreign, or shapes differ (another class count, for one);
            names the first of them.
    """
    own, found = model.state_dict(), source.tensors
    _check_names(source, own, [])
    wrong = _of_other_shape(own, found)
    if wrong:
        raise _misfit(source, own, wrong)
    return _copy(own, source, [])


def load_for_fine_tuning(model: nn.Module, source: WeightsFile, num_classes: int,
                         class_names: Sequence[str],
                         known_names: Optional[Sequence[str]] = None) -> LoadReport:
    """Set the tensors of `model` from weights that may have been trained for other classes.

    With other classes the layers that belong to them keep their initial values: class scores,
    semantic segmentation, and the last layer of mask re-scoring. The classes are others if their
    number differs, or if the names of both are known and differ.

    Args:
        model: newly built.
        source: weights of the same recipe.
        num_classes: foreground classes of `model`.
        class_names: of the data to train on.
        known_names: of the data that the weights were trained on, if they are known.

    Raises:
        UserError: the file belongs to another recipe, or is a backbone alone.
    """
    contents = source.contents
    if contents is not None and not contents.is_network:
        raise UserError("'{}' holds a {} alone, expected weights of a whole network; give it with "
                        "--backbone_weights".format(source.path, contents.backbone))
    own, found = model.state_dict(), source.tensors
    of_classes = class_dependent(list(own))
    other_classes = contents is not None and (contents.num_classes != num_classes or (
        known_names is not None and list(known_names) != list(class_names)))
    fresh = of_classes if other_classes else []
    _check_names(source, own, fresh)
    wrong = [name for name in _of_other_shape(own, found) if name not in fresh]
    if wrong:
        raise _misfit(source, own, wrong)
    return _copy(own, source, fresh)


def load_into_backbone(backbone: nn.Module, source: WeightsFile) -> LoadReport:
    """Set every tensor of a backbone from ImageNet weights, or from those of a whole network.

    Deformable convolutions take the kernels of plain ones and keep their own initial values for
    what plain ones do not have.

    Raises:
        UserError: weights are missing or have another shape. The backbone is unchanged then.
    """
    if source.contents is not None and source.contents.is_network:
        source = _part(source, "backbone.")
    own = backbone.state_dict()
    missing = [name for name in own if name not in source.tensors and not name.endswith(COUNTER)]
    fresh = [name for name in missing if _DEFORMABLE.search(name)]
    missing = [name for name in missing if name not in fresh]
    if missing:
        raise UserError("'{}' lacks {} of the {} weights of this backbone ({}); it belongs to "
                        "another backbone, choose the file that the configuration names".format(
                            source.path, len(missing),
                            sum(not name.endswith(COUNTER) for name in own), some(missing)))
    wrong = ["{} is {}, expected {}".format(
        name, list(source.tensors[name].shape), list(own[name].shape))
        for name in _of_other_shape(own, source.tensors)]
    if wrong:
        raise UserError("'{}' has {} weights of another shape ({}); it belongs to another "
                        "backbone, choose the file that the configuration names".format(
                            source.path, len(wrong), some(wrong)))
    report = _copy(own, source, fresh)
    return report._replace(unused=tuple(name for name in report.unused
                                        if not name.startswith("fc.")))


def class_dependent(names: Sequence[str]) -> List[str]:
    """Those of a network's tensors whose meaning depends on the classes."""
    layers = [int(match.group(1)) for match in map(_RESCORING.match, names) if match]
    last = "maskiou_net.maskiou_net.{}.".format(max(layers)) if layers else None
    return [name for name in names
            if _HEAD.match(name) or (last is not None and name.startswith(last))]


def _part(source: WeightsFile, prefix: str) -> WeightsFile:
    tensors = {name[len(prefix):]: value for name, value in source.tensors.items()
               if name.startswith(prefix)}
    return WeightsFile(source.path, "{} of {}".format(prefix[:-1], source.contents), tensors,
                       source.renamed, source.unused, source.warnings)


def _check_names(source: WeightsFile, own: Dict[str, Tensor], fresh: Sequence[str]) -> None:
    found = source.tensors
    missing = [name for name in own
               if name not in found and not name.endswith(COUNTER) and name not in fresh]
    foreign = [name for name in found if name not in own and not _SUPERFLUOUS.match(name)]
    if missing or foreign:
        contents = source.contents
        raise UserError(
            "'{}' does not hold this network: {} tensors missing{}, {} unknown{}; {}check --config"
            .format(source.path, len(missing), _first(missing), len(foreign), _first(foreign),
                    "the file is {}, ".format(contents) if contents else ""))


def _first(names: List[str]) -> str:
    return " (first: {})".format(some(names)) if names else ""


def _of_other_shape(own: Dict[str, Tensor], found: Dict[str, Tensor]) -> List[str]:
    return [name for name, value in own.items()
            if name in found and found[name].shape != value.shape]


def _misfit(source: WeightsFile, own: Dict[str, Tensor], wrong: List[str]) -> UserError:
    found = source.tensors
    name = next((name for name in wrong if "conf_layer.weight" in name), wrong[0])
    semantic, hint = "semantic_seg_conv.weight", "check --config"
    if semantic in wrong:
        hint = ("the file was trained for {} classes, the dataset has {}: give it with --weights "
                "to train on from it".format(len(found[semantic]), len(own[semantic])))
    return UserError(
        "'{}' does not fit this network: {} is {}, expected {} ({} tensors differ); {}".format(
            source.path, name, list(found[name].shape), list(own[name].shape), len(wrong), hint))


def _copy(own: Dict[str, Tensor], source: WeightsFile, fresh: Sequence[str]) -> LoadReport:
    """Copy what is in both, except `fresh`, into the tensors that `own` refers to."""
    skipped = set(fresh)
    loaded = [name for name in own if name in source.tensors and name not in skipped]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(source.tensors[name])
    taken = set(own)
    unused = [name for name in source.tensors if name not in taken] + source.unused
    return LoadReport(source, tuple(loaded), tuple(fresh), tuple(unused))


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
