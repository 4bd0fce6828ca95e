"""Where the pixels of an image land: expand, crop, mirror and resize as one affine map.

Coordinates are continuous: pixel i covers [i, i + 1), its centre lies at i + 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Tuple

import cv2
import numpy as np

Affine = Tuple[np.ndarray, np.ndarray]
"""Scale `[2]` and shift `[2]`, x first: output = input * scale + shift, in pixels."""


@dataclass(frozen=True)
class Placement:
    """An image on a larger canvas, of which a crop is mirrored and resized to a square.

    Attributes:
        width, height: of the image, pixels.
        left, top: the image's place on the canvas; 0 without expansion.
        crop: x1 y1 x2 y2 on the canvas, whole pixels; becomes the whole output.
        mirror: flip the output left to right.
        size: S, side of the square output.
    """

    width: int
    height: int
    left: int
    top: int
    crop: Tuple[int, int, int, int]
    mirror: bool
    size: int

    @property
    def affine(self) -> Affine:
        """From pixels of the image to pixels of the output."""
        x1, y1, x2, y2 = self.crop
        scale = np.array([self.size / (x2 - x1), self.size / (y2 - y1)])
        shift = np.array([self.left - x1, self.top - y1]) * scale
        if self.mirror:
            scale[0], shift[0] = -scale[0], self.size - shift[0]
        return scale, shift

    @property
    def visible(self) -> Tuple[int, int, int, int]:
        """x1 y1 x2 y2 of the part of the image inside the crop, in pixels of the image."""
        x1, y1, x2, y2 = self.crop
        return (max(x1 - self.left, 0), max(y1 - self.top, 0),
                min(x2 - self.left, self.width), min(y2 - self.top, self.height))

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Map boxes `[n, 4]`, relative to the image, to float32 boxes relative to the output.

        They are clipped to the output.
        """
        scale, shift = self.affine
        corners = boxes.reshape(-1, 2, 2) * [self.width, self.height] * scale + shift
        corners = np.clip(corners / self.size, 0.0, 1.0).astype(np.float32)
        if self.mirror:
            corners[:, :, 0] = corners[:, ::-1, 0]
        return corners.reshape(-1, 4)


def resample(image: np.ndarray, placement: Placement, fill: Tuple[int, int, int],
             distort: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Render `image` uint8 `[h, w, 3]` as `placement` says: uint8 `[S, S, 3]`, bilinear.

    Canvas outside the image becomes `fill`. `distort`, a change of colours pixel by pixel, is
    applied to the image but not to the fill, before or after resampling, where there are fewer
    pixels.
    """
    x1, y1, x2, y2 = placement.visible
    part, size = image[y1:y2, x1:x2], placement.size
    crop = placement.crop
    if (x2 - x1, y2 - y1) == (crop[2] - crop[0], crop[3] - crop[1]):
        output = _in_cheaper_order(
            part, size * size, distort,
            lambda pixels: cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR))
    else:
        output = np.empty((size, size, 3), np.uint8)
        cv2.rectangle(output, (0, 0), (size, size), fill, cv2.FILLED)
        _paste(output, part, placement, distort)
    return cv2.flip(output, 1) if placement.mirror else output


def _paste(output: np.ndarray, part: np.ndarray, placement: Placement,
           distort: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draw the visible part of an expanded image where the crop, not yet mirrored, shows it."""
    size, (x1, y1, x2, y2) = placement.size, placement.crop
    scale = np.array([size / (x2 - x1), size / (y2 - y1)])
    visible = np.array(placement.visible).reshape(2, 2)
    place = (visible + [placement.left - x1, placement.top - y1]) * scale
    # Output pixels whose centres lie on the image.
    (left, top), (right, bottom) = np.clip(np.ceil(place - 0.5), 0, size).astype(int)
    if right <= left or bottom <= top:
        return
    start = (np.array([left, top]) + 0.5 - place[0]) / scale - 0.5
    matrix = np.array([[1.0 / scale[0], 0.0, start[0]], [0.0, 1.0 / scale[1], start[1]]])
    shape = (int(right - left), int(bottom - top))
    output[top:bottom, left:right] = _in_cheaper_order(
        part, shape[0] * shape[1], distort,
        lambda pixels: cv2.warpAffine(pixels, matrix, shape, borderMode=cv2.BORDER_REPLICATE,
                                      flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))


def _in_cheaper_order(part: np.ndarray, output_pixels: int,
                      distort: Callable[[np.ndarray], np.ndarray],
                      resize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if part.shape[0] * part.shape[1] < output_pixels:
        return resize(distort(part))
    return distort(resize(part))
