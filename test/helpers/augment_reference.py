"""A slow and plain second SSD augmentation, in float, as the original applies it step by step.

`draw` makes its draws from a `numpy.random.RandomState` in the original's order, so that the
recorded seeds can be replayed; `render` resamples the way the original does: canvas, slice, resize.
"""

from __future__ import annotations

import cv2
import numpy as np

from data.augment import Distortion, Placement

MEAN_BGR = np.array([103.94, 116.78, 123.68], np.float32)
STD_BGR = np.array([57.38, 57.12, 58.40], np.float32)


def draw_distortion(r):
    brightness = r.uniform(-32, 32) if r.randint(2) else 0.0
    contrast_first = r.randint(2)
    contrast, saturation, hue = 1.0, 1.0, 0.0
    if contrast_first and r.randint(2):
        contrast = r.uniform(.5, 1.5)
    if r.randint(2):
        saturation = r.uniform(.5, 1.5)
    if r.randint(2):
        hue = r.uniform(-18, 18)
    if not contrast_first and r.randint(2):
        contrast = r.uniform(.5, 1.5)
    return Distortion(brightness, contrast, saturation, hue)


def draw_expansion(r, width, height):
    """Left, top and size of the canvas."""
    if r.randint(2):
        return 0, 0, width, height
    ratio = r.uniform(1, 4)
    left, top = r.uniform(0, width * ratio - width), r.uniform(0, height * ratio - height)
    return int(left), int(top), int(width * ratio), int(height * ratio)


def draw_crop(r, width, height, centres, min_iou=None):
    """x1 y1 x2 y2; `min_iou` maps a candidate and a limit to whether the limit is met."""
    while True:
        mode = [None, .1, .3, .7, .9, -np.inf][r.randint(6)]
        if mode is None:
            return 0, 0, width, height
        for _ in range(50):
            w, h = r.uniform(.3 * width, width), r.uniform(.3 * height, height)
            if h / w < .5 or h / w > 2:
                continue
            left, top = r.uniform(width - w), r.uniform(height - h)
            rect = np.array([int(left), int(top), int(left + w), int(top + h)])
            if min_iou is not None and not min_iou(rect, mode):
                continue
            if ((rect[:2] < centres) & (centres < rect[2:])).all(1).any():
                return tuple(int(v) for v in rect)


def draw(r, width, height, boxes, size):
    """Distortion and placement of one image; `boxes` [n, 4] in pixels."""
    distortion = draw_distortion(r)
    left, top, canvas_width, canvas_height = draw_expansion(r, width, height)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 + [left, top]
    crop = draw_crop(r, canvas_width, canvas_height, centres)
    return distortion, Placement(width, height, left, top, crop, bool(r.randint(2)), size)


def distort(image, distortion):
    """Float image; values may leave 0..255."""
    image = (image.astype(np.float32) + distortion.brightness) * distortion.contrast
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2HSV)
    hsv[:, :, 1] *= distortion.saturation
    hsv[:, :, 0] = (hsv[:, :, 0] + distortion.hue) % 360
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def render(image, masks, distortion, placement):
    """Float image [S, S, 3], not saturated, and masks [n, S, S] of all objects."""
    p, (x1, y1, x2, y2) = placement, placement.crop
    shape = (max(y2, p.top + p.height), max(x2, p.left + p.width))
    canvas = np.empty(shape + (3,), np.float32)
    canvas[:] = MEAN_BGR
    canvas[p.top:p.top + p.height, p.left:p.left + p.width] = distort(image, distortion)
    drawn = np.zeros((len(masks),) + shape, np.uint8)
    drawn[:, p.top:p.top + p.height, p.left:p.left + p.width] = masks
    flip = slice(None, None, -1 if p.mirror else 1)
    canvas = np.ascontiguousarray(canvas[y1:y2, x1:x2][:, flip])
    drawn = [np.ascontiguousarray(mask[y1:y2, x1:x2][:, flip]) for mask in drawn]
    size = (p.size, p.size)
    return cv2.resize(canvas, size), np.stack([cv2.resize(mask, size) for mask in drawn])
