"""Weights files of any known kind: recognised, read without running code, renamed, loaded.

Here is what the formats share: elements of tensors as they lie in files, little-endian, for every
PyTorch version.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

MAX_DIMENSIONS = 64

# bfloat16 does not exist in NumPy; its 16 bits are the upper half of a float32.
ELEMENT_TYPES: dict[str, np.dtype] = {
    "float64": np.dtype("<f8"), "float32": np.dtype("<f4"), "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"), "int64": np.dtype("<i8"), "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"), "int8": np.dtype("|i1"), "uint8": np.dtype("|u1"),
    "bool": np.dtype("|u1")}
"""By the name of the tensor's type."""


def type_name(tensor: Tensor) -> str:
    """Name of a tensor's type without the `torch.` in front."""
    return str(tensor.dtype)[len("torch."):]


def element_count(shape: Sequence[Any]) -> int:
    """Number of elements of a shape; `ValueError` where what a file gives cannot be a shape."""
    if len(shape) > MAX_DIMENSIONS or not all(
            type(side) is int and 0 <= side < 1 << 63 for side in shape):
        raise ValueError(f"a shape of {len(shape)} sides, expected whole numbers")
    count = 1
    for side in shape:
        count *= side
    return count


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


def read_tensor(stream: Any, kind: str, count: int) -> Tensor:
    """Read `count` elements of a file; the caller has checked that it is large enough.

    Raises:
        EOFError: there are fewer.
    """
    data = np.empty(count * ELEMENT_TYPES[kind].itemsize, np.uint8)
    found = stream.readinto(data)
    if found != len(data):
        raise EOFError(f"{found} of {len(data)} bytes are there")
    return tensor_from_bytes(data, kind)
