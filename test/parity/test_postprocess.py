"""Masks and boxes at the image's size against the numbers of the original (postprocess.npz)."""

from __future__ import annotations

import numpy as np
import pycocotools.mask
import pytest
import torch

from layers.masks import assemble_masks, boxes_to_pixels, encode_masks


def recorded_masks(recorded, case):
    shape = recorded[case + "_masks_shape"]
    bits = np.unpackbits(recorded[case + "_masks_packed"])
    return bits[:np.prod(shape)].reshape(shape).astype(bool)


def arguments(recorded, case, device):
    keep = recorded["det_score"] > recorded[case + "_thr"] if case == "thr" else slice(None)
    proto, coefficients, boxes = (
        torch.from_numpy(array).to(device)
        for array in (recorded["proto"], recorded["det_mask"][keep], recorded["det_box"][keep]))
    width, height = (int(side) for side in recorded[case + "_wh"])
    return proto, coefficients, boxes, height, width


@pytest.mark.parametrize("case", ["a", "b", "nocrop", "thr"])
def test_masks(golden, device, case):
    recorded = golden("postprocess")
    found = assemble_masks(*arguments(recorded, case, device), crop=case != "nocrop")
    np.testing.assert_array_equal(found.cpu().numpy(), recorded_masks(recorded, case))


@pytest.mark.parametrize("case", ["a", "b", "nocrop", "thr"])
def test_run_lengths(golden, device, case):
    recorded = golden("postprocess")
    found = encode_masks(*arguments(recorded, case, device), crop_to_box=case != "nocrop")
    for rle, mask in zip(found, recorded_masks(recorded, case)):
        expected = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": expected["size"], "counts": expected["counts"].decode()}


@pytest.mark.parametrize("case", ["a", "b", "thr"])
def test_boxes(golden, device, case):
    """The original truncates the boxes to whole pixels; ours stay fractional."""
    recorded = golden("postprocess")
    _, _, boxes, height, width = arguments(recorded, case, device)
    found = boxes_to_pixels(boxes, height, width)
    np.testing.assert_array_equal(found.long().cpu().numpy(), recorded[case + "_box"])
    assert (found != found.long().float()).any()
