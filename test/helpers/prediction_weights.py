"""A tiny network with fixed random weights, for tests of prediction."""

from __future__ import annotations

import contextlib
import resource

import numpy as np
import torch

from data.config import get_config
from helpers.deterministic import load_deterministic_weights, small_plus_config
from utils.checkpoint import CheckpointName, save_checkpoint
from yolact import build_yolact

NAMES = ["circle", "square", "star", "chat noir/\u732b"]
IDS = [2, 5, 6, 11]


def save_weights(folder, names=NAMES, ids=IDS, **changes):
    """Write weights with their state; returns the path."""
    config = get_config("yolact_shapes", max_size=64, num_classes=len(names) + 1, **changes)
    torch.manual_seed(0)
    return save_checkpoint(CheckpointName(config.name, 1, 20).path(str(folder)),
                           build_yolact(config).state_dict(),
                           {"config": config.to_dict(), "class_names": names, "category_ids": ids})


def plus_network(**changes):
    """A small YOLACT++ that finds something in noise, and its configuration."""
    config = small_plus_config("yolact_plus_resnet50").replace(**changes)
    network = load_deterministic_weights(build_yolact(config)).eval()
    with torch.no_grad():  # else nothing is above the threshold
        network.prediction_layers[0].conf_layer.weight.mul_(6)
    return config, network


def save_plus_weights(folder, names=None, ids=None):
    """Write weights of such a network, with COCO's classes or those named; returns the path."""
    config, network = plus_network(**({} if names is None else {"num_classes": len(names) + 1}))
    return save_checkpoint(CheckpointName(config.name, 1, 20).path(str(folder)),
                           network.state_dict(),
                           {"config": config.to_dict(), "class_names": names, "category_ids": ids})


def noise(height=90, width=120, seed=0):
    """A picture with something in it."""
    rng = np.random.RandomState(seed)
    return rng.randint(0, 256, (height, width, 3)).astype(np.uint8)


@contextlib.contextmanager
def full_disk(bytes_per_file):
    """Every file that grows beyond this fails to be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
