"""A small network with telling numbers in every tensor, and files of other programs."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections import OrderedDict

import pytest
import torch

from data.config import get_config
from utils.errors import UserError
from utils.weights.files import read_weights
from yolact import build_yolact

MEGABYTE = 1 << 20

NAMES = ["circle", "square", "triangle", "star"]


def network(classes=4, seed=0):
    """The network of the shapes with random running statistics, so that none is its start value."""
    config = get_config("yolact_shapes", num_classes=classes + 1)
    torch.manual_seed(seed)
    model = build_yolact(config)
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            buffer.uniform_(0.5, 1.5)
    return model


def same(left, right, order=False):
    """Whether two state dicts are equal to the bit."""
    return (list(left) == list(right) if order else set(left) == set(right)) and all(
        left[key].dtype == right[key].dtype and torch.equal(_wide(left[key]), _wide(right[key]))
        for key in left)


def _wide(tensor):
    """PyTorch 1.5 cannot compare half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def save(content, path, legacy=False):
    torch.save(content, str(path), _use_new_zipfile_serialization=not legacy)
    return str(path)


def renamed(state, change):
    return OrderedDict((change(key), value) for key, value in state.items())


def write_darknet(path, backbone, version=(0, 2, 0), tail=0):
    """Write as the DarkNet program does, by walking the modules, not by the reader's table."""
    convolutions = []

    def visit(sequence):
        convolutions.append((sequence[0], sequence[1]))

    visit(backbone._preconv)
    for stage in backbone.layers:
        visit(stage[0])
        for block in list(stage)[1:]:
            visit(block.conv1)
            visit(block.conv2)
    with open(str(path), "wb") as stream:
        stream.write(struct.pack("<3i", *version))
        stream.write(struct.pack("<q" if version[1] >= 2 else "<i", 32013312))
        for convolution, norm in convolutions:
            for tensor in (norm.bias, norm.weight, norm.running_mean, norm.running_var,
                           convolution.weight):
                stream.write(tensor.detach().numpy().astype("<f4").tobytes())
        stream.write(b"\0" * 4 * tail)
    return str(path)


def other_python():
    """A Python with the real paddlepaddle and safetensors, for the tests against them."""
    return os.environ.get("YOLACT_FORMATS_PYTHON")


def refused(path, *words, limit=32 * MEGABYTE):
    """Reading is a `UserError` of one line with these words, and allocates little."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read_weights(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sentence = str(caught.value)
    assert os.path.basename(str(path)) in sentence and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence
    assert peak < limit, "{} bytes".format(peak)
