"""Images of detections and of ground truth.

Boxes and masks in the colour of their class, names and scores on plates that never leave the
image, all anti-aliased. Images are uint8 `[h, w, 3]` BGR, as OpenCV reads and writes them.
"""

from __future__ import annotations

import colorsys
from typing import NamedTuple, Sequence, Tuple

import cv2
import numpy as np

Color = Tuple[int, int, int]
"""Blue, green, red in 0..255."""

MASK_OPACITY = 0.45
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SHIFT = 4
"""Fractional bits of the coordinates handed to OpenCV's drawing functions."""
_GOLDEN_RATIO = 0.618033988749895
_TONES = ((0.85, 1.0), (0.55, 0.95), (1.0, 0.65))
"""Saturation and value, in turns."""


class _Style(NamedTuple):
    """Sizes in pixels that follow from the size of the image."""

    line: int
    font_scale: float
    font_line: int
    padding: int


class _Plate(NamedTuple):
    """A name plate: its rectangle (right and bottom excluded) and where its text starts."""

    left: int
    top: int
    right: int
    bottom: int
    text: str
    baseline: int
    font_scale: float

    def on(self, image: np.ndarray) -> np.ndarray:
        """Its part of an image, which may be changed."""
        return image[self.top:self.bottom, self.left:self.right]


class MaskWindow(NamedTuple):
    """Part of a mask; outside of it nothing is set."""

    left: int
    top: int
    pixels: np.ndarray
    """bool or 0/1 `[h, w]`."""


def class_color(label: str, class_names: Sequence[str]) -> Color:
    """Return the colour of one of the classes: neighbours in the list get hues far apart."""
    index = list(class_names).index(label) if label in class_names else 0
    saturation, value = _TONES[index % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1.0, saturation, value)
    return int(round(blue * 255)), int(round(green * 255)), int(round(red * 255))


def draw_instances(image_bgr: np.ndarray, boxes_px: np.ndarray,
                   masks: Sequence[np.ndarray | MaskWindow] | None, labels: Sequence[str],
                   class_names: Sequence[str] = (), texts: Sequence[str] | None = None,
                   outline_boxes: bool = True) -> np.ndarray:
    """Draw n objects and return a new image.

    Args:
        image_bgr: uint8 `[h, w, 3]`; not changed.
        boxes_px: `[n, 4]` x1 y1 x2 y2 in pixels; fractions and parts outside are fine.
        masks: n of bool (or 0/1) `[h, w]`, or windows of such, or None. Each is asked for once,
            so that a sequence may make them as it goes.
        labels: n class names; an empty one draws no plate.
        class_names: all classes, for colours that differ as much as they can.
        texts: what is written on the plates in place of the labels; '' draws no plate.
        outline_boxes: draw the boxes.
    """
    boxes = np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4)
    image = np.ascontiguousarray(image_bgr).copy()
    style = _style(image)
    colors = [class_color(label, class_names) for label in labels]
    # Large ones first, so that what is small is not buried.
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    order = np.argsort(-sides.prod(axis=1), kind="stable").tolist()
    if masks is not None:
        outlines = [_fill_mask(image, masks[i], colors[i]) for i in order]
        for i, outline in zip(order, outlines):
            cv2.polylines(image, outline, True, colors[i], 1, cv2.LINE_AA)
    if outline_boxes:
        for i in order:
            _draw_box(image, boxes[i], colors[i], style)
    texts = labels if texts is None else texts
    plates = np.zeros(image.shape[:2], np.int32)
    for i in order:
        if texts[i]:
            plate = _place(plates, boxes[i], texts[i], style)
            plate.on(plates)[...] += 1
            _draw_plate(image, plate, colors[i], style)
    return image


def draw_corner_text(image: np.ndarray, text: str) -> None:
    """Write a line into the upper left corner of uint8 `[h, w, 3]`, in place."""
    style = _style(image)
    plate = _place(np.zeros(image.shape[:2], np.int32), np.zeros(4), text, style)
    _draw_plate(image, plate, (60, 60, 60), style)


