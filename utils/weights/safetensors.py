"""The safetensors format: 8 bytes header length, a JSON header, the elements.

Read and written here rather than with the `safetensors` package: the package needs a newer PyTorch
than 1.5, and the format is small. Files are checked as its specification asks: offsets within the
file, no overlap, no gap.
"""

from __future__ import annotations

import json
import os
from typing import Any, BinaryIO, Mapping

from torch import Tensor

from utils.weights import ELEMENT_TYPES, element_count, read_tensor, tensor_to_bytes, type_name

MAX_HEADER = 100 * 1000 * 1000
"""Bytes; the limit of the format."""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
          "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_CODES = {name: code for code, name in _TYPES.items()}
_LENGTH_BYTES = 8


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that starts with `start` may be in this format."""
    return start[_LENGTH_BYTES:_LENGTH_BYTES + 1] == b"{"


def read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the order of the header, and the metadata.

    Raises:
        ValueError, EOFError: the header contradicts itself or the file, or is damaged.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > min(MAX_HEADER, size - _LENGTH_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError(f"the header is a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
                isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata is not text by name")
        for name, entry in header.items():
            _check_entry(name, entry)
        _check_layout(header, size - _LENGTH_BYTES - length)
        tensors = {}
        for name, entry in header.items():
            stream.seek(_LENGTH_BYTES + length + entry["data_offsets"][0])
            tensors[name] = read_tensor(stream, _TYPES[entry["dtype"]], element_count(
                entry["shape"])).view(entry["shape"])
        return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _check_entry(name: str, entry: Any) -> None:
    """Refuse a tensor whose type, shape and offsets do not agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _TYPES:
        raise ValueError(f"'{name}' has the type {code}, expected one of {', '.join(_TYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"'{name}' has no shape or no two offsets")
    element_count(offsets)  # whole numbers, as those of the shape
    expected = element_count(shape) * ELEMENT_TYPES[_TYPES[code]].itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(f"'{name}' of shape {shape} needs {expected} bytes, its offsets are "
                         f"{offsets}")


def _check_layout(header: dict[str, Any], size: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    position = 0
    for (begin, end), name in sorted((entry["data_offsets"], name)
                                     for name, entry in header.items()):
        if begin != position:
            problem = "overlap" if begin < position else "leave a gap"
            raise ValueError(f"'{name}' starts at byte {begin}, expected {position}: tensors "
                             f"{problem}")
        position = end
    if position != size:
        raise ValueError(f"the tensors take {position} bytes, the file has {size}")


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor],
                      metadata: Mapping[str, str]) -> None:
    """Write tensors; wide elements come first, so that every one lies aligned."""
    width = {name: ELEMENT_TYPES[type_name(tensor)].itemsize for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: -width[name])
    begin, position = {}, 0
    for name in order:
        begin[name] = position
        position += tensors[name].numel() * width[name]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _CODES[type_name(tensor)], "shape": list(tensor.shape),
            "data_offsets": [begin[name], begin[name] + tensor.numel() * width[name]]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for name in order:
        stream.write(tensor_to_bytes(tensors[name]))
