from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from layers import box_ops

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def data(golden, device):
    def read(*names):
        found = [torch.from_numpy(values[name]).to(device) for name in names]
        return found if len(found) > 1 else found[0]

    values = golden("box_ops")
    read.values = values
    return read


def _same(actual, data, name):
    np.testing.assert_allclose(actual.cpu().numpy(), data.values[name], **CLOSE)


def test_forms(data):
    _same(box_ops.center_size(data("b")), data, "center_size_b")
    _same(box_ops.point_form(data("center_size_b")), data, "point_form")


def test_jaccard(data):
    a, b = data("a", "b")
    _same(box_ops.jaccard(a, b), data, "jaccard")
    _same(box_ops.jaccard(b, a, iscrowd=True), data, "jaccard_crowd")
    _same(box_ops.jaccard(*data("batch_a", "batch_b")), data, "batch_jaccard")


def test_encode_and_decode(data):
    loc, priors, matched = data("loc", "priors_cs", "matched")
    _same(box_ops.encode(matched, priors), data, "encode")
    _same(box_ops.decode(loc, priors), data, "decode")


def test_degenerate_boxes_keep_their_infinities(data):
    rounding.skip_where_saturated()
    degenerate = data("degenerate")
    _same(box_ops.jaccard(degenerate, data("b")), data, "jaccard_degenerate")
    _same(box_ops.encode(degenerate, data("priors_cs")[:3]), data, "encode_degenerate")


@pytest.mark.parametrize("kind", ["ok", "odd"])
@pytest.mark.parametrize("size", [138, 33])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("cast", [0, 1])
def test_sanitize_coordinates(data, kind, size, padding, cast):
    name = f"san_{kind}"
    x1, x2 = data(name + "_x1", name + "_x2")
    low, high = box_ops.sanitize_coordinates(x1, x2, size, padding, bool(cast))
    name = f"{name}_{size}_{padding}_{cast}"
    for actual, end in ((low, "_a"), (high, "_b")):
        expected = data.values[name + end]
        assert str(actual.dtype) == "torch." + expected.dtype.name
        if cast:
            np.testing.assert_array_equal(actual.cpu().numpy(), expected)
        else:
            # A pixel coordinate near 0 loses digits to the subtraction of the padding.
            np.testing.assert_allclose(actual.cpu().numpy(), expected, rtol=1e-5, atol=1e-4)


def test_crop(data):
    masks, boxes = data("crop_masks", "crop_boxes")
    _same(box_ops.crop(masks, boxes), data, "crop_out")
    _same(box_ops.crop(masks, boxes, padding=0), data, "crop_out_pad0")