def side_by_side(images: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Put images beside each other, each under its title, on a white ground.

    Images may differ in size; they are not scaled. A title that is too wide is made smaller.
    """
    height = max(image.shape[0] for image in images)
    gap = left = max(4, height // 40)
    bar = max(18, height // 16)
    thickness = max(1, bar // 24)
    width = sum(image.shape[1] for image in images) + gap * (len(images) + 1)
    canvas = np.full((height + bar + gap, width, 3), 255, dtype=np.uint8)
    for image, title in zip(images, titles):
        h, w = image.shape[:2]
        canvas[bar:bar + h, left:left + w] = image
        text, scale = _fit_text(title, bar / 40, thickness, w)
        text_height = cv2.getTextSize(text, _FONT, scale, thickness)[0][1]
        cv2.putText(canvas, text, (left, (bar + text_height) // 2), _FONT, scale, (30, 30, 30),
                    thickness, cv2.LINE_AA)
        left += w + gap
    return canvas


def _style(image: np.ndarray) -> _Style:
    side = (image.shape[0] * image.shape[1]) ** 0.5
    scale = float(np.clip(side / 1100, 0.33, 1.6))
    return _Style(line=max(1, int(round(side / 380))), font_scale=scale,
                  font_line=max(1, int(round(scale * 1.4))), padding=max(2, int(round(scale * 5))))


def _fill_mask(image: np.ndarray, mask: np.ndarray | MaskWindow, color: Color) -> list[np.ndarray]:
    """Blend a colour into the mask's pixels; returns the outlines of the mask."""
    if not isinstance(mask, MaskWindow):
        mask = MaskWindow(0, 0, mask)
    if not mask.pixels.any():
        return []
    whole = np.ascontiguousarray(mask.pixels, dtype=np.uint8)
    x, y, width, height = cv2.boundingRect(whole)
    left, top = mask.left + x, mask.top + y
    inside = whole[y:y + height, x:x + width]
    part = image[top:top + inside.shape[0], left:left + inside.shape[1]]
    share = np.arange(256)[:, None] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY
    cv2.copyTo(cv2.LUT(part, (share + 0.5).astype(np.uint8)[None]), inside, part)
    return list(cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE,
                                 offset=(left, top))[-2])


def _draw_box(image: np.ndarray, box: np.ndarray, color: Color, style: _Style) -> None:
    """Outline a box; one that reaches the border is drawn just inside, so that it is seen whole."""
    inset = (style.line - 1) / 2
    high = np.maximum(np.array(image.shape[1::-1]) - 1 - inset, inset)
    # Box edges lie between pixels, OpenCV's coordinates at their centres.
    (x1, y1), (x2, y2) = np.clip(box.reshape(2, 2) - 0.5, inset, high)
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    points = np.round(corners * 2 ** _SHIFT).astype(np.int32).reshape(-1, 1, 2)
    cv2.polylines(image, [points], True, color, style.line, cv2.LINE_AA, _SHIFT)


def _fit_text(text: str, scale: float, thickness: int, width: int) -> tuple[str, float]:
    """Make text smaller, down to a still readable size, and then shorter, until it fits."""
    def is_fit(candidate: str) -> bool:
        return cv2.getTextSize(candidate, _FONT, scale, thickness)[0][0] <= width

    smallest = min(scale, 0.3)
    while not is_fit(text) and scale > smallest:
        scale = max(scale * 0.9, smallest)
    if is_fit(text):
        return text, scale
    while text and not is_fit(text + ".."):
        text = text[:-1]
    return (text + ".." if text else ""), scale


def _place(plates: np.ndarray, box: np.ndarray, text: str, style: _Style) -> _Plate:
    """Find a place for a plate: wholly inside the image and, if there is one, on no other.

    `plates` is how many there are on each pixel of the image, `[h, w]`.
    """
    height, width = plates.shape
    text, scale = _fit_text(text, style.font_scale, style.font_line, width - 2 * style.padding)
    (text_width, text_height), below = cv2.getTextSize(text, _FONT, scale, style.font_line)
    plate_width = text_width + 2 * style.padding
    plate_height = text_height + below + 2 * (style.padding // 2)
    x1, y1, x2, y2 = np.round(np.clip(box, -1e6, 1e6)).astype(int).tolist()
    candidates = []
    for wanted_top in (y1 - plate_height, y1, y2 - plate_height, y2):
        for wanted_left in (x1, x2 - plate_width):
            left = max(min(wanted_left, width - plate_width), 0)
            top = max(min(wanted_top, height - plate_height), 0)
            candidates.append(_Plate(left, top, left + plate_width, top + plate_height, text,
                                     top + style.padding // 2 + text_height, scale))
    # The least covered one; the first of several such.
    return min(candidates, key=lambda plate: int(plate.on(plates).sum()))


def _draw_plate(image: np.ndarray, plate: _Plate, color: Color, style: _Style) -> None:
    plate.on(image)[...] = color
    # Rec. 601 luma: black text on light colours, white on dark ones.
    ink = (0, 0, 0) if np.dot((0.114, 0.587, 0.299), color) > 140 else (255, 255, 255)
    cv2.putText(image, plate.text, (plate.left + style.padding, plate.baseline), _FONT,
                plate.font_scale, ink, style.font_line, cv2.LINE_AA)
