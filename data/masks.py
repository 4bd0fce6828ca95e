"""Object masks: drawn once at the size the network sees, and shrunk to its prototypes' size."""

from __future__ import annotations

from typing import List, Tuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from data.geometry import Affine
from data.sample import Polygons, Rle, Segmentation

_FRACTION_BITS = 8
_FINE_SIDE = 128
"""Outlines up to this size (pixels) are drawn at twice the resolution."""


def draw_masks(segmentations: List[Segmentation], affine: Affine, size: int) -> np.ndarray:
    """Draw each object as `affine` places it: uint8 `[n, S, S]` of 0 and 1."""
    masks = np.zeros((len(segmentations), size, size), np.uint8)
    for segmentation, mask in zip(segmentations, masks):
        if isinstance(segmentation, dict):
            _draw_rle(segmentation, affine, mask)
        else:
            _draw_polygons(segmentation, affine, mask)
    return masks


def _draw_polygons(polygons: Polygons, affine: Affine, mask: np.ndarray) -> None:
    """Fill the union of `polygons` into `mask` `[S, S]`, in place.

    A pixel belongs to an object if its centre does. OpenCV fills half a pixel more on every side,
    as it draws the outline too; the common part of two copies, half a pixel up-left and half a
    pixel down-right of the true place, has the right size (tested against pycocotools). Small
    outlines are drawn at twice the resolution, where the copies are two samples of one drawing.
    """
    scale, shift = affine
    points = [polygon * scale + shift for polygon in polygons]
    low = np.min([part.min(0) for part in points], axis=0)
    high = np.max([part.max(0) for part in points], axis=0)
    left, top = np.clip(np.floor(low), 0, mask.shape[0]).astype(int)
    right, bottom = np.clip(np.ceil(high), 0, mask.shape[0]).astype(int)
    if right <= left or bottom <= top:
        return
    width, height = int(right - left), int(bottom - top)
    if max(width, height) <= _FINE_SIDE:
        origin = np.array([left + 0.25, top + 0.25])
        fine = _fill(points, origin, 2.0, (2 * height, 2 * width))
        drawn = fine[0::2, 0::2] & fine[1::2, 1::2]
    else:
        origin = np.array([left, top], np.float64)
        drawn = _fill(points, origin, 1.0, (height, width))
        drawn &= _fill(points, origin + 1.0, 1.0, (height, width))
    mask[top:bottom, left:right] = drawn


def _fill(points: List[np.ndarray], origin: np.ndarray, zoom: float,
          shape: Tuple[int, int]) -> np.ndarray:
    """Fill each part on its own, so that overlapping parts are a union; 0/1 uint8 of `shape`."""
    canvas = np.zeros(shape, np.uint8)
    for part in points:
        fixed = np.rint((part - origin) * (zoom * (1 << _FRACTION_BITS))).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], 1, lineType=cv2.LINE_8, shift=_FRACTION_BITS)
    return canvas


def _draw_rle(rle: Rle, affine: Affine, mask: np.ndarray) -> None:
    """Warp decoded run lengths into `mask` `[S, S]`, in place."""
    scale, shift = affine
    decoded = np.ascontiguousarray(coco_mask.decode(rle))
    start = (0.5 - shift) / scale - 0.5
    matrix = np.array([[1.0 / scale[0], 0.0, start[0]], [0.0, 1.0 / scale[1], start[1]]])
    # Bilinear on 0 and 1 rounds at one half: a pixel belongs to an object if most of it does.
    cv2.warpAffine(decoded, matrix, mask.shape[::-1], mask, borderMode=cv2.BORDER_CONSTANT,
                   flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


class MaskShrinker:
    """Bilinear resize of 0/1 masks to a smaller square, thresholded above one half.

    Equal to torch's `F.interpolate(mode='bilinear', align_corners=False) > 0.5`. An output pixel
    depends on four input bits; which of their 16 patterns exceed one half is tabled in advance.
    """

    def __init__(self, size: int, shrunk: int) -> None:
        self.low, high, weight = _bilinear_taps(size, shrunk)
        self.high = high
        self.columns = np.minimum(self.low, size - 2)
        self.table = _majority_table(weight, self.low - self.columns)

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        """Shrink uint8 `[n, S, S]` to uint8 `[n, h, h]`."""
        pattern = masks[:, self.high]
        pattern <<= 2
        pattern |= masks[:, self.low]
        pairs = pattern[:, :, 1:] << 1
        pairs |= pattern[:, :, :-1]
        chosen = np.take(pairs, self.columns, axis=2)
        return ((self.table >> chosen) & 1).astype(np.uint8)


def _bilinear_taps(size: int, shrunk: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper input index and the upper's weight, as torch computes them (float32)."""
    scale = np.float32(size) / np.float32(shrunk)
    place = scale * (np.arange(shrunk, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    place = np.maximum(place, np.float32(0))
    low = place.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)


def _majority_table(weight: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """For each output pixel a uint16 whose bit b says whether pattern b exceeds one half.

    Bits of a pattern: 1 upper left, 2 upper right, 4 lower left, 8 lower right. `moved` marks
    columns whose pair was moved left by one because it lies on the last column.
    """
    left = np.where(moved > 0, np.float32(0), 1 - weight)
    right = np.where(moved > 0, np.float32(1), weight)
    table = np.zeros((len(weight), len(weight)), np.uint16)
    for pattern in range(16):
        upper = left * (pattern & 1) + right * (pattern >> 1 & 1)
        lower = left * (pattern >> 2 & 1) + right * (pattern >> 3 & 1)
        value = (1 - weight)[:, None] * upper[None] + weight[:, None] * lower[None]
        table |= (value.astype(np.float32) > 0.5).astype(np.uint16) << np.uint16(pattern)
    return table
