"""Drawn scenes: shapes on a textured ground, and their ground truth in COCO's format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import cv2
import numpy as np

from data.tools.conversion import run_lengths

CLASS_NAMES = ("circle", "square", "triangle", "star")
SPLITS = ("train", "val")

MIN_RADIUS, MAX_RADIUS = 16, 64
MAX_OBJECTS = 5
MIN_VISIBLE = 0.4
EMPTY_SHARE, CROWD_SHARE = 0.03, 0.06
PLACING_TRIES = 12
MIN_CONTRAST = 170
"""Least sum over BGR of the differences between a shape's colour and what lies under it."""
MIN_PIECE = 6
"""Pixels below which a separate piece of a mask gets no outline."""

_CORNERS = {"circle": 36, "square": 4, "triangle": 3, "star": 10}
_FINE = 8  # samples along a pixel's side
_TRACED = 4  # outlines are traced on masks enlarged by this, so that they run along pixel edges
_SHIFT = 4  # fractional bits of OpenCV's coordinates


@dataclass
class ShapeObject:
    """One object (or crowd) of a scene; later ones lie over earlier ones.

    Attributes:
        label: index into `CLASS_NAMES`.
        points: outline of the whole shape, float64 `[n, 2]` x, y in pixels; None for a crowd.
        visible: bool `[h, w]`, what later objects have left of it.
        area: pixels of the whole object.
    """

    label: int
    points: Optional[np.ndarray]
    visible: np.ndarray
    area: int


@dataclass
class Scene:
    """An image, uint8 `[h, w, 3]` BGR, and its objects in drawing order."""

    image: np.ndarray
    objects: List[ShapeObject]


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draw image `index` of a split; it depends on nothing but these three values."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = (8 * rng.integers(23, 28, 2)).tolist()
    canvas = _background(rng, height, width)
    objects: List[ShapeObject] = []
    if rng.random() >= EMPTY_SHARE:
        if rng.random() < CROWD_SHARE:
            _add_crowd(rng, canvas, objects)
        for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
            _add_shape(rng, canvas, objects)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects)


def annotate(scene: Scene) -> List[Dict[str, Any]]:
    """COCO annotations of a scene without `id` and `image_id`; categories count from 1.

    A shape in full view has its own outline, a partly hidden one the traced outline of what is
    visible, one with a hole in it the run lengths of its pixels; a crowd has run lengths too.
    """
    annotations = []
    for item in scene.objects:
        area = int(item.visible.sum())
        polygons: List[np.ndarray] = []
        if item.points is not None:
            polygons = [item.points] if area == item.area else outlines(item.visible)
        if polygons:
            corners = np.concatenate(polygons)
            low, high = corners.min(axis=0), corners.max(axis=0)
            box = np.concatenate([low, high - low]).tolist()
        else:
            box = [float(side) for side in cv2.boundingRect(item.visible.astype(np.uint8))]
        annotations.append({
            "category_id": item.label + 1, "iscrowd": int(item.points is None), "area": area,
            "bbox": box, "segmentation": [points.ravel().tolist() for points in polygons]
            or run_lengths(item.visible)})
    return annotations


