"""Non-maximum suppression against the numbers recorded from the original (nms.npz)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from layers.detection import cross_class_nms, fast_nms, traditional_nms

CONF_THRESHOLD, IOU_THRESHOLD = 0.05, 0.5


@pytest.fixture
def recorded(golden):
    return golden("nms")


def inputs(recorded, device):
    boxes = torch.from_numpy(recorded["boxes"]).unsqueeze(0).to(device)
    scores = torch.from_numpy(recorded["scores"]).unsqueeze(0).to(device)
    return boxes, scores


def check(recorded, name, index, classes, scores):
    rounding.assert_same_choice(
        list(zip(index.tolist(), classes.tolist())),
        list(zip(recorded[name + "_prior_index"].tolist(), recorded[name + "_class"].tolist())))
    np.testing.assert_allclose(scores, recorded[name + "_score"], rtol=rounding.chosen(1e-5),
                               atol=1e-6)
    if not rounding.in_order():
        return
    np.testing.assert_allclose(recorded["boxes"][index], recorded[name + "_box"],
                               rtol=1e-5, atol=1e-6)


def check_kept(recorded, name, kept):
    count = int(kept.count[0])
    assert count == len(recorded[name + "_score"])
    fields = [kept.index, kept.classes, kept.scores]
    check(recorded, name, *(field[0, :count].cpu().numpy() for field in fields))
    for field in fields:
        assert not (field[0, count:] != 0).any()


@pytest.mark.parametrize("name, top_k, min_score", [
    ("fast", 200, -1.0), ("fast_top20", 20, -1.0), ("fast_second", 200, CONF_THRESHOLD)])
def test_fast_nms(recorded, device, name, top_k, min_score):
    boxes, scores = inputs(recorded, device)
    check_kept(recorded, name, fast_nms(boxes, scores, IOU_THRESHOLD, top_k, 100, min_score))


def test_cross_class_nms(recorded, device):
    boxes, scores = inputs(recorded, device)
    check_kept(recorded, "cross", cross_class_nms(boxes, scores, IOU_THRESHOLD, 200))


def test_traditional_nms(recorded):
    index, classes = traditional_nms(recorded["boxes"], recorded["scores"], IOU_THRESHOLD,
                                     CONF_THRESHOLD, 100, pixels=550)
    check(recorded, "trad", index, classes, recorded["scores"][classes, index])
