"""Tensors from bytes and back, for every PyTorch version."""

from __future__ import annotations

from typing import Any, BinaryIO, Dict
import numpy as np
import torch
from torch import Tensor

# bfloat16 does not exist in NumPy; its 16 bits are the upper half of a float32.
ELEMENT_TYPES: Dict[str, np.dtype] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("|i1"),
    "uint8": np.dtype("|u1"),
    "bool": np.dtype("|u1"),
}
"""How the elements of a tensor lie in a file: little-endian, one after the other."""


def type_name(tensor: Tensor) -> str:
    """Name of a tensor's type without the `torch.` in front."""
    return str(tensor.dtype)[len("torch."):]


def tensor_from_bytes(data: np.ndarray, kind: str) -> Tensor:
    """A flat tensor of type `kind` from a writable uint8 array, which it may share."""
    elements: Any = data.view(ELEMENT_TYPES[kind])
    if kind == "bfloat16":
        bits = elements.astype(np.uint32) << 16
        return torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16)
    if kind == "bool":
        return torch.from_numpy(elements != 0)
    return torch.from_numpy(elements.astype(elements.dtype.newbyteorder("="), copy=False))


def tensor_to_bytes(tensor: Tensor) -> bytes:
    """The elements of a tensor in row-major order, little-endian."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.float().numpy().reshape(-1).view(np.uint32) >> 16
        return bits.astype("<u2").tobytes()
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def read_bytes(stream: BinaryIO, count: int) -> np.ndarray:
    """Read exactly `count` bytes; `EOFError` if there are fewer.

    The caller has checked `count` against the size of the file.
    """
    data = np.empty(count, dtype=np.uint8)
    view, done = data.data, 0
    while done < count:
        piece = stream.read(min(count - done, 1 << 20))
        if not piece:
            raise EOFError("{} of {} bytes are there".format(done, count))
        view[done:done + len(piece)] = piece
        done += len(piece)
    return data
