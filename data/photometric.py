"""SSD's photometric distortion on uint8 images.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016), as the original YOLACT uses it:
brightness, contrast, saturation and hue, each with probability 1/2. The original works in float and
lets values leave 0..255; a uint8 image saturates there.

SSD applies contrast before or after the steps in HSV, at random. Those steps commute with a
positive factor on all channels, so the order does not matter and is not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18.0

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
    brightness, contrast = distortion.brightness, distortion.contrast
    if distortion.saturation == 1.0 and distortion.hue == 0.0:
        return _levels(image, contrast, contrast * brightness)
    # Only what cannot overflow goes before HSV: clipping a channel there would change its hue.
    before = min(contrast, 255.0 / (255.0 + max(brightness, 0.0)))
    image = _levels(image, before, before * brightness)
    image = _shift_hsv(image, distortion.saturation, distortion.hue)
    return _levels(image, contrast / before, 0.0)


def _levels(image: np.ndarray, gain: float, offset: float) -> np.ndarray:
    """Gain * image + offset, rounded and saturated."""
    if gain == 1.0 and offset == 0.0:
        return image
    return cv2.LUT(image, _saturate(_LEVELS * gain + offset))


def _shift_hsv(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    # The _FULL variants spread 360 degrees over the 256 values of a byte, so hue wraps by itself.
    table = np.empty((1, 256, 3), np.uint8)
    table[0, :, 0] = (np.arange(256) + int(round(hue * 256.0 / 360.0))) % 256
    table[0, :, 1] = _saturate(_LEVELS * saturation)
    table[0, :, 2] = np.arange(256)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
    cv2.LUT(hsv, table, hsv)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL, hsv)


def _saturate(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
