"""Drawn scenes: shapes on a textured ground, and their ground truth.

Random bits come from PCG64's raw stream, which NumPy guarantees, and all drawing is integer
arithmetic (`data.shape_raster`): the same seed gives the same pixels everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from data.shape_raster import (
    FULL_COVER,
    UNIT,
    cover_polygon,
    outlines,
    polar,
    run_lengths,
    value_noise,
)

CLASS_NAMES = ("circle", "square", "triangle", "star")
CORNERS = {"circle": 36, "square": 4, "triangle": 3, "star": 10}
SPLITS = ("train", "val")

MIN_RADIUS, MAX_RADIUS = 16, 64
MAX_OBJECTS = 5
MIN_VISIBLE_PERCENT = 40
EMPTY_PERCENT, CROWD_PERCENT = 3, 6
PLACING_TRIES = 12
MIN_CONTRAST = 170
"""Least sum over BGR of the differences between a shape's colour and what lies under it."""


class BitStream:
    """Random integers from PCG64's raw 64-bit outputs, whose stream never changes."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(list(key))

    def between(self, low: int, high: int) -> int:
        """Integer in low..high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def percent(self, chance: int) -> bool:
        """True in `chance` of a hundred draws."""
        return self.between(0, 99) < chance

    def array(self, shape: Tuple[int, ...], low: int, high: int) -> np.ndarray:
        """Array of int64 in low..high, both included."""
        count = int(np.prod(shape))
        raw = self._bits.random_raw(count) >> np.uint64(11)
        return (raw % np.uint64(high - low + 1)).astype(np.int64).reshape(shape) + low


@dataclass
class ShapeObject:
    """One object (or crowd) of a scene; later ones lie over earlier ones.

    Attributes:
        label: index into `CLASS_NAMES`.
        points: outline of the whole shape, int64 `[n, 2]` in 1/8 px; None for a crowd.
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
    bits = BitStream(seed, SPLITS.index(split), index)
    height, width = 8 * bits.between(23, 27), 8 * bits.between(23, 27)
    canvas = _background(bits, height, width)
    objects: List[ShapeObject] = []
    if not bits.percent(EMPTY_PERCENT):
        if bits.percent(CROWD_PERCENT):
            _add_crowd(bits, canvas, objects)
        for _ in range(bits.between(1, MAX_OBJECTS)):
            _add_shape(bits, canvas, objects)
    return Scene(canvas.astype(np.uint8), objects)


def annotate(scene: Scene) -> List[Dict[str, Any]]:
    """COCO annotations of a scene without `id` and `image_id`; categories count from 1.

    A shape in full view has its own outline, a partly hidden one the traced outline of what is
    visible, one with a hole in it the run lengths of its pixels; a crowd has run lengths too.
    """
    annotations = []
    for item in scene.objects:
        segmentation: Any = run_lengths(item.visible)
        box = _pixel_box(item.visible)
        area = int(item.visible.sum())
        if item.points is not None:
            polygons, holes = [item.points], False
            if area < item.area:
                polygons, holes = outlines(item.visible)
            if not holes:
                segmentation = [(points / UNIT).ravel().tolist() for points in polygons]
                corners = np.concatenate(polygons)
                low, high = corners.min(axis=0), corners.max(axis=0)
                box = (np.concatenate([low, high - low]) / UNIT).tolist()
        annotations.append({
            "category_id": item.label + 1, "iscrowd": int(item.points is None), "area": area,
            "bbox": box, "segmentation": segmentation})
    return annotations


def _background(bits: BitStream, height: int, width: int) -> np.ndarray:
    """Int64 `[h, w, 3]`: base colour, gradient, three octaves of noise and clutter lines."""
    base = bits.array((3,), 50, 205)
    slope = bits.array((2, 3), -40, 40)
    y, x = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    canvas = base + (slope[0] * (2 * y - height) // height + slope[1] * (2 * x - width) // width)
    for cell, strength, channels in ((32, 28, 3), (8, 12, 1), (4, 8, 1)):
        lattice = bits.array((height // cell + 2, width // cell + 2, channels), -strength, strength)
        canvas = canvas + value_noise(lattice, cell, height, width) // cell ** 2
    canvas = np.clip(canvas, 0, 255)
    for _ in range(bits.between(2, 7)):
        _paint(canvas, _line(bits, height, width), bits.array((3,), 0, 255))
    return canvas


def _line(bits: BitStream, height: int, width: int) -> np.ndarray:
    """Corners of a thin bar, int64 `[4, 2]` in 1/8 px."""
    centre = np.array([bits.between(0, width * UNIT), bits.between(0, height * UNIT)])
    angle = np.array([bits.between(0, 359)])
    along = polar(UNIT * bits.between(15, 90), angle)
    across = polar(bits.between(5, 12), angle + 90)
    return centre + np.concatenate([along + across, along - across, -along - across,
                                    across - along])


def _shape_points(bits: BitStream, label: int, radius: int, centre: np.ndarray) -> np.ndarray:
    """Outline of a turned shape, int64 `[n, 2]` in 1/8 px; `radius` in pixels."""
    corners = CORNERS[CLASS_NAMES[label]]
    angles = bits.between(0, 359) + np.arange(corners) * (360 // corners)
    points = polar(radius * UNIT, angles)
    if CLASS_NAMES[label] == "star":
        points[1::2] = polar(radius * UNIT * 45 // 100, angles[1::2])
    return points + centre


def _add_shape(bits: BitStream, canvas: np.ndarray, objects: List[ShapeObject]) -> None:
    """Place one shape so that every earlier object stays visible enough, and paint it."""
    height, width = canvas.shape[:2]
    label = bits.between(0, len(CLASS_NAMES) - 1)
    for attempt in range(PLACING_TRIES):
        radius = bits.between(MIN_RADIUS, MAX_RADIUS - attempt * 4)
        centre = np.array([bits.between(radius * UNIT, (width - radius) * UNIT),
                           bits.between(radius * UNIT, (height - radius) * UNIT)])
        points = _shape_points(bits, label, radius, centre)
        region = _region(points, height, width)
        if _keeps_visible(objects, region):
            _put(objects, ShapeObject(label, points, region, int(region.sum())))
            _paint_shape(bits, canvas, points, radius, _contrasting(bits, canvas[region]))
            return


def _add_crowd(bits: BitStream, canvas: np.ndarray, objects: List[ShapeObject]) -> None:
    """Paint a tight group of small shapes of one class and annotate them as one crowd."""
    height, width = canvas.shape[:2]
    label = bits.between(0, len(CLASS_NAMES) - 1)
    margin = 45
    middle = np.array([bits.between(margin, width - margin), bits.between(margin, height - margin)])
    color = _contrasting(bits, canvas[middle[1] - 20:middle[1] + 20,
                                      middle[0] - 20:middle[0] + 20].reshape(-1, 3))
    region = np.zeros((height, width), dtype=bool)
    for _ in range(bits.between(7, 13)):
        radius = bits.between(7, 10)
        centre = (middle + bits.array((2,), -32, 32)) * UNIT
        points = _shape_points(bits, label, radius, centre)
        shade = np.clip(color + bits.array((3,), -25, 25), 0, 255)
        _paint_shape(bits, canvas, points, radius, shade)
        region |= _region(points, height, width)
    _put(objects, ShapeObject(label, None, region, int(region.sum())))


def _keeps_visible(objects: List[ShapeObject], region: np.ndarray) -> bool:
    return all(100 * int((item.visible & ~region).sum()) >= MIN_VISIBLE_PERCENT * item.area
               for item in objects)


def _put(objects: List[ShapeObject], new: ShapeObject) -> None:
    for item in objects:
        item.visible &= ~new.visible
    objects.append(new)


def _contrasting(bits: BitStream, under: np.ndarray) -> np.ndarray:
    """A colour that stands out from the pixels `under` (`[n, 3]`) it will cover."""
    mean = under.sum(axis=0) // max(len(under), 1)
    candidates = bits.array((8, 3), 10, 245)
    contrast = np.abs(candidates - mean).sum(axis=1)
    enough = np.nonzero(contrast >= MIN_CONTRAST)[0]
    return candidates[enough[0] if len(enough) else int(contrast.argmax())]


def _bounds(points: np.ndarray, height: int, width: int) -> Tuple[int, int, int, int]:
    """First and one past the last row and column of the pixels a polygon may touch."""
    left, top = (points.min(axis=0) // UNIT).tolist()
    right, bottom = (-(-points.max(axis=0) // UNIT)).tolist()
    top, left = min(max(top, 0), height), min(max(left, 0), width)
    return top, max(min(bottom, height), top), left, max(min(right, width), left)


def _region(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bool `[h, w]`, pixels at least half inside the polygon."""
    top, bottom, left, right = _bounds(points, height, width)
    region = np.zeros((height, width), dtype=bool)
    cover = cover_polygon(points - (left * UNIT, top * UNIT), bottom - top, right - left)
    region[top:bottom, left:right] = 2 * cover >= FULL_COVER
    return region


