"""Weights as the DarkNet program writes them: a header, then the numbers of layer after layer.

The file does not say which layers it has. Here it is read as DarkNet-53's 52 convolutions with
batch normalisation, which come first in `darknet53.conv.74`, `darknet53.weights` and
`yolov3.weights`; what follows them is a classifier or detector. For each convolution: biases,
scales, running means, running variances, then the kernel, all float32.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from utils.errors import UserError
from utils.weights import read_tensor

DARKNET53 = (1, 2, 8, 8, 4)
"""Residual blocks of each stage."""
_VERSION = struct.Struct("<3I")
"""Major, minor and revision."""
_BN_PARTS = ("bias", "weight", "running_mean", "running_var")


class Convolution(NamedTuple):
    """A convolution with its normalisation, which are `.0` and `.1` below `name`."""

    name: str
    shape: tuple[int, int, int, int]

    @property
    def numbers(self) -> int:
        """How many numbers a file has for it."""
        out_channels, in_channels, height, width = self.shape
        return out_channels * (len(_BN_PARTS) + in_channels * height * width)


def looks_like_darknet(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that starts with `start` has DarkNet's header."""
    if len(start) < _VERSION.size:
        return False
    major, minor, revision = _VERSION.unpack_from(start)
    return major == 0 and minor in (1, 2) and 0 <= revision < 10 and (
        (size - _header_size(start)) % 4 == 0)


def _header_size(start: bytes) -> int:
    """The count of images seen has 4 bytes before version 0.2, then 8."""
    return _VERSION.size + (8 if _VERSION.unpack_from(start)[:2] >= (0, 2) else 4)


def convolutions() -> list[Convolution]:
    """DarkNet-53's convolutions in the file's order, under the backbone's names."""
    found = [Convolution("_preconv", (32, 3, 3, 3))]
    channels = 32
    for stage, count in enumerate(DARKNET53):
        prefix = f"layers.{stage}."
        found.append(Convolution(prefix + "0", (2 * channels, channels, 3, 3)))
        for block in range(1, count + 1):
            found.append(Convolution(f"{prefix}{block}.conv1", (channels, 2 * channels, 1, 1)))
            found.append(Convolution(f"{prefix}{block}.conv2", (2 * channels, channels, 3, 3)))
        channels *= 2
    return found


def read_darknet(path: str) -> tuple[dict[str, Tensor], int]:
    """Tensors of the backbone, and the count of numbers in the file that follow them.

    Raises:
        UserError: the file is too short for this backbone.
    """
    layers = convolutions()
    with open(path, "rb") as stream:
        header = _header_size(stream.read(_VERSION.size))
        numbers = (os.fstat(stream.fileno()).st_size - header) // 4
        needed = sum(layer.numbers for layer in layers)
        if numbers < needed:
            raise UserError(f"'{path}' has {numbers} numbers, the {len(layers)} convolutions of "
                            f"DarkNet-53 need {needed}; it is cut off, or of another network: "
                            "expected darknet53.conv.74, darknet53.weights or yolov3.weights")
        stream.seek(header)
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            for part in _BN_PARTS:
                tensors[f"{layer.name}.1.{part}"] = read_tensor(stream, "float32", layer.shape[0])
            kernel = layer.numbers - len(_BN_PARTS) * layer.shape[0]
            tensors[layer.name + ".0.weight"] = read_tensor(stream, "float32", kernel).view(
                layer.shape)
            tensors[layer.name + ".1.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return tensors, numbers - needed
