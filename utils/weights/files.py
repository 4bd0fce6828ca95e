"""Read a weights file of any known kind: recognise it by its content, not by its name.

    PyTorch       .pth     the original's, this project's, torchvision's; both of torch's formats
    safetensors
    Paddle        .pdparams
    DarkNet       .weights, .conv.74

Whatever the kind, tensors come under the network's own names (`utils.weights.names`).
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, TypeVar
from utils.errors import UserError
from utils.weights.pickles import ForbiddenName
from utils.weights.torch_file import read_torch_file
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
import torch
from torch import Tensor
from utils.weights.darknet import DARKNET53, looks_like_darknet, read_darknet
from utils.weights.paddle import read_pdparams
from utils.weights.safetensors import looks_like_safetensors, read_safetensors
from utils.weights.torch_file import MAGIC
from utils.weights.names import COUNTER, Contents, identify, own_names

_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"
_OTHER_PROGRAMS = ((b"\x89HDF", "an HDF5 file (Keras or TensorFlow)"),
                   (b"\x1f\x8b", "a gzip archive; unpack it first"),
                   (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
                   (b"Rar!", "a RAR archive; unpack it first"))

T = TypeVar("T")


def load_tensors(path: str) -> Dict[str, Any]:
    """Read a dictionary of tensors and plain values from PyTorch's format; tensors on the CPU.

    Nested dicts, lists and tuples are allowed, and so are int, float, bool, str, bytes and None.

    Raises:
        UserError: the file is missing, not a checkpoint, damaged, asks for anything but tensors
            and plain values, or does not hold a dictionary.
    """
    start = first_bytes(path)
    if not start.startswith((_ZIP_START, _PICKLE_START)):
        raise UserError("'{}' is not a PyTorch checkpoint (it starts with {!r}); expected a .pth "
                        "file written by torch.save".format(path, start[:16]))
    return expect_dictionary(guarded(read_torch_file, path), path)


def expect_dictionary(content: Any, path: str) -> Dict[str, Any]:
    """`content` if it is a dictionary, else a `UserError`."""
    if not isinstance(content, dict):
        raise UserError("'{}' holds a {}, expected a dictionary of tensors as state_dict() gives "
                        "it".format(path, type(content).__name__))
    return content


def guarded(read: Callable[[str], T], path: str) -> T:
    """`read(path)`, with a `UserError` for whatever a damaged or hostile file leads it into."""
    try:
        return read(path)
    except UserError:
        raise
    except ForbiddenName as error:
        raise UserError(
            "'{}' asks for '{}' to be called when it is read; nothing was run: a checkpoint holds "
            "only tensors and plain values, get it from a source you trust, or save its "
            "state_dict() again".format(path, error)) from error
    except Exception as error:
        raise UserError("'{}' cannot be read as a checkpoint ({}: {}); it is damaged, cut off, "
                        "or not a weights file: copy or download it again".format(
                            path, type(error).__name__, _first_line(error))) from error


def first_bytes(path: str, count: int = 512) -> bytes:
    """Start of a file; refuses what cannot be a weights file by its kind, saying what it is.

    Raises:
        UserError: the file is missing, a folder, not readable, empty, a web page, a Git LFS
            pointer, or another program's.
    """
    if os.path.isdir(path):
        raise UserError("'{}' is a folder, expected a weights file such as .pth".format(path))
    if not os.path.exists(path):
        raise UserError("no file '{}' (looked for {}); check the path".format(
            path, os.path.abspath(path)))
    try:
        with open(path, "rb") as stream:
            start = stream.read(count)
    except OSError as error:
        raise UserError("cannot read '{}': {}".format(path, error.strerror or error)) from error
    if not start:
        raise UserError("'{}' is empty; copy or download it again".format(path))
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise UserError("'{}' is a web page, not a checkpoint; the download got an error or a "
                        "consent page instead of the file, download it again".format(path))
    if text.startswith(b"version https://git-lfs"):
        raise UserError("'{}' is a Git LFS pointer, not the checkpoint itself; fetch it with "
                        "'git lfs pull'".format(path))
    for signature, what in _OTHER_PROGRAMS:
        if start.startswith(signature):
            raise UserError("'{}' is {}, expected a weights file such as .pth".format(path, what))
    return start


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


_SHOWN = 3


@dataclass
class WeightsFile:
    """Tensors on the CPU under the network's own names, with what is known about them.

    Attributes:
        path: of the file.
        kind: format of the file, for sentences.
        tensors: floating point, except for the batch counters.
        renamed: what was changed in the names, and an example of each.
        unused: names in the file that are no weights.
        warnings: sentences for the user.
        config: `Config.to_dict()` of the training, where the file holds it (safetensors can).
        class_names: foreground classes in order, where the file holds them.
    """

    path: str
    kind: str
    tensors: Dict[str, Tensor]
    renamed: Dict[str, str] = field(default_factory=dict)
    unused: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    config: Optional[Dict[str, Any]] = None
    class_names: Optional[List[str]] = None

    @property
    def contents(self) -> Optional[Contents]:
        """What the tensors belong to; None if to no network known here."""
        return identify(self.tensors)

    def __str__(self) -> str:
        contents = self.contents
        return "{} ({}{})".format(os.path.basename(self.path),
                                  "{}; ".format(contents) if contents else "", self.kind)


def read_weights(path: str, darknet_blocks: Sequence[int] = DARKNET53) -> WeightsFile:
    """Read a weights file of any known kind.

    Args:
        path: of the file; what it is called does not matter.
        darknet_blocks: residual blocks of each stage, for DarkNet's files, which do not say.

    Raises:
        UserError: the file is missing, of no known kind, damaged, hostile, without tensors by name,
            or has whole numbers where weights are expected.
    """
    kind, content, metadata = _read(path, darknet_blocks)
    tensors, renamed, unused = own_names(content, path)
    tensors, no_weights = _only_weights(tensors, path)
    config, class_names = _known_about(metadata, path)
    return WeightsFile(path, kind, tensors, renamed, unused + no_weights, _not_finite(tensors),
                       config, class_names)


def _read(path: str, darknet_blocks: Sequence[int]) -> Tuple[str, Dict[Any, Any], Dict[str, str]]:
    start = first_bytes(path)
    size = os.path.getsize(path)
    if start.startswith(b"PK\x03\x04") or (
            start.startswith(b"\x80") and start[2:].startswith(MAGIC)):
        return "PyTorch", load_tensors(path), {}
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "Paddle", expect_dictionary(guarded(read_pdparams, path), path), {}
    if looks_like_safetensors(start):
        tensors, metadata = guarded(read_safetensors, path)
        return "safetensors", tensors, metadata
    if looks_like_darknet(start, size):
        found, left = guarded(lambda path: read_darknet(path, darknet_blocks), path)
        content: Dict[Any, Any] = dict(found)
        if left:
            content["{} numbers behind the backbone".format(left)] = None
        return "DarkNet", content, {}
    raise UserError("'{}' is no known kind of weights file (it starts with {!r}); expected "
                    "PyTorch's .pth, .safetensors, Paddle's .pdparams or DarkNet's .weights".format(
                        path, start[:16]))


def _only_weights(tensors: Dict[str, Tensor], path: str) -> Tuple[Dict[str, Tensor], List[str]]:
    """Leave out single numbers such as an epoch; refuse arrays that are not floating point."""
    weights, others = {}, []
    for name, value in tensors.items():
        if value.is_floating_point() or name.endswith(COUNTER):
            weights[name] = value
        elif not value.dim():
            others.append(name)
        else:
            raise UserError("'{}' holds {} of type {}, expected floating-point weights; quantised "
                            "networks cannot be loaded, give the one before".format(
                                path, name, str(value.dtype)[len("torch."):]))
    return weights, others


def _not_finite(tensors: Mapping[str, Tensor]) -> List[str]:
    """A sentence if weights are NaN or infinite: a training that broke, seldom a wish."""
    bad = [name for name, value in tensors.items()
           if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())]
    if not bad:
        return []
    return ["Warning: {} of {} tensors hold NaN or infinite values (first: {}); the network will "
            "find nothing".format(len(bad), len(tensors), bad[0])]


def _known_about(metadata: Mapping[str, str],
                 path: str) -> Tuple[Optional[Dict[str, Any]], Optional[List[str]]]:
    """Configuration and class names from a file's metadata, written by `metadata_of`."""
    config, names = (_parse(metadata, key, path) for key in ("config", "class_names"))
    if config is not None and not isinstance(config, dict):
        raise UserError("'{}' has a configuration that is a {}".format(path, type(config).__name__))
    if names is not None and not (isinstance(names, list)
                                  and all(isinstance(name, str) for name in names)):
        raise UserError("'{}' has class names that are not a list of text".format(path))
    return config, names


def _parse(metadata: Mapping[str, str], key: str, path: str) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except (ValueError, RecursionError) as error:
        raise UserError("'{}' has metadata '{}' that is not JSON ({})".format(
            path, key, error)) from error


def metadata_of(config: Optional[Mapping[str, Any]],
                class_names: Optional[Sequence[str]]) -> Dict[str, str]:
    """Metadata that `read_weights` understands."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["config"] = json.dumps(config)
    if class_names is not None:
        metadata["class_names"] = json.dumps(list(class_names))
    return metadata


def some(names: Sequence[str]) -> str:
    """The first few names, for a sentence."""
    return ", ".join(names[:_SHOWN]) + (", .." if len(names) > _SHOWN else "")
