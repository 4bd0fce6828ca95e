"""Drawn scenes: shapes on a textured ground, and their ground truth.

Random bits come from PCG64's raw stream, which NumPy guarantees, and all drawing is integer
arithmetic (`data.shape_raster`): the same seed gives the same pixels everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

UNIT = 8
"""Coordinate units in a pixel."""
SUBROWS = 4
"""Scan lines in a pixel row."""
FULL_COVER = SUBROWS * UNIT
"""Coverage of a pixel that lies wholly inside."""
MIN_PIECE = 6
"""Pixels below which a separate piece of a mask gets no outline."""

_TRIG_BITS = 14
# cos of whole degrees, rounded to 2**-14. The nearest any of them comes to a rounding boundary is
# far more than the last-place differences between C libraries (a test holds that).
COSINE = np.array([int(round(math.cos(math.radians(d)) * 2 ** _TRIG_BITS)) for d in range(360)],
                  dtype=np.int64)


def polar(radius: int, degrees: np.ndarray) -> np.ndarray:
    """Points at `radius` (1/8 px) and whole `degrees`: int64 `[n, 2]` in 1/8 px."""
    radius_scaled = np.int64(radius)
    x = radius_scaled * COSINE[degrees % 360]
    y = radius_scaled * COSINE[(degrees - 90) % 360]
    half = 1 << (_TRIG_BITS - 1)
    return np.stack([x + half, y + half], axis=1) >> _TRIG_BITS


def cover_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rasterise a simple polygon with anti-aliasing.

    Args:
        points: int64 `[n, 2]` x, y in 1/8 px; parts outside the image are cut off.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        int64 `[height, width]`, 0 (outside) to `FULL_COVER` (inside). Each of the `SUBROWS` scan
        lines of a pixel row contributes its exact horizontal coverage, rounded to 1/8 px.
    """
    start, end = points, np.roll(points, -1, axis=0)
    keep = start[:, 1] != end[:, 1]
    start, end = start[keep], end[keep]
    sign = np.where(start[:, 1] < end[:, 1], 1, -1)
    upper = np.where(sign[:, None] > 0, start, end)
    lower = np.where(sign[:, None] > 0, end, start)
    step = UNIT // SUBROWS
    lines = np.arange(height * SUBROWS, dtype=np.int64) * step + step // 2
    low, high = upper[:, 1].min() if len(upper) else 0, lower[:, 1].max() if len(lower) else 0
    lines = lines[(lines >= low) & (lines < high)]
    crossed = (lines[:, None] >= upper[:, 1]) & (lines[:, None] < lower[:, 1])
    row, edge = np.nonzero(crossed)
    y = lines[row]
    first, last = upper[edge], lower[edge]
    rise = last[:, 1] - first[:, 1]
    # Rounded division: floor(a / b + 1/2) as floor((2 a + b) / (2 b)).
    run = (y - first[:, 1]) * (last[:, 0] - first[:, 0])
    x = np.clip(first[:, 0] + (2 * run + rise) // (2 * rise), 0, width * UNIT)
    pixel, fraction = x // UNIT, x % UNIT
    # A crossing at x adds (or removes) all that lies to its right: a step in the running sum.
    index = (y // UNIT) * (width + 2) + pixel
    size = height * (width + 2)
    steps = np.bincount(index, weights=sign[edge] * (UNIT - fraction), minlength=size)
    steps += np.bincount(index + 1, weights=sign[edge] * fraction, minlength=size)
    cover = np.cumsum(steps.astype(np.int64).reshape(height, width + 2), axis=1)
    return np.abs(cover[:, :width])


def value_noise(lattice: np.ndarray, cell: int, height: int, width: int) -> np.ndarray:
    """Blow up a lattice of random values bilinearly.

    Args:
        lattice: int64 `[>= height // cell + 2, >= width // cell + 2, ...]`.
        cell: pixels between lattice points.
        height: of the result.
        width: of the result.

    Returns:
        int64 `[height, width, ...]`, the values times `cell ** 2`.
    """
    y, x = np.arange(height), np.arange(width)
    tail = (1,) * (lattice.ndim - 1)
    weight = (y % cell).reshape((-1,) + tail)
    rows = lattice[y // cell] * (cell - weight) + lattice[y // cell + 1] * weight
    weight = (x % cell).reshape((-1,) + tail[1:])
    return rows[:, x // cell] * (cell - weight) + rows[:, x // cell + 1] * weight


def run_lengths(mask: np.ndarray) -> Dict[str, List[int]]:
    """Uncompressed COCO run lengths, `{"counts": .., "size": [h, w]}`, of a bool `[h, w]` mask."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    changes = np.nonzero(np.diff(flat))[0]
    edges = np.concatenate([[0], changes, [mask.size]])
    counts = np.diff(edges).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return {"counts": counts, "size": list(mask.shape)}


def outlines(mask: np.ndarray) -> Tuple[List[np.ndarray], bool]:
    """Trace the outer boundaries of a bool `[h, w]` mask.

    Returns:
        The outlines as int64 `[n, 2]` polygons in 1/8 px through the middles of the pixel edges
        between inside and outside, simplified to within half a pixel, and whether the mask has
        holes (whose boundaries are left out). Pixels that touch at a corner only are separate.
        Pieces smaller than `MIN_PIECE`, or no thicker than that half pixel, are left out.
    """
    outer, holes = [], False
    for corners in _boundary_loops(mask):
        middles = (corners + np.roll(corners, -1, axis=0)) * (UNIT // 2)
        doubled_area = _doubled_area(corners)
        if doubled_area < 0:
            holes = True
        elif doubled_area >= 2 * MIN_PIECE:
            polygon = _simplify(middles, UNIT // 2)
            if len(polygon) > 2:
                outer.append(polygon)
    return outer, holes


def _boundary_loops(mask: np.ndarray) -> List[np.ndarray]:
    """Closed walks over pixel corners `[n, 2]` x, y, one pixel edge a step, inside to the right."""
    padded = np.pad(mask, 1, mode="constant").astype(np.int8)
    down = padded[1:, 1:-1] - padded[:-1, 1:-1]
    right = padded[1:-1, 1:] - padded[1:-1, :-1]
    following: Dict[Tuple[int, int], List[Tuple[int, int]]] = {}
    # Image coordinates (y down): tops are walked in +x, right sides in +y, so areas are positive.
    for edges, sign, begin, finish in ((down, 1, (0, 0), (1, 0)), (down, -1, (1, 0), (0, 0)),
                                       (right, 1, (0, 1), (0, 0)), (right, -1, (0, 0), (0, 1))):
        rows, columns = np.nonzero(edges == sign)
        for y, x in zip(rows.tolist(), columns.tolist()):
            following.setdefault((x + begin[0], y + begin[1]), []).append(
                (x + finish[0], y + finish[1]))
    loops = []
    while following:
        # A start where two pixels meet could end the walk halfway.
        here = next((c for c, ends in following.items() if len(ends) == 1), next(iter(following)))
        loop, came = [here], (0, 0)
        while True:
            choices = following[here]
            there = choices[0]
            if len(choices) > 1:
                # Two pixels meet at this corner only: turning right stays with the same pixel.
                wanted = (here[0] - came[1], here[1] + came[0])
                there = wanted if wanted in choices else there
            choices.remove(there)
            if not choices:
                del following[here]
            came = (there[0] - here[0], there[1] - here[1])
            here = there
            if here == loop[0]:
                break
            loop.append(here)
        loops.append(np.array(loop, dtype=np.int64))
    return loops


def _doubled_area(points: np.ndarray) -> int:
    following = np.roll(points, -1, axis=0)
    return int((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum())


def _simplify(points: np.ndarray, tolerance: int) -> np.ndarray:
    """Douglas and Peucker's line simplification of a closed polygon; exact in integers."""
    count = len(points)
    far = int(((points - points[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([points, points[:1]])
    keep = np.zeros(count + 1, dtype=bool)
    keep[[0, far, count]] = True
    pending = [(0, far), (far, count)]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        chord = closed[last] - closed[first]
        offset = closed[first + 1:last] - closed[first]
        cross = np.abs(chord[0] * offset[:, 1] - chord[1] * offset[:, 0])
        length = int((chord ** 2).sum())
        # A closed curve's chord may have no length; then the distance is to the point itself.
        gap = cross ** 2 if length else (offset ** 2).sum(axis=1)
        worst = int(gap.argmax())
        if int(gap[worst]) > tolerance ** 2 * max(length, 1):
            keep[first + 1 + worst] = True
            pending += [(first, first + 1 + worst), (first + 1 + worst, last)]
    return points[keep[:count]]


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
