"""Object masks: drawn once at the size the network sees, and shrunk to its prototypes' size."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple, Union

import cv2
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

Affine = Tuple[np.ndarray, np.ndarray]
"""Scale `[2]` and shift `[2]`, x first: output = input * scale + shift, in pixels. Coordinates are
continuous: pixel i covers [i, i + 1), its centre lies at i + 0.5."""

Polygons = List[np.ndarray]
"""Outlines of one object: float32 `[m, 2]` arrays of x, y in pixels of the stored image."""

Rle = Dict[str, Any]
"""Compressed COCO run lengths: `{"size": [h, w], "counts": bytes}`, for pycocotools.mask."""

Segmentation = Union[Polygons, Rle]

Extent = Tuple[int, int, int, int]
"""x1 y1 x2 y2 in whole pixels; all that is set in a mask lies inside."""

_FRACTION_BITS = 8
_FINE_SIDE = 128
"""Outlines up to this size (pixels) are drawn at twice the resolution."""

_MOST_EDGES = 1000
"""Of an outline on one line of pixels, on average, that OpenCV fills: its time grows with their
square, to minutes for 100,000 points that cross each other."""


def draw_masks(segmentations: list[Segmentation], affine: Affine,
               size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw each object as `affine` places it.

    Returns:
        Masks uint8 `[n, S, S]` of 0 and 1, and extents int64 `[n, 4]`: x1 y1 x2 y2 in whole pixels
        around all that was drawn; 0 0 0 0 where nothing was.
    """
    masks = np.zeros((len(segmentations), size, size), np.uint8)
    extents = np.zeros((len(segmentations), 4), np.int64)
    for segmentation, mask, extent in zip(segmentations, masks, extents):
        if isinstance(segmentation, dict):
            drawn = _draw_rle(segmentation, affine, mask)
        else:
            drawn = _draw_polygons(segmentation, affine, mask)
        x1, y1, x2, y2 = drawn
        if mask[y1:y2, x1:x2].any():
            extent[:] = drawn
    return masks, extents


def _draw_polygons(polygons: Polygons, affine: Affine, mask: np.ndarray) -> Extent:
    """Fill the union of `polygons` into `mask` `[S, S]`, in place; returns where.

    A pixel belongs to an object if its centre does. OpenCV fills half a pixel more on every side,
    as it draws the outline too; the common part of two copies, half a pixel up-left and half a
    pixel down-right of the true place, has the right size (tested against pycocotools). Small
    outlines are drawn at twice the resolution, where the copies are two samples of one drawing.
    """
    scale, shift = affine
    points = [polygon * scale + shift for polygon in polygons]
    low = np.min([part.min(0) for part in points], axis=0)
    high = np.max([part.max(0) for part in points], axis=0)
    left, top = np.clip(np.floor(low), 0, mask.shape[0]).astype(int).tolist()
    right, bottom = np.clip(np.ceil(high), 0, mask.shape[0]).astype(int).tolist()
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0:
        return 0, 0, 0, 0
    if any(map(_is_tangled, points)):
        image = Image.new("L", (width, height))
        for part in points:
            ImageDraw.Draw(image).polygon((part - [left + 0.5, top + 0.5]).ravel().tolist(), fill=1)
        drawn = np.asarray(image)
    elif max(width, height) <= _FINE_SIDE:
        origin = np.array([left + 0.25, top + 0.25])
        fine = _fill(points, origin, 2.0, (2 * height, 2 * width))
        drawn = fine[0::2, 0::2] & fine[1::2, 1::2]
    else:
        origin = np.array([left, top], np.float64)
        drawn = _fill(points, origin, 1.0, (height, width))
        drawn &= _fill(points, origin + 1.0, 1.0, (height, width))
    mask[top:bottom, left:right] = drawn
    return left, top, right, bottom


def _is_tangled(part: np.ndarray) -> bool:
    """Whether more than `_MOST_EDGES` of an outline `[m, 2]` lie on a line, on average."""
    down = part[:, 1]
    return len(part) > _MOST_EDGES and bool(
        np.abs(np.diff(down)).sum() > _MOST_EDGES * max(float(np.ptp(down)), 1.0))


def _fill(points: list[np.ndarray], origin: np.ndarray, zoom: float,
          shape: tuple[int, int]) -> np.ndarray:
    """Fill each part on its own, so that overlapping parts are a union; 0/1 uint8 of `shape`."""
    canvas = np.zeros(shape, np.uint8)
    for part in points:
        fixed = np.rint((part - origin) * (zoom * (1 << _FRACTION_BITS))).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 1, lineType=cv2.LINE_8, shift=_FRACTION_BITS)
    return canvas


def _draw_rle(rle: Rle, affine: Affine, mask: np.ndarray) -> Extent:
    """Warp decoded run lengths into `mask` `[S, S]`, in place; returns where."""
    scale, shift = affine
    decoded = np.ascontiguousarray(coco_mask.decode(rle))
    start = (0.5 - shift) / scale - 0.5
    matrix = np.array([[1.0 / scale[0], 0.0, start[0]], [0.0, 1.0 / scale[1], start[1]]])
    # Bilinear on 0 and 1 rounds at one half: a pixel belongs to an object if most of it does.
    cv2.warpAffine(decoded, matrix, mask.shape[::-1], mask, borderMode=cv2.BORDER_CONSTANT,
                   flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    x, y, width, height = cv2.boundingRect(mask)
    return x, y, x + width, y + height


class MaskShrinker:
    """Bilinear resize of a 0/1 mask to a smaller square, thresholded above one half.

    Equal to torch's `F.interpolate(mode='bilinear', align_corners=False) > 0.5`.
    """

    def __init__(self, size: int, shrunk: int) -> None:
        # As torch computes them, in float32.
        scale, half = np.float32(size) / np.float32(shrunk), np.float32(0.5)
        place = np.maximum(scale * (np.arange(shrunk, dtype=np.float32) + half) - half, 0)
        low = place.astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        self.weight = place - low.astype(np.float32)  # of the upper one
        self.taps = np.stack((low, high), axis=1).ravel()  # two for each output pixel
        places = np.arange(size + 1)
        self.first = np.searchsorted(high, places).tolist()
        self.end = np.searchsorted(low, places).tolist()

    def __call__(self, mask: np.ndarray, extent: Extent, out: np.ndarray) -> None:
        """Set in `out` `[h, h]` what uint8 `mask` `[S, S]` shrinks to; leave the rest as it is.

        Outside `extent` the mask is 0.
        """
        x1, y1, x2, y2 = extent
        left, right, top, bottom = self.first[x1], self.end[x2], self.first[y1], self.end[y2]
        corners = mask.take(self.taps[2 * top:2 * bottom], axis=0).take(
            self.taps[2 * left:2 * right], axis=1)
        # Along x first, as torch does: values of one half are decided by the last bit.
        weight = self.weight[left:right]
        lines = corners[:, 0::2] * (1 - weight) + corners[:, 1::2] * weight
        weight = self.weight[top:bottom, None]
        out[top:bottom, left:right] |= lines[0::2] * (1 - weight) + lines[1::2] * weight > 0.5
