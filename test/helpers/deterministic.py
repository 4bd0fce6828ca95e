"""Weights and inputs that every implementation can make for itself (see test/golden/README.md)."""

from __future__ import annotations

import zlib

import numpy as np
import torch

SMALL_SIZE = 138
SMALL_SCALES = ((6,), (12,), (24,), (48,), (96,))
SMALL_PLUS_SIZE = 256
SMALL_PLUS_SCALES = tuple(tuple(side * 2 ** (third / 3) for third in range(3))
                          for side in (11, 22, 45, 90, 180))


def small_config(name):
    """The 138 px variant of a recipe that the golden numbers were recorded with."""
    from data.config import get_config

    return get_config(name, max_size=SMALL_SIZE, pred_scales=SMALL_SCALES)


def small_plus_config(name):
    """The 256 px variant of a YOLACT++ recipe that the golden numbers were recorded with."""
    from data.config import get_config

    return get_config(name, max_size=SMALL_PLUS_SIZE, pred_scales=SMALL_PLUS_SCALES)


def deterministic_tensor(key, shape):
    """The float32 array that stands for the state_dict entry `key`."""
    x = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).randn(*shape)
    if key.endswith("running_mean"):
        x = 0.05 * x
    elif key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) >= 2:
        gain = 0.5 if "conv_offset_mask" in key else np.sqrt(2)
        x = x * gain / np.sqrt(np.prod(shape[1:]))
    elif len(shape) == 1 and key.endswith(".weight"):
        x = 0.6 + 0.1 * x
    else:
        x = 0.02 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def load_deterministic_weights(network):
    """Fill every entry of `network.state_dict()`; returns the network."""
    state = network.state_dict()
    values = {}
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            values[key] = torch.zeros_like(tensor)
        else:
            values[key] = deterministic_tensor(key, tuple(tensor.shape))
    network.load_state_dict(values, strict=True)
    return network


def deterministic_input(size):
    """The float `[1,3,size,size]` input of the recorded forwards."""
    x = np.random.RandomState(7).randn(1, 3, size, size)
    return torch.from_numpy((np.round(x * 32) / 32).astype(np.float32))
