"""Drawn masks against pycocotools, shrunk masks against torch."""

from __future__ import annotations

import json
import time

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from data import masks
from data.masks import MaskShrinker, draw_masks

IDENTITY = (np.ones(2), np.zeros(2))


def polygon(*points):
    return np.array(points, np.float32)


def rectangle(x1, y1, x2, y2):
    return polygon((x1, y1), (x2, y1), (x2, y2), (x1, y2))


def draw(segmentation, affine=IDENTITY, size=40):
    masks, extents = draw_masks([segmentation], affine, size)
    assert_extent(masks[0], extents[0])
    return masks[0]


def assert_extent(mask, extent):
    x1, y1, x2, y2 = extent
    inside = np.zeros_like(mask)
    inside[y1:y2, x1:x2] = 1
    assert not (mask & ~inside).any()
    assert mask.any() == bool(extent.any())


def iou(first, second):
    return (first & second).sum() / max((first | second).sum(), 1)


@pytest.mark.parametrize("side", [10, 25])
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.6])
def test_rectangles_are_exact(side, offset):
    mask = draw([rectangle(5 + offset, 7 + offset, 5 + side + offset, 7 + side + offset)])
    expected = np.zeros_like(mask)
    first = int(np.ceil(offset - 0.5))
    expected[7 + first:7 + first + side, 5 + first:5 + first + side] = 1
    np.testing.assert_array_equal(mask, expected)


def test_large_outlines_are_exact_too():
    mask = draw([rectangle(3, 4, 150, 180)], size=200)
    assert mask.sum() == 147 * 176 and mask[4, 3] and mask[179, 149]


def test_an_outline_that_crosses_itself_without_end(monkeypatch):
    """Another library fills it, within a pixel of the usual way and without its quadratic time."""
    angles = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    circle = np.stack([40 + 60 * np.cos(angles), 50 + 30 * np.sin(angles)], 1).astype(np.float32)
    usual = draw_masks([[circle]], IDENTITY, 128)
    monkeypatch.setattr(masks, "_MOST_EDGES", 1)
    other = draw_masks([[circle]], IDENTITY, 128)
    assert (other[0] != usual[0]).any() and (other[0] != usual[0]).mean() < 0.01
    assert (other[1] == usual[1]).all()
    monkeypatch.undo()
    start = time.process_time()
    tangle = np.random.RandomState(0).rand(30000, 2).astype(np.float32) * 128
    assert draw_masks([[tangle]], IDENTITY, 128)[0].sum() > 0.8 * 128 ** 2
    assert time.process_time() - start < 5  # OpenCV alone: 38


def test_many_points_with_an_edge_that_leaves_the_picture():
    """As many as it may have: the edge keeps its slope, and fewer points show the same."""
    angles = np.linspace(0, 1.5 * np.pi, 6001)
    arc = np.stack([60 + 50 * np.cos(angles), 60 + 50 * np.sin(angles)], 1)
    many, few = (np.concatenate([part, [[500, -300]]]).astype(np.float32)
                 for part in (arc, arc[::10]))
    found = [draw_masks([[outline]], IDENTITY, 128)[0] for outline in (many, few)]
    assert (found[0] != found[1]).mean() < 0.001


def test_overlapping_parts_are_a_union():
    parts = [rectangle(5, 5, 20, 20), rectangle(10, 10, 30, 30)]
    assert draw(parts)[15, 15] == 1
    assert draw(parts).sum() == 15 * 15 + 20 * 20 - 10 * 10


def test_objects_outside_are_empty():
    masks, extents = draw_masks([[rectangle(-30, 5, -2, 20)], [rectangle(5, 50, 9, 60)],
                                 [rectangle(-5, -5, 3, 3)]], IDENTITY, 40)
    assert masks.sum((1, 2)).tolist() == [0, 0, 9]
    assert not extents[:2].any() and extents[2].tolist() == [0, 0, 3, 3]


def test_nothing_to_draw():
    masks, extents = draw_masks([], IDENTITY, 40)
    assert masks.shape == (0, 40, 40) and extents.shape == (0, 4)


