"""Read a weights file of any known kind: recognise it by its content, not by its name.

    PyTorch       .pth     the original's, this project's, torchvision's; both of torch's formats
    safetensors
    Paddle        .pdparams
    DarkNet       .weights, .conv.74

Whatever the kind, tensors come under the network's own names (`utils.weights.names`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from utils.errors import UserError
from utils.weights import type_name
from utils.weights.darknet import looks_like_darknet, read_darknet
from utils.weights.names import COUNTER, Contents, identify, own_names
from utils.weights.paddle import read_pdparams
from utils.weights.pickles import ForbiddenName
from utils.weights.safetensors import looks_like_safetensors, read_safetensors
from utils.weights.torch_file import MAGIC, ZIP_START, read_torch_file

_PICKLE_START = b"\x80"


def load_tensors(path: str) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values from PyTorch's format; tensors on the CPU.

    Nested dicts, lists and tuples are allowed, and so are int, float, bool, str, bytes and None.

    Raises:
        UserError: the file is missing, not a checkpoint, damaged, asks for anything but tensors
            and plain values, or does not hold a dictionary.
    """
    start = _first_bytes(path)
    if not start.startswith((ZIP_START, _PICKLE_START)):
        raise UserError(f"'{path}' is not a PyTorch checkpoint (it starts with {start[:16]!r}); "
                        "expected a .pth file written by torch.save")
    return _dictionary(read_torch_file, path)


def _dictionary(read: Callable[[str], Any], path: str) -> dict[str, Any]:
    content = _guarded(read, path)
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, expected a dictionary of "
                        "tensors as state_dict() gives it")
    return content


def _guarded(read: Callable[[str], Any], path: str) -> Any:
    """`read(path)`, with a `UserError` for whatever a damaged or hostile file leads it into."""
    try:
        return read(path)
    except UserError:
        raise
    except ForbiddenName as error:
        raise UserError(
            f"'{path}' asks for '{error}' to be called when it is read; nothing was run: a "
            "checkpoint holds only tensors and plain values, get it from a source you trust, or "
            "save its state_dict() again") from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:200] if lines else "no reason given"
        raise UserError(f"'{path}' cannot be read as a checkpoint ({type(error).__name__}: "
                        f"{reason}); it is damaged, cut off, or not a weights file: copy or "
                        "download it again") from error


def _first_bytes(path: str) -> bytes:
    """Start of a file; refuses what cannot be a weights file by its kind, saying what it is.

    Raises:
        UserError: the file is missing, a folder, not readable, empty, a web page or a Git
            LFS pointer.
    """
    if os.path.isdir(path):
        raise UserError(f"'{path}' is a folder, expected a weights file such as .pth")
    if not os.path.exists(path):
        raise UserError(f"no file '{path}' (looked for {os.path.abspath(path)}); check the path")
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    if not start:
        raise UserError(f"'{path}' is empty; copy or download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        raise UserError(f"'{path}' is a web page, not a checkpoint; the download got an error or a "
                        "consent page instead of the file, download it again")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"'{path}' is a Git LFS pointer, not the checkpoint itself; fetch it with "
                        "'git lfs pull'")
    return start


class Origin(NamedTuple):
    """Where weights come from, as the state beside them says."""

    iteration: int | None
    """Steps of training done."""
    path: str | None = None
    """Folder of the run, as the training saw it; None if it had none."""
    run_id: str | None = None


