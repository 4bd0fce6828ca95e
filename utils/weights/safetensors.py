"""The safetensors format: 8 bytes header length, a JSON header, the elements.

Read and written here rather than with the `safetensors` package: the package needs a newer PyTorch
than 1.5, and the format is small. Files are checked as its specification asks: offsets within the
file, no overlap, no gap.
"""

from __future__ import annotations

import json
import os
from typing import Any, BinaryIO, Dict, List, Mapping, NamedTuple, Tuple
from torch import Tensor
from utils.weights.raw import (
    ELEMENT_TYPES,
    read_bytes,
    tensor_from_bytes,
    tensor_to_bytes,
    type_name,
)

MAX_HEADER = 100 * 1000 * 1000
"""Bytes; the limit of the format."""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
          "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_CODES = {name: code for code, name in _TYPES.items()}
_LENGTH_BYTES = 8


class FormatError(ValueError):
    """The header contradicts itself or the file."""


class _Entry(NamedTuple):
    name: str
    kind: str
    shape: Tuple[int, ...]
    begin: int
    end: int


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that starts with `start` may be in this format."""
    return start[_LENGTH_BYTES:_LENGTH_BYTES + 1] == b"{"


def read_safetensors(path: str) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Tensors in the order of the header, and the metadata.

    Raises:
        FormatError, ValueError, EOFError: the header or the file is damaged.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > min(MAX_HEADER, size - _LENGTH_BYTES):
            raise FormatError("a header of {} bytes in a file of {}".format(length, size))
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise FormatError("the header is a {}".format(type(header).__name__))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
                isinstance(value, str) for value in metadata.values()):
            raise FormatError("the metadata is not text by name")
        entries = [_entry(name, value) for name, value in header.items()]
        _check_layout(entries, size - _LENGTH_BYTES - length)
        tensors = {}
        for entry in entries:
            stream.seek(_LENGTH_BYTES + length + entry.begin)
            data = read_bytes(stream, entry.end - entry.begin)
            tensors[entry.name] = tensor_from_bytes(data, entry.kind).view(entry.shape)
        return tensors, metadata


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("a name stands twice in the header")
    return found


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("'{}' is not described by dtype, shape and data_offsets".format(name))
    kind = _TYPES.get(str(value["dtype"]))
    if kind is None:
        raise FormatError("'{}' has the type {}, expected one of {}".format(
            name, value["dtype"], ", ".join(_TYPES)))
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
                type(number) is int and number >= 0 for number in numbers):
            raise FormatError("'{}' has {!r}, expected whole numbers".format(name, numbers))
    if len(offsets) != 2:
        raise FormatError("'{}' has the offsets {}".format(name, offsets))
    expected = ELEMENT_TYPES[kind].itemsize
    for side in shape:
        expected *= side
    if offsets[1] - offsets[0] != expected:
        raise FormatError("'{}' of shape {} needs {} bytes, its offsets are {}".format(
            name, shape, expected, offsets))
    return _Entry(name, kind, tuple(shape), offsets[0], offsets[1])


def _check_layout(entries: List[_Entry], size: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise FormatError("'{}' starts at byte {}, expected {}: tensors {}".format(
                entry.name, entry.begin, position,
                "overlap" if entry.begin < position else "leave a gap"))
        position = entry.end
    if position != size:
        raise FormatError("the tensors take {} bytes, the file has {}".format(position, size))


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor],
                      metadata: Mapping[str, str]) -> None:
    """Write tensors; wide elements come first, so that every one lies aligned."""
    begin = {}
    position = 0
    order = sorted(tensors, key=lambda name: -ELEMENT_TYPES[type_name(tensors[name])].itemsize)
    for name in order:
        begin[name] = position
        position += _num_bytes(tensors[name])
    header: Dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        header[name] = {"dtype": _CODES[type_name(tensor)], "shape": list(tensor.shape),
                        "data_offsets": [begin[name], begin[name] + _num_bytes(tensor)]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for name in order:
        stream.write(tensor_to_bytes(tensors[name]))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * ELEMENT_TYPES[type_name(tensor)].itemsize
