"""The whole detection step against the numbers recorded from the original (detect.npz)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from layers.detection import Detect

SIDE = 138


def rows(classes, coefficients):
    """Class and mask coefficients of each detection."""
    return [(int(kind), *values) for kind, values in zip(classes, coefficients.tolist())]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("nms, name", [("fast", "fast"), ("cross_class", "cross"),
                                       ("traditional", "trad")])
def test_detections(golden, device, nms, name, compact):
    recorded = golden("detect")
    keys = {"loc": "loc", "conf": "conf_logits", "mask": "mask", "priors": "priors"}
    predictions = {key: torch.from_numpy(recorded[stored]).to(device)
                   for key, stored in keys.items()}
    detect = Detect(81, 0.05, 0.5, 200, 100, nms, max_size=SIDE)
    detect.compact = compact
    found = detect(predictions).to(torch.device("cpu"))

    count = len(recorded[name + "_score"])
    assert int(found.count[0]) == count
    assert found.boxes.shape == (1, 200, 4) and found.coefficients.shape == (1, 200, 32)
    np.testing.assert_allclose(found.scores[0, :count], recorded[name + "_score"],
                               rtol=rounding.chosen(1e-5))
    rounding.assert_same_choice(
        rows(found.classes[0, :count], found.coefficients[0, :count]),
        rows(recorded[name + "_class"], recorded[name + "_mask"]))
    if rounding.in_order():
        np.testing.assert_allclose(found.boxes[0, :count], recorded[name + "_box"],
                                   rtol=1e-5, atol=1e-6)
    for field in list(vars(found).values())[:4]:
        assert not (field[0, count:] != 0).any()
