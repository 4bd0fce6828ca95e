"""Integer drawing for the embedded dataset: polygons, value noise, outlines, run lengths.

Everything here is integer arithmetic on NumPy arrays, so that the same numbers come out whatever
the versions of NumPy, OpenCV and the C library are. Coordinates are in units of 1/8 pixel; the
corner between the first pixels is 0, so the centre of pixel 0 lies at 4.
"""

from __future__ import annotations

import math
from typing import Dict, List, Tuple

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
