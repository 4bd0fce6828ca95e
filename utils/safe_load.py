"""Reading .pth files without running code from them.

A .pth file is a pickle, and a pickle may name any function to be called while it is read. From
torch 2.0 on, `torch.load(weights_only=True)` refuses that. Before, this module gives `torch.load`
an unpickler that knows nothing but tensors and plain values, for both file formats (zip, and the
legacy one that torch 1.5 writes).
"""

from __future__ import annotations

import os
import pickle
import re
import types
from collections import OrderedDict
from typing import Any, Callable, Dict

import torch

from utils.compat import can_load_weights_only
from utils.errors import UserError

_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED: Dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
}
for _name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
    _ALLOWED["torch._utils." + _name] = getattr(torch._utils, _name)
for _name in _STORAGES:
    _ALLOWED["torch.{}Storage".format(_name)] = getattr(torch, _name + "Storage")


def load_tensors(path: str) -> Dict[str, Any]:
    """Read a dictionary of tensors and plain values; tensors arrive on the CPU.

    Nested dicts, lists and tuples are allowed, and so are int, float, bool, str and None.

    Raises:
        UserError: the file is missing, not a checkpoint, damaged, asks for anything but tensors
            and plain values, or does not hold a dictionary.
    """
    _check_start(path)
    try:
        _check_archive(path)
        content = _read(path)
    except UserError:
        raise
    except _ForbiddenName as error:
        raise UserError(
            "'{}' asks for '{}' to be called when it is read; nothing was run: a checkpoint holds "
            "only tensors and plain values, get it from a source you trust, or save its "
            "state_dict() again".format(path, error)) from error
    except Exception as error:  # whatever a damaged pickle or archive leads torch into
        raise UserError("'{}' cannot be read as a checkpoint ({}: {}); it is damaged, cut off, "
                        "or not from torch.save: copy or download it again".format(
                            path, type(error).__name__, _first_line(error))) from error
    if not isinstance(content, dict):
        raise UserError("'{}' holds a {}, expected a dictionary of tensors as state_dict() gives "
                        "it".format(path, type(content).__name__))
    return content


class _ForbiddenName(pickle.UnpicklingError):
    """The pickle names something that is neither a tensor nor a plain value."""


def _check_start(path: str) -> None:
    """Refuse what cannot be a checkpoint by its kind or its first bytes, saying what it is."""
    if os.path.isdir(path):
        raise UserError("'{}' is a folder, expected a .pth file".format(path))
    if not os.path.exists(path):
        raise UserError("no file '{}' (looked for {}); check the path".format(
            path, os.path.abspath(path)))
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
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
    if not start.startswith((_ZIP_START, _PICKLE_START)):
        raise UserError("'{}' is not a PyTorch checkpoint (it starts with {!r}); expected a .pth "
                        "file written by torch.save".format(path, start[:16]))


def _check_archive(path: str) -> None:
    """Refuse TorchScript, which torch.load would hand to torch.jit.load."""
    with open(path, "rb") as stream:
        if stream.read(len(_ZIP_START)) != _ZIP_START:
            return
    # Asked of torch's own reader: another reader might see other entries in a forged archive.
    entries = torch._C.PyTorchFileReader(path).get_all_records()
    if any(entry.split("/")[-1] == "constants.pkl" for entry in entries):
        raise UserError("'{}' is a TorchScript program, not a checkpoint; expected the "
                        "state_dict() of a network".format(path))


def _read(path: str) -> Any:
    if not can_load_weights_only():
        return torch.load(path, map_location="cpu", pickle_module=_restricted_pickle)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # "... GLOBAL posix.system ..." or, before torch 2.4, "Unsupported class posix.system".
        name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if name is None:
            # torch's own text advises to switch the check off: only its reason is passed on.
            reason = re.search(r"Unsupported.*", str(error))
            raise pickle.UnpicklingError(
                reason.group(0) if reason else "not a pickle of tensors") from error
        raise _ForbiddenName(name.group(1)) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


class _Sealed:
    """Calls an allowed function and nothing else.

    A pickle can set attributes on the objects it names; on the functions of torch themselves this
    would last beyond the reading.
    """

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _ForbiddenName("attribute {}".format(name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler for which only the names in `_ALLOWED` exist."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = "{}.{}".format(module, name)
        if full_name not in _ALLOWED:
            raise _ForbiddenName(full_name)
        return _Sealed(_ALLOWED[full_name])


def _restricted_load(stream: Any, **options: Any) -> Any:
    return _RestrictedUnpickler(stream, **options).load()


_restricted_pickle: Any = types.SimpleNamespace(
    __name__="restricted_pickle", Unpickler=_RestrictedUnpickler, load=_restricted_load)
