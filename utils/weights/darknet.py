"""Weights as the DarkNet program writes them: a header, then the numbers of layer after layer.

The file does not say which layers it has. Here it is read as DarkNet-53's 52 convolutions with
batch normalisation, which come first in `darknet53.conv.74`, `darknet53.weights` and
`yolov3.weights`; what follows them is a classifier or detector. For each convolution: biases,
scales, running means, running variances, then the kernel, all float32.
"""

from __future__ import annotations

import os
from typing import Dict, List, NamedTuple, Sequence, Tuple
import torch
from torch import Tensor
from utils.errors import UserError
from utils.weights.raw import read_bytes, tensor_from_bytes

DARKNET53 = (1, 2, 8, 8, 4)
"""Residual blocks of each stage."""
_VERSION_BYTES = 12
_BN_PARTS = ("bias", "weight", "running_mean", "running_var")


class _Convolution(NamedTuple):
    name: str
    """Of the convolution and its normalisation, which are `.0` and `.1` below it."""
    shape: Tuple[int, int, int, int]


def looks_like_darknet(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that starts with `start` has DarkNet's header."""
    if len(start) < _VERSION_BYTES:
        return False
    major, minor, revision = _version(start)
    return major == 0 and minor in (1, 2) and 0 <= revision < 10 and (
        (size - _header_size(start)) % 4 == 0)


def _version(start: bytes) -> Tuple[int, int, int]:
    return (int.from_bytes(start[:4], "little"), int.from_bytes(start[4:8], "little"),
            int.from_bytes(start[8:12], "little"))


def _header_size(start: bytes) -> int:
    """The count of images seen has 4 bytes before version 0.2, then 8."""
    major, minor, _ = _version(start)
    return _VERSION_BYTES + (8 if major * 10 + minor >= 2 else 4)


def convolutions(blocks: Sequence[int]) -> List[_Convolution]:
    """Convolutions of a DarkNet backbone in the file's order, under the backbone's names."""
    found = [_Convolution("_preconv", (32, 3, 3, 3))]
    channels = 32
    for stage, count in enumerate(blocks):
        prefix = "layers.{}.".format(stage)
        found.append(_Convolution(prefix + "0", (2 * channels, channels, 3, 3)))
        for block in range(1, count + 1):
            name = "{}{}.conv".format(prefix, block)
            found.append(_Convolution(name + "1", (channels, 2 * channels, 1, 1)))
            found.append(_Convolution(name + "2", (2 * channels, channels, 3, 3)))
        channels *= 2
    return found


def read_darknet(path: str, blocks: Sequence[int] = DARKNET53) -> Tuple[Dict[str, Tensor], int]:
    """Tensors of the backbone, and the count of numbers in the file that follow them.

    Raises:
        UserError: the file is too short for this backbone.
    """
    layers = convolutions(blocks)
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        header = _header_size(stream.read(_VERSION_BYTES))
        stream.seek(header)
        numbers = (size - header) // 4
        needed = sum(_numbers(layer) for layer in layers)
        if numbers < needed:
            raise UserError("'{}' has {} numbers, the {} convolutions of DarkNet-53 need {}; it is "
                            "cut off, or of another network: expected darknet53.conv.74, "
                            "darknet53.weights or yolov3.weights".format(
                                path, numbers, len(layers), needed))
        tensors: Dict[str, Tensor] = {}
        for name, shape in layers:
            for part in _BN_PARTS:
                data = read_bytes(stream, 4 * shape[0])
                tensors["{}.1.{}".format(name, part)] = tensor_from_bytes(data, "float32")
            data = read_bytes(stream, 4 * shape[0] * shape[1] * shape[2] * shape[3])
            tensors[name + ".0.weight"] = tensor_from_bytes(data, "float32").view(shape)
            tensors[name + ".1.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return tensors, numbers - needed


def _numbers(layer: _Convolution) -> int:
    out_channels, in_channels, height, width = layer.shape
    return out_channels * (4 + in_channels * height * width)
