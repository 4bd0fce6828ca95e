"""What an annotation file holds and what of it is dropped or repaired, and both in sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_utils

from data.annotations.reader import Columns
from utils.errors import UserError, counted, some

DROPPED = {
    "no_outline": "no segmentation",
    "malformed_outline": "a malformed segmentation (expected polygons of at least 3 points as x, y "
                         "pairs, or an RLE with size and counts)",
    "rle_size": "an RLE whose size is not the image's",
    "malformed_box": "a bbox that is not four finite numbers",
    "degenerate_box": "a bbox of zero or negative size",
    "outside_box": "a bbox outside the image",
}
"""Defects for which an object is left out, in the order in which they are looked for."""

REPAIRED = {
    "removed_part": "a malformed polygon beside good ones (the good ones are kept)",
    "derived_box": "no bbox (it is taken from the segmentation)",
    "clipped_box": "a bbox more than 1 px beyond the image (it is clipped)",
}
"""Defects that the object survives."""

_EXAMPLES = 5
_CHUNK = 4096
_CLIP_TOLERANCE = 1.0  # pixels; COCO's own boxes overshoot by rounding
_AGREE = 0.8
_DISAGREE = 0.5


@dataclass
class Defect:
    """How often one defect occurs, and where first (annotation ids)."""

    count: int
    examples: list[int]


@dataclass
class AnnotationReport:
    """Counts of one annotation file."""

    file: str
    images: int
    annotations: int
    """Records in the file."""
    objects: int
    """Usable objects, crowds not counted."""
    crowds: int
    """Usable crowd regions."""
    empty_images: int
    """Images without a usable object or crowd; they take part as background."""
    objects_per_category: dict[str, int]
    """Usable objects by category name, in the order of the classes."""
    defects: dict[str, Defect]
    """By key of `DROPPED` and `REPAIRED`, only those that occur."""
    notes: list[str]
    """Sentences about what is legal but usually a mistake."""

    @property
    def dropped(self) -> int:
        """Annotations that are left out."""
        return sum(defect.count for key, defect in self.defects.items() if key in DROPPED)

    def sentences(self) -> list[str]:
        """One summary, then one sentence for each defect that occurred."""
        lost = ("nothing was dropped" if not self.dropped else
                f"{self.dropped} of {self.annotations} annotations were dropped")
        lines = [f"{self.file}: {self.images} images ({self.empty_images} without objects), "
                 f"{self.objects} objects of {len(self.objects_per_category)} categories, "
                 f"{self.crowds} crowd regions; {lost}"]
        for key, text in list(DROPPED.items()) + list(REPAIRED.items()):
            if key in self.defects:
                defect = self.defects[key]
                lines.append(f"{'dropped' if key in DROPPED else 'repaired'} "
                             f"{counted(defect.count, 'annotation')} with {text}: id "
                             f"{', '.join(map(str, defect.examples))}"
                             f"{', ...' if defect.count > len(defect.examples) else ''}")
        return lines + self.notes


class Inspection:
    """Looks at the outlines and boxes of all n annotations of a file at once, whose images have the
    widths and heights `sizes`, int64 `[n, 2]`.

    Attributes:
        usable: bool `[n]`, what is not dropped.
        defects: by key of `DROPPED` and `REPAIRED`, what was found.
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 relative to the image, clipped to [0, 1].
        notes: sentences about usable annotations that look like mistakes.

    Raises:
        UserError: no annotation has an outline at all, so no mask can be learned, or most boxes fit
            their masks only when read as x1, y1, x2, y2.
    """

    def __init__(self, file: str, columns: Columns, sizes: np.ndarray) -> None:
        self.file, self.columns = file, columns
        self.usable = np.ones(len(columns.ids), bool)
        self.defects: dict[str, Defect] = {}
        self._check_outlines(sizes)
        extents = outline_extents(columns, self.usable)
        self._drop("malformed_outline", np.isinf(extents).any(axis=1))
        self.boxes = self._checked_boxes(extents, sizes)
        self.notes = self._compare(extents)
        if (columns.ids[:, 0] == 0).any():
            self.notes.append("an annotation has id 0: pycocotools counts a detection of it as a "
                              "miss; number annotations from 1")

    def _drop(self, key: str, wrong: np.ndarray) -> None:
        """Leave out the still usable annotations marked by bool `wrong [n]`."""
        self._count(key, wrong)
        self.usable &= ~wrong

    def _count(self, key: str, found: np.ndarray) -> None:
        """Remember the still usable annotations marked by bool `found [n]`."""
        ids = self.columns.ids[found & self.usable, 0].tolist()
        if ids:
            known = self.defects.get(key, Defect(0, []))
            self.defects[key] = Defect(known.count + len(ids),
                                       sorted(known.examples + ids)[:_EXAMPLES])

    def _check_outlines(self, sizes: np.ndarray) -> None:
        columns = self.columns
        bad, rles = columns.bad_parts > 0, np.flatnonzero(columns.rle_lengths)
        missing = (columns.polygon_lengths == 0) & (columns.rle_lengths == 0)
        if len(missing) and (missing & ~bad).all():
            raise UserError(f"{self.file}: none of the {len(missing)} annotations (first id "
                            f"{columns.ids[0, 0]}) has a segmentation; expected instance masks, "
                            "this looks like a file of boxes or keypoints only")
        malformed, other_size, empty = missing & bad, np.zeros_like(bad), missing & ~bad
        totals, areas = run_length_sums(columns.rle_bytes, columns.rle_lengths[rles])
        # Runs have to fill the mask; pycocotools trusts them when it decodes.
        malformed[rles] = totals != columns.rle_sizes[rles].prod(axis=1)
        other_size[rles] = (columns.rle_sizes != sizes[:, ::-1])[rles].any(axis=1)
        empty[rles] = areas == 0
        self._drop("malformed_outline", malformed)
        self._drop("rle_size", other_size)
        self._drop("no_outline", empty)
        self._count("removed_part", bad)

    def _checked_boxes(self, extents: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        corners = _corners(self.columns.boxes)
        missing: np.ndarray = (self.columns.boxes == 0).all(axis=1)  # as some tools write
        corners[missing] = extents[missing]
        self._count("derived_box", missing)
        finite: np.ndarray = np.isfinite(corners).all(axis=1)
        self._drop("malformed_box", ~finite)
        corners[~finite] = 0

        limits = np.concatenate([sizes, sizes], axis=1)
        beyond = np.maximum(-corners, corners - limits).max(axis=1)
        boxes = (np.clip(corners, 0, limits) / limits).astype(np.float32)
        self._drop("degenerate_box", _is_empty(corners))
        # Also those of which so little is inside that float32 sees nothing of it.
        self._drop("outside_box", _is_empty(boxes))
        self._count("clipped_box", beyond > _CLIP_TOLERANCE)
        return boxes

    def _compare(self, extents: np.ndarray) -> list[str]:
        """Compare the boxes that the file gives with the outlines of the objects."""
        ids, given = self.columns.ids, self.columns.boxes
        solid = self.usable & (ids[:, 3] == 0)
        if solid.any() and (extents[solid] <= 1).all():
            raise UserError(f"{self.file}: all {solid.sum()} outlines lie between 0 and 1; COCO's "
                            "are in pixels: multiply them by width and height of their images")
        rows = np.flatnonzero(solid & given.any(axis=1))
        missed = _overlap(_corners(given[rows]), extents[rows]) < _DISAGREE
        if not missed.any():
            return []
        named = some(ids[rows[missed], 0])
        as_corners = missed & (_overlap(given[rows], extents[rows]) > _AGREE)
        if as_corners.sum() * 2 > len(rows):
            raise UserError(f"{self.file}: {as_corners.sum()} of {len(rows)} boxes fit their masks "
                            f"only when read as x1, y1, x2, y2 (annotation id {named}); COCO's "
                            "bbox is x, y, width, height")
        return [f"{missed.sum()} of {len(rows)} boxes overlap their masks by less than {_DISAGREE} "
                f"IoU: annotation id {named}; masks are learned inside the box, so one of the two "
                "is wrong"]


def outline_extents(columns: Columns, usable: np.ndarray) -> np.ndarray:
    """float64 `[n, 4]`, x1 y1 x2 y2 in pixels around the outlines that bool `usable [n]` marks.

    NaN where there is none, infinite where float32 does not hold an outline's coordinates.
    """
    extents = np.full((len(columns.ids), 4), np.nan)
    rows = np.flatnonzero(columns.polygon_lengths)
    if len(rows):
        starts = offsets(columns.polygon_lengths[rows])[:-1] // 2
        for axis in (0, 1):
            values = columns.coordinates[axis::2]
            extents[rows, axis] = np.fmin.reduceat(values, starts)
            extents[rows, axis + 2] = np.fmax.reduceat(values, starts)
    rows = np.flatnonzero(usable & (columns.rle_lengths > 0))
    if len(rows):
        stops = np.cumsum(columns.rle_lengths)
        boxes = mask_utils.toBbox([
            {"size": columns.rle_sizes[row].tolist(),
             "counts": columns.rle_bytes[stops[row] - columns.rle_lengths[row]:stops[row]].tobytes()
             } for row in rows])
        extents[rows] = _corners(np.reshape(boxes, (-1, 4)))
    return extents


def run_length_sums(data: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the runs of well-formed compressed RLEs.

    Args:
        data: uint8, compressed counts of all masks one after the other.
        lengths: int64 `[r]`, bytes of each mask, above 0.

    Returns:
        int64 `[r]` pixels in the mask's image and int64 `[r]` pixels of the object; -1 in the first
        where a run is negative.
    """
    bounds = offsets(lengths)[::_CHUNK].tolist() + [len(data)]
    sums = [_sums(data[first:last], lengths[n * _CHUNK:(n + 1) * _CHUNK])
            for n, (first, last) in enumerate(zip(bounds, bounds[1:])) if last > first]
    sums.append((lengths[:0], lengths[:0]))
    return np.concatenate([pair[0] for pair in sums]), np.concatenate([pair[1] for pair in sums])