def _paint(canvas: np.ndarray, points: np.ndarray, color: np.ndarray,
           shading: Optional[Callable[[np.ndarray, np.ndarray], np.ndarray]] = None) -> None:
    """Blend a polygon of `color` (`[3]`) into the canvas.

    `shading(rows, columns)` is added to the colour, for rows `[h, 1]` and columns `[1, w]` of the
    canvas.
    """
    top, bottom, left, right = _bounds(points, *canvas.shape[:2])
    cover = cover_polygon(points - (left * UNIT, top * UNIT), bottom - top, right - left)
    weight = cover[:, :, None]
    if shading is not None:
        rows, columns = np.arange(top, bottom)[:, None], np.arange(left, right)[None, :]
        color = np.clip(color + shading(rows, columns)[:, :, None], 0, 255)
    part = canvas[top:bottom, left:right]
    part += ((color - part) * weight + FULL_COVER // 2) // FULL_COVER


def _paint_shape(bits: BitStream, canvas: np.ndarray, points: np.ndarray, radius: int,
                 color: np.ndarray) -> None:
    """Paint a shape with a shading across it and some noise."""
    centre = (points.sum(axis=0) // len(points) // UNIT).tolist()
    slope = bits.array((2,), -30, 30)
    cell, side = 4, 2 * MAX_RADIUS + 8
    lattice = bits.array((side // cell + 2, side // cell + 2), -14, 14)
    noise = value_noise(lattice, cell, side, side) // cell ** 2

    def shading(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        y, x = rows - centre[1], columns - centre[0]
        return (slope[0] * x + slope[1] * y) // radius + noise[y + side // 2, x + side // 2]

    _paint(canvas, points, color, shading)


def _pixel_box(mask: np.ndarray) -> List[float]:
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return [float(columns[0]), float(rows[0]),
            float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)]
