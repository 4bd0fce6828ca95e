from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from helpers.deterministic import (
    SMALL_SIZE,
    deterministic_input,
    load_deterministic_weights,
    small_config,
)
from yolact import build_yolact


def _close(actual, expected):
    bound = rounding.network(1e-3)
    np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * float(expected.std()))


@pytest.mark.parametrize("name", ["yolact_base", "yolact_resnet50"])
def test_forward_is_the_originals(name, golden, device):
    expected = golden("forward138_" + name)
    network = load_deterministic_weights(build_yolact(small_config(name)))
    network.freeze_bn()
    network.to(device).train()
    with torch.no_grad():
        out = network(deterministic_input(SMALL_SIZE).to(device))
    out = {key: value.cpu().numpy() for key, value in out.items()}
    _close(out["loc"], expected["out_loc"])
    _close(out["mask"], expected["out_mask"])
    _close(out["proto"], expected["out_proto"])
    _close(out["conf"][:, ::3], expected["out_conf_stride"])
    _close(out["segm"][..., ::2, ::2], expected["out_segm_stride"])
    stats = [[x.mean(), x.std(ddof=1), abs(x).max()] for x in
             (out[key].astype(np.float64) for key in ("loc", "conf", "mask", "proto", "segm"))]
    np.testing.assert_allclose(stats, expected["stats"], rtol=rounding.network(1e-3))