def _sums(data: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # A character holds 5 bits, low ones first; bit 0x20 says that the number goes on.
    codes = data.astype(np.int64) - 48
    stops = np.flatnonzero(codes < 0x20)
    starts = np.append(0, stops[:-1] + 1)
    digits = stops - starts + 1
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    values -= np.where(codes[stops] & 0x10, 1 << (5 * digits), 0)

    first = np.searchsorted(starts, offsets(lengths)[:-1])  # number of each mask
    owner = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(values))))
    index = np.arange(len(values)) - first[owner]
    # From the fourth run on, a number is the difference to the run two before it.
    for chain in (index % 2 == 1, (index % 2 == 0) & (index > 0)):
        sums, begins = np.cumsum(values[chain]), index[chain] <= 2
        before = (sums - values[chain])[begins]
        values[chain] = sums - before[np.cumsum(begins) - 1]
    totals, areas = (np.add.reduceat(part, first) for part in (values, values * (index % 2)))
    return np.where(np.minimum.reduceat(values, first) < 0, -1, totals), areas


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Bounds of consecutive pieces: int64 `[n + 1]`, starting at 0."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Turn x y width height `[n, 4]` into x1 y1 x2 y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _is_empty(corners: np.ndarray) -> np.ndarray:
    """Which boxes `[n, 4]` x1 y1 x2 y2 have no area: bool `[n]`."""
    return np.any(corners[:, 2:] <= corners[:, :2], axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of corresponding boxes `[n, 4]` x1 y1 x2 y2; one pixel of slack for thin outlines."""
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0) + 1
    other_size = others[:, 2:] - others[:, :2] + 1
    shared = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2]) + 1
    intersection = np.maximum(shared, 0).prod(axis=1)
    return intersection / (size.prod(axis=1) + other_size.prod(axis=1) - intersection)
