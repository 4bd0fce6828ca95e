"""The whole YOLACT++ network against the numbers recorded from the original (forward256_*)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from helpers.deterministic import (
    SMALL_PLUS_SIZE,
    deterministic_input,
    load_deterministic_weights,
    small_plus_config,
)
from layers.deform_conv import DeformConv2d
from layers.detection import Detect
from yolact import build_yolact

KEYS = ("loc", "conf", "mask", "proto", "segm")


@pytest.fixture(scope="module")
def network(device):
    made = load_deterministic_weights(build_yolact(small_plus_config("yolact_plus_resnet50")))
    made.freeze_bn()
    return made.to(device)


def test_forward(network, golden, device):
    expected = golden("forward256_yolact_plus_resnet50")
    network.train()
    with torch.no_grad():
        out = network(deterministic_input(SMALL_PLUS_SIZE).to(device))
    bound = rounding.network(1e-3)
    for n, key in enumerate(KEYS):
        found = out[key].cpu().numpy()
        values = expected["val_" + key]
        assert found.shape == tuple(expected["shape_" + key])
        np.testing.assert_allclose(found.reshape(-1)[expected["idx_" + key]], values, rtol=bound,
                                   atol=bound * values.std())
        found = found.astype(np.float64)
        stats = [found.mean(), found.std(ddof=1), abs(found).max()]
        np.testing.assert_allclose(stats, expected["stats"][n], rtol=bound)


def test_detections(network, golden, device):
    expected = golden("forward256_yolact_plus_resnet50")
    detect = Detect.from_config(small_plus_config("yolact_plus_resnet50"))
    network.eval()
    with torch.no_grad():
        found = detect(network(deterministic_input(SMALL_PLUS_SIZE).to(device)))
    found = found.to(torch.device("cpu")).of_image(0)
    np.testing.assert_allclose(found.scores, expected["eval_score"], rtol=rounding.network(1e-3))
    if not rounding.in_order():
        return
    np.testing.assert_array_equal(found.classes, expected["eval_class"])
    np.testing.assert_allclose(found.boxes, expected["eval_box"], rtol=1e-3, atol=1e-3)


def test_the_sampling_is_put_to_use(network):
    """Deterministic weights displace the taps: an ordinary convolution would not do."""
    layer = next(m for m in network.modules() if isinstance(m, DeformConv2d))
    x = torch.ones(1, layer.weight.shape[1], 8, 8, device=layer.weight.device)
    with torch.no_grad():
        assert layer.conv_offset_mask(x)[:, :18].abs().max() > 0.3


def test_mask_iou_network(network, golden, device):
    """The recorded input is RandomState(8).rand(3, 1, 138, 138) > 0.5."""
    masks = (np.random.RandomState(8).rand(3, 1, 138, 138) > 0.5).astype(np.float32)
    with torch.no_grad():
        found = network.maskiou_net(torch.from_numpy(masks).to(device)).cpu()
    expected = golden("forward256_yolact_plus_resnet50")["maskiou_out"]
    bound = rounding.network(1e-3)
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * expected.std())