@dataclass
class WeightsFile:
    """Tensors on the CPU under the network's own names, with what is known about them."""

    path: str
    kind: str
    """Format of the file, for sentences."""
    tensors: dict[str, Tensor]
    """Floating point, except for the batch counters."""
    renamed: list[str] = field(default_factory=list)
    """What was changed in the names."""
    unused: list[str] = field(default_factory=list)
    """Names in the file that are no weights."""
    warnings: list[str] = field(default_factory=list)
    """Sentences for the user."""
    config: dict[str, Any] | None = None
    """`Config.to_dict()` of the training; this and what follows: None if unknown."""
    class_names: list[str] | None = None
    """Foreground classes in order."""
    category_ids: list[int] | None = None
    """What the training data called the classes."""
    origin: Origin | None = None

    @property
    def contents(self) -> Contents | None:
        """What the tensors belong to; None if to no network known here."""
        return identify(self.tensors)

    def __str__(self) -> str:
        contents = f"{self.contents}; " if self.contents else ""
        return f"{self.path} ({contents}{self.kind})"


def read_weights(path: str) -> WeightsFile:
    """Read a weights file of any known kind; what it is called does not matter.

    Raises:
        UserError: the file is missing, of no known kind, damaged, hostile, without tensors by name,
            or has whole numbers where weights are expected.
    """
    kind, content, metadata = _read(path)
    found = own_names(content, path)
    weights = _only_weights(found.tensors, path)
    numbers = [name for name in found.tensors if name not in weights]
    config = _parsed(metadata, "config", path)
    names = _parsed(metadata, "class_names", path)
    if not isinstance(config, (dict, type(None))):
        raise UserError(f"'{path}' has a configuration that is a {type(config).__name__}")
    if names is not None and not (isinstance(names, list)
                                  and all(isinstance(name, str) for name in names)):
        raise UserError(f"'{path}' has class names that are not a list of text")
    return WeightsFile(path, kind, weights, found.renamed, found.unused + numbers,
                       _not_finite(weights), config, names)


def _read(path: str) -> tuple[str, dict[Any, Any], dict[str, str]]:
    """Kind, content and metadata of a file."""
    start = _first_bytes(path)
    if start.startswith(ZIP_START) or (
            start.startswith(_PICKLE_START) and start[2:].startswith(MAGIC)):
        return "PyTorch", load_tensors(path), {}
    if start.startswith(_PICKLE_START) and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "Paddle", _dictionary(read_pdparams, path), {}
    if looks_like_safetensors(start):
        return ("safetensors", *_guarded(read_safetensors, path))
    if looks_like_darknet(start, os.path.getsize(path)):
        tensors, left = _guarded(read_darknet, path)
        rest = {f"{left} numbers behind the backbone": None} if left else {}
        return "DarkNet", {**tensors, **rest}, {}
    raise UserError(f"'{path}' is no known kind of weights file (it starts with {start[:16]!r}); "
                    "expected PyTorch's .pth, .safetensors, Paddle's .pdparams or DarkNet's "
                    ".weights")


def _only_weights(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Leave out single numbers such as an epoch; refuse arrays that are not floating point."""
    weights = {}
    for name, value in tensors.items():
        if value.is_floating_point() or name.endswith(COUNTER):
            weights[name] = value
        elif value.dim():
            raise UserError(f"'{path}' holds {name} of type {type_name(value)}, expected "
                            "floating-point weights; quantised networks cannot be loaded, give "
                            "the one before")
    return weights


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """A sentence if weights are NaN or infinite: a training that broke, seldom a wish."""
    bad = [name for name, value in tensors.items()
           if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())]
    if not bad:
        return []
    return [f"Warning: {len(bad)} of {len(tensors)} tensors hold NaN or infinite values (first: "
            f"{bad[0]}); what such a network finds, if anything, means nothing"]


def _parsed(metadata: dict[str, str], key: str, path: str) -> Any:
    """A field that `metadata_of` wrote; None where it is missing."""
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' has metadata '{key}' that is not JSON ({error})") from error


def metadata_of(config: dict[str, Any] | None, class_names: Sequence[str] | None) -> dict[str, str]:
    """Metadata that `read_weights` understands."""
    known = {"config": config, "class_names": class_names}
    return {"format": "pt", **{key: json.dumps(value) for key, value in known.items()
                               if value is not None}}
