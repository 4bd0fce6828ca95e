"""SSD's photometric distortion on uint8 images.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016), as the original YOLACT uses it:
brightness, contrast, saturation and hue, each with probability 1/2. The original works in float and
lets values leave 0..255, where a uint8 image saturates: of a dark microscopy image little would be
left, so brightness and contrast are held back where they would push half of the pixels out.

The four steps commute: brightness and contrast change the largest channel and the distances to it
like every channel, saturation scales those distances, hue only redistributes them. So SSD's random
order of contrast need not be drawn, and the image saturates once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18.0
_GRID = 32
"""Rows and columns, about, of the pixels whose median stands for the image's."""

_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True)
class Distortion:
    """What one image gets; the defaults change nothing.

    Attributes:
        brightness: added to every channel, first.
        contrast: factor on every channel.
        saturation: factor on HSV's saturation.
        hue: degrees added to HSV's hue.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def within_range(self, image: np.ndarray) -> Distortion:
        """The same with brightness and contrast held back to keep `image`'s median in 0..255.

        Args:
            image: uint8 `[h, w, 3]`.
        """
        if self.brightness == 0.0 and self.contrast <= 1.0:
            return self
        height, width = image.shape[:2]
        grid = image[::max(height // _GRID, 1), ::max(width // _GRID, 1)]
        median = float(np.median(grid))
        brightness = min(max(self.brightness, -median), 255.0 - median)
        contrast = min(self.contrast, max(255.0 / max(median + brightness, 1.0), 1.0))
        return replace(self, brightness=brightness, contrast=contrast)


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw SSD's distortion: each of the four with probability 1/2."""
    apply = rng.random(4) < 0.5
    brightness, hue = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(-HUE, HUE)
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    return Distortion(
        brightness=brightness if apply[0] else 0.0,
        contrast=contrast if apply[1] else 1.0,
        saturation=saturation if apply[2] else 1.0,
        hue=hue if apply[3] else 0.0)


def distort(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Return the distorted image; `image` is BGR uint8 `[h, w, 3]` and is left as it is."""
    if distortion.hue != 0.0:
        image = _rotate_hue(image, distortion.hue)
    contrast, saturation = distortion.contrast, distortion.saturation
    offset = contrast * distortion.brightness
    if saturation != 1.0:
        # HSV's saturation scales the distance of every channel to the largest one.
        blue, green, red = cv2.split(image)
        largest = cv2.max(cv2.max(blue, green, blue), red, red)
        grey = cv2.merge([largest, largest, largest])
        return cv2.addWeighted(image, contrast * saturation, grey, contrast * (1.0 - saturation),
                               offset)
    if contrast != 1.0 or offset != 0.0:
        levels = np.clip(np.rint(_LEVELS * contrast + offset), 0, 255)
        return cv2.LUT(image, levels.astype(np.uint8))
    return image


def _rotate_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    # The _FULL variants spread 360 degrees over the 256 values of a byte, so hue wraps by itself.
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
    hue = hsv[:, :, 0]
    hue += np.uint8(int(round(degrees * 256.0 / 360.0)) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)