@pytest.mark.parametrize("mirror", [False, True])
def test_run_lengths_and_polygons_agree(mirror):
    shape = [polygon((4, 3), (26, 9), (21, 27), (7, 24))]
    scale, shift = np.array([4.0, 3.0]), np.array([-11.0, 5.0])
    if mirror:
        scale[0], shift[0] = -scale[0], 110 - shift[0]
    flat = [part.ravel().astype(float).tolist() for part in shape]
    rle = coco_mask.merge(coco_mask.frPyObjects(flat, 30, 32))
    from_rle, from_polygon = draw(rle, (scale, shift), 100), draw(shape, (scale, shift), 100)
    assert from_polygon.any() and iou(from_rle, from_polygon) > 0.95


def coco_objects(folder):
    with open(str(folder / "annotations" / "instances_train2017.json")) as file:
        data = json.load(file)
    sizes = {image["id"]: (image["width"], image["height"]) for image in data["images"]}
    for annotation in data["annotations"]:
        if isinstance(annotation["segmentation"], list):
            yield annotation["segmentation"], sizes[annotation["image_id"]]


def test_agrees_with_pycocotools_on_real_objects(coco_mini):
    """Drawn at 550 px against rasterised at the image's size and resized, as the original does."""
    rows = []
    for parts, (width, height) in coco_objects(coco_mini):
        rle = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
        expected = cv2.resize(coco_mask.decode(rle), (550, 550))
        affine = (np.array([550 / width, 550 / height]), np.zeros(2))
        polygons = [np.array(part, np.float32).reshape(-1, 2) for part in parts]
        mask = draw(polygons, affine, 550)
        rows.append((expected.sum(), iou(mask, expected), mask.sum() / max(expected.sum(), 1) - 1))
    area, overlap, bias = np.array(rows).T
    large, small = area > 32 ** 2, (area > 64) & (area <= 32 ** 2)
    assert large.sum() > 500
    assert overlap[large].mean() > 0.97 and abs(bias[large].mean()) < 0.01
    assert overlap[small].mean() > 0.90 and abs(bias[small].mean()) < 0.04


# Shrinking

def shrink(masks, shrunk, extents=None):
    size = masks.shape[1]
    shrinker, out = MaskShrinker(size, shrunk), np.zeros((len(masks), shrunk, shrunk), np.uint8)
    for i, mask in enumerate(masks):
        shrinker(mask, (0, 0, size, size) if extents is None else extents[i], out[i])
    return out


def torch_shrink(masks, shrunk):
    small = F.interpolate(torch.from_numpy(masks).float()[None], size=(shrunk, shrunk),
                          mode="bilinear", align_corners=False)[0]
    return small.gt(0.5).numpy().astype(np.uint8)


@pytest.mark.parametrize("size, shrunk", [(550, 138), (550, 69), (400, 100), (700, 176), (160, 40),
                                          (138, 36), (138, 18), (40, 40), (33, 32), (20, 30)])
def test_shrinks_like_torch(size, shrunk):
    rng = np.random.default_rng(size)
    coarse = rng.integers(0, 2, (2, size // 7 + 1, size // 7 + 1)).repeat(7, 1).repeat(7, 2)
    masks = np.concatenate([rng.integers(0, 2, (2, size, size)), coarse[:, :size, :size]])
    masks = np.ascontiguousarray(masks.astype(np.uint8))
    np.testing.assert_array_equal(shrink(masks, shrunk), torch_shrink(masks, shrunk))


def test_shrinking_within_extents_changes_nothing():
    rng = np.random.default_rng(0)
    masks, extents = np.zeros((60, 110, 110), np.uint8), np.zeros((60, 4), np.int64)
    for mask, extent in zip(masks, extents):
        x1, y1 = rng.integers(0, 100, 2)
        x2, y2 = rng.integers([x1, y1], 111)
        mask[y1:y2, x1:x2] = rng.integers(0, 2, (y2 - y1, x2 - x1))
        extent[:] = (x1, y1, x2, y2)
    np.testing.assert_array_equal(shrink(masks, 28, extents.tolist()), torch_shrink(masks, 28))


def test_shrinking_adds_to_what_is_there():
    mask, out = np.zeros((40, 40), np.uint8), np.zeros((10, 10), np.uint8)
    mask[:12, :12] = 1
    out[8, 8] = 1
    MaskShrinker(40, 10)(mask, (0, 0, 12, 12), out)
    assert out.sum() == 9 + 1
