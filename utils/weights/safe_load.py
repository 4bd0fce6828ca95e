"""Reading files from elsewhere without running code from them, with a sentence for what is wrong.

A .pth file is a pickle, and a pickle may name any function to be called while it is read. The
readers in `utils.weights.formats` know nothing but tensors and plain values.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, TypeVar

from utils.errors import UserError
from utils.weights.formats.plain_pickle import ForbiddenName
from utils.weights.formats.torch_file import read_torch_file

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