def outlines(mask: np.ndarray) -> List[np.ndarray]:
    """Trace a bool `[h, w]` mask: float64 `[n, 2]` polygons, to within half a pixel.

    Pieces smaller than `MIN_PIECE` are left out. A mask with a hole has none: polygons cannot say
    it.
    """
    fine = mask.astype(np.uint8).repeat(_TRACED, axis=0).repeat(_TRACED, axis=1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[-2:]
    if hierarchy is None or (hierarchy[0, :, 3] >= 0).any():
        return []
    pieces = [contour for contour in contours
              if cv2.contourArea(contour) >= MIN_PIECE * _TRACED ** 2]
    simple = [cv2.approxPolyDP(piece, _TRACED / 2, True).reshape(-1, 2) for piece in pieces]
    return [(points + 0.5) / _TRACED for points in simple if len(points) > 2]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float64 `[h, w, 3]`: base colour, gradient, three octaves of noise and clutter lines."""
    slope = rng.integers(-40, 41, (2, 3))
    y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    canvas = rng.integers(50, 206, 3) + slope[0] * y + slope[1] * x
    for cell, strength, channels in ((32, 28, 3), (8, 12, 1), (4, 8, 1)):
        canvas += _noise(rng, (height, width, channels), cell, strength)
    canvas = np.clip(canvas, 0, 255)
    for _ in range(rng.integers(2, 8)):
        angle = np.radians(rng.integers(360))
        along = np.array([np.cos(angle), np.sin(angle)]) * rng.integers(15, 91)
        across = np.array([-np.sin(angle), np.cos(angle)]) * rng.uniform(0.6, 1.5)
        corners = [along + across, along - across, -along - across, across - along]
        _paint(canvas, rng.uniform(0, [width, height]) + corners, rng.integers(0, 256, 3))
    return canvas


def _noise(rng: np.random.Generator, shape: Tuple[int, ...], cell: int,
           strength: int) -> np.ndarray:
    """Random values, `cell` pixels apart, with what lies between interpolated."""
    rows, columns = shape[0] // cell + 2, shape[1] // cell + 2
    lattice = rng.integers(-strength, strength + 1, (rows, columns) + shape[2:])
    blown = cv2.resize(lattice.astype(np.float32), (columns * cell, rows * cell),
                       interpolation=cv2.INTER_LINEAR)
    half = cell // 2
    return blown[half:half + shape[0], half:half + shape[1]].reshape(shape)


def _shape_points(rng: np.random.Generator, label: int, radius: int,
                  centre: np.ndarray) -> np.ndarray:
    """Outline of a turned shape, float64 `[n, 2]` in whole eighths of a pixel."""
    corners = _CORNERS[CLASS_NAMES[label]]
    angles = np.radians(rng.integers(360) + np.arange(corners) * (360 / corners))
    reach = np.full((corners, 1), float(radius))
    if CLASS_NAMES[label] == "star":
        reach[1::2] *= 0.45
    points = centre + reach * np.column_stack([np.cos(angles), np.sin(angles)])
    return np.rint(points * 8) / 8


def _add_shape(rng: np.random.Generator, canvas: np.ndarray, objects: List[ShapeObject]) -> None:
    """Place one shape so that every earlier object stays visible enough, and paint it."""
    size = np.array(canvas.shape[1::-1])
    label = int(rng.integers(len(CLASS_NAMES)))
    for attempt in range(PLACING_TRIES):
        radius = int(rng.integers(MIN_RADIUS, MAX_RADIUS - attempt * 4 + 1))
        points = _shape_points(rng, label, radius, rng.uniform(radius, size - radius))
        region = _region(points, canvas)
        if all((item.visible & ~region).sum() >= MIN_VISIBLE * item.area for item in objects):
            _put(objects, ShapeObject(label, points, region, int(region.sum())))
            _paint_shape(rng, canvas, points, radius, _contrasting(rng, canvas[region]))
            return


def _add_crowd(rng: np.random.Generator, canvas: np.ndarray, objects: List[ShapeObject]) -> None:
    """Paint a tight group of small shapes of one class and annotate them as one crowd."""
    label = int(rng.integers(len(CLASS_NAMES)))
    x, y = rng.integers(45, np.array(canvas.shape[1::-1]) - 45 + 1)
    color = _contrasting(rng, canvas[y - 20:y + 20, x - 20:x + 20].reshape(-1, 3))
    region = np.zeros(canvas.shape[:2], dtype=bool)
    for _ in range(rng.integers(7, 14)):
        radius = int(rng.integers(7, 11))
        points = _shape_points(rng, label, radius, [x, y] + rng.integers(-32, 33, 2))
        _paint_shape(rng, canvas, points, radius, color + rng.integers(-25, 26, 3))
        region |= _region(points, canvas)
    _put(objects, ShapeObject(label, None, region, int(region.sum())))


def _put(objects: List[ShapeObject], new: ShapeObject) -> None:
    for item in objects:
        item.visible &= ~new.visible
    objects.append(new)


def _contrasting(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour that stands out from the pixels `under` (`[n, 3]`) it will cover."""
    candidates = rng.integers(10, 246, (8, 3))
    contrast = np.abs(candidates - under.mean(axis=0)).sum(axis=1)
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    return candidates[enough[0] if len(enough) else int(contrast.argmax())]


def _cover(points: np.ndarray, canvas: np.ndarray) -> Tuple[Tuple[slice, slice], np.ndarray]:
    """Where on the canvas a polygon lies, and how much of each pixel there it covers (0..1)."""
    size = canvas.shape[1::-1]
    left, top = np.clip(np.floor(points.min(axis=0)), 0, size).astype(int).tolist()
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, size).astype(int).tolist()
    width, height = max(right - left, 1), max(bottom - top, 1)
    fine = np.zeros((height * _FINE, width * _FINE), np.uint8)
    # To OpenCV a pixel's centre is a whole number.
    fixed = ((points - [left, top]) * _FINE - 0.5) * (1 << _SHIFT)
    cv2.fillPoly(fine, [np.rint(fixed).astype(np.int32)], 255, shift=_SHIFT)
    cover = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) / 255
    return (slice(top, bottom), slice(left, right)), cover[:bottom - top, :right - left]


def _region(points: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Bool `[h, w]`, pixels at least half inside the polygon."""
    place, cover = _cover(points, canvas)
    region = np.zeros(canvas.shape[:2], dtype=bool)
    region[place] = cover >= 0.5
    return region


def _paint(canvas: np.ndarray, points: np.ndarray, color: np.ndarray,
           shading: Optional[Callable[[np.ndarray, np.ndarray], np.ndarray]] = None) -> None:
    """Blend a polygon of `color` (`[3]`) into the canvas.

    `shading(rows, columns)` is added to the colour, for rows `[h, 1]` and columns `[1, w]` of the
    canvas.
    """
    place, cover = _cover(points, canvas)
    if shading is not None:
        rows, columns = np.ogrid[place]
        color = np.clip(color + shading(rows, columns)[:, :, None], 0, 255)
    canvas[place] += (color - canvas[place]) * cover[:, :, None]


def _paint_shape(rng: np.random.Generator, canvas: np.ndarray, points: np.ndarray, radius: int,
                 color: np.ndarray) -> None:
    """Paint a shape with a shading across it and some noise."""
    centre = points.mean(axis=0)
    slope = rng.integers(-30, 31, 2) / radius

    def shading(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return (slope[0] * (columns - centre[0]) + slope[1] * (rows - centre[1])
                + _noise(rng, (len(rows), columns.shape[1]), cell=4, strength=14))

    _paint(canvas, points, np.clip(color, 0, 255), shading)
