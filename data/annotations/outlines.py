"""Check the outlines and boxes of all annotations of a file at once."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
from pycocotools import mask as mask_utils

from data.annotations import reader as raw
from data.annotations.defects import DefectLog
from data.masks import Rle
from utils.errors import UserError

_CHUNK = 4096
_LONGEST_NUMBER = 7  # characters of 5 bits; 2^32 needs 7
_CLIP_TOLERANCE = 1.0  # pixels; COCO's own boxes overshoot by rounding
_AGREE = 0.8
_DISAGREE = 0.5


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Bounds of consecutive pieces: int64 `[n + 1]`, starting at 0."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def run_length_sums(data: np.ndarray, lengths: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Add up the runs of compressed RLEs.

    Args:
        data: uint8, compressed counts of all masks one after the other.
        lengths: int64 `[r]`, bytes of each mask.

    Returns:
        int64 `[r]` pixels in the mask's image and int64 `[r]` pixels of the object; -1 in the first
        where the counts are malformed.
    """
    bounds = offsets(lengths)
    sums = [_sums(data[bounds[first]:bounds[min(first + _CHUNK, len(lengths))]],
                  lengths[first:first + _CHUNK])
            for first in range(0, max(len(lengths), 1), _CHUNK)]
    return np.concatenate([pair[0] for pair in sums]), np.concatenate([pair[1] for pair in sums])


def _sums(data: np.ndarray, lengths: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    malformed = lengths == 0
    totals = np.zeros(len(lengths), np.int64)
    areas = np.zeros(len(lengths), np.int64)
    if data.size == 0:
        return np.where(malformed, -1, totals), areas
    owner = np.repeat(np.arange(len(lengths)), lengths)
    codes = data.astype(np.int64) - 48
    malformed[owner[(codes < 0) | (codes > 63)]] = True

    # A character holds 5 bits, low ones first; bit 0x20 says that the number goes on.
    ends = (codes & 0x20) == 0
    last_byte = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
    malformed[owner[last_byte]] |= ~ends[last_byte]
    ends[last_byte] = True
    stops = np.flatnonzero(ends)
    starts = np.concatenate([[0], stops[:-1] + 1])
    digits = stops - starts + 1
    number_owner = owner[starts]
    malformed[number_owner[digits > _LONGEST_NUMBER]] = True
    place = np.minimum(np.arange(len(codes)) - np.repeat(starts, digits), _LONGEST_NUMBER)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[stops] & 0x10) != 0
    values -= np.where(negative, 1 << (5 * np.minimum(digits, _LONGEST_NUMBER)), 0)

    # From the fourth run on, a number is the difference to the run two before it.
    change = np.concatenate([[0], np.flatnonzero(number_owner[1:] != number_owner[:-1]) + 1])
    counts = np.diff(np.append(change, len(values)))
    index = np.arange(len(values)) - np.repeat(change, counts)
    odd = (index & 1) == 1
    for chain in (odd, ~odd & (index > 0)):
        values[chain] = _segmented_cumsum(values[chain], number_owner[chain])
    malformed[number_owner[values < 0]] = True
    present = number_owner[change]
    totals[present] = np.add.reduceat(values, change)
    areas[present] = np.add.reduceat(np.where(odd, values, 0), change)
    return np.where(malformed, -1, totals), areas


def _segmented_cumsum(values: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Cumulative sum that starts anew wherever `segment` (sorted) changes."""
    if len(values) == 0:
        return values
    sums = np.cumsum(values)
    first = np.concatenate([[True], segment[1:] != segment[:-1]])
    offset = (sums - values)[first]
    return sums - offset[np.cumsum(first) - 1]


class Outlines:
    """The polygons and RLEs of all annotations, n in file order.

    Attributes:
        is_rle: bool `[n]`.
        num_parts: int64 `[n]`, polygons of each annotation; 1 for an RLE.
        first: int64 `[n]`, first polygon of each annotation, or its RLE.
        part_offsets: int64, bounds of each polygon in `coordinates`.
        coordinates: float32, x, y in pixels, all finite.
        rle_offsets: int64, bounds of each RLE in `columns.rle_bytes`.
    """

    def __init__(self, columns: raw.Columns) -> None:
        self.columns = columns
        self.is_rle = columns.outline == raw.OUTLINE_RLE
        self.num_parts = columns.num_parts.astype(np.int64)
        self.bad_parts = columns.bad_parts.astype(np.int64)
        self.coordinates = columns.coordinates
        self.part_offsets = offsets(columns.part_lengths)
        self.rle_offsets = offsets(columns.rle_lengths)
        if not np.isfinite(self.coordinates).all():
            self._remove_parts_not_finite()
        polygons = np.where(self.is_rle, 0, self.num_parts)
        self.first = np.where(self.is_rle, np.cumsum(self.is_rle) - 1,
                              np.cumsum(polygons) - polygons)

    def _remove_parts_not_finite(self) -> None:
        lengths = np.diff(self.part_offsets)
        finite = np.logical_and.reduceat(np.isfinite(self.coordinates), self.part_offsets[:-1])
        owner = np.repeat(np.arange(len(self.num_parts)), np.where(self.is_rle, 0, self.num_parts))
        lost = np.bincount(owner[~finite], minlength=len(self.num_parts))
        self.num_parts = self.num_parts - lost
        self.bad_parts = self.bad_parts + lost
        self.coordinates = self.coordinates[np.repeat(finite, lengths)]
        self.part_offsets = offsets(lengths[finite])

    def check(self, log: DefectLog, sizes: np.ndarray) -> None:
        """Drop what has no usable outline.

        Args:
            log: where defects go.
            sizes: int64 `[n, 2]`, width and height of each annotation's image.

        Raises:
            UserError: no annotation has an outline at all, so no mask can be learned.
        """
        outline = self.columns.outline
        if len(outline) and (outline == raw.OUTLINE_NONE).all():
            raise UserError(f"{log.file}: none of the {len(outline)} annotations (first id "
                            f"{log.annotation_ids[0]}) has a segmentation; expected instance "
                            "masks, this looks like a file of boxes or keypoints only")
        log.drop("no_outline", outline == raw.OUTLINE_NONE)
        log.drop("malformed_outline", self.num_parts == 0)
        rows = np.flatnonzero(self.is_rle)
        totals, areas = run_length_sums(self.columns.rle_bytes, self.columns.rle_lengths)
        rle_sizes = self.columns.rle_sizes
        # Runs have to fill the mask; pycocotools trusts them when it decodes.
        malformed = totals != rle_sizes[:, 0] * rle_sizes[:, 1]
        other_size = (rle_sizes != sizes[rows][:, ::-1]).any(axis=1)
        for key, wrong in (("malformed_outline", malformed), ("rle_size", other_size),
                           ("no_outline", areas == 0)):
            marked = np.zeros(len(self.is_rle), bool)
            marked[rows[wrong]] = True
            log.drop(key, marked)
        log.repair("removed_part", (self.bad_parts > 0) & (self.num_parts > 0))

    def extents(self, usable: np.ndarray) -> np.ndarray:
        """float64 `[n, 4]`, x1 y1 x2 y2 in pixels around each outline; NaN where there is none.

        Of the RLEs, `usable` bool `[n]` marks those that have passed `check`.
        """
        extents = np.full((len(self.is_rle), 4), np.nan)
        rows = np.flatnonzero(~self.is_rle & (self.num_parts > 0))
        if len(rows):
            starts = self.part_offsets[self.first[rows]] // 2
            for axis in (0, 1):
                values = self.coordinates[axis::2]
                extents[rows, axis] = np.minimum.reduceat(values, starts)
                extents[rows, axis + 2] = np.maximum.reduceat(values, starts)
        rows = np.flatnonzero(self.is_rle & usable)
        if len(rows):
            boxes = np.asarray(mask_utils.toBbox([self._rle(n) for n in self.first[rows].tolist()]))
            extents[rows] = _corners(boxes.reshape(-1, 4))
        return extents

    def _rle(self, index: int) -> Rle:
        first, last = self.rle_offsets[index:index + 2].tolist()
        return {"size": self.columns.rle_sizes[index].tolist(),
                "counts": self.columns.rle_bytes[first:last].tobytes()}


def check_boxes(columns: raw.Columns, extents: np.ndarray, sizes: np.ndarray,
                log: DefectLog) -> np.ndarray:
    """Drop annotations whose box is not one.

    Args:
        columns: the file.
        extents: what `Outlines.extents` returned.
        sizes: int64 `[n, 2]`, width and height of each annotation's image.
        log: where defects go.

    Returns:
        float32 `[n, 4]`, x1 y1 x2 y2 relative to the image, clipped to [0, 1].
    """
    corners = _corners(columns.boxes)
    # Tools that know no box write zeros.
    missing = (columns.box_state == raw.BOX_MISSING) | (columns.boxes == 0).all(axis=1)
    corners[missing] = extents[missing]
    log.repair("derived_box", missing)
    finite: np.ndarray = np.isfinite(corners).all(axis=1)
    log.drop("malformed_box", ~finite)
    corners[~finite] = 0

    limits = np.concatenate([sizes, sizes], axis=1)
    degenerate = np.any(corners[:, 2:] <= corners[:, :2], axis=1)
    beyond = np.maximum(-corners, corners - limits).max(axis=1)
    relative = (np.clip(corners, 0, limits) / limits).astype(np.float32)
    log.drop("degenerate_box", degenerate)
    # Also those of which so little is inside that float32 sees nothing of it.
    log.drop("outside_box", (relative[:, 2:] <= relative[:, :2]).any(axis=1))
    log.repair("clipped_box", beyond > _CLIP_TOLERANCE)
    return relative


def refuse_corner_boxes(columns: raw.Columns, extents: np.ndarray, log: DefectLog) -> None:
    """Raise a `UserError` where most boxes fit their masks only when read as x1, y1, x2, y2."""
    rows = _comparable(columns, extents, log)
    boxes = columns.boxes[rows]
    wrong = (_overlap(_corners(boxes), extents[rows]) < _DISAGREE) & (
        _overlap(boxes, extents[rows]) > _AGREE)
    if wrong.sum() * 2 > len(rows):
        raise UserError(f"{log.file}: {wrong.sum()} of {len(rows)} boxes fit their masks only "
                        "when read as x1, y1, x2, y2 (annotation id "
                        f"{_some_ids(log, rows[wrong])}); COCO's bbox is x, y, width, height")


def geometry_notes(columns: raw.Columns, extents: np.ndarray, log: DefectLog) -> List[str]:
    """Sentences about usable annotations whose box and mask disagree, or whose id is 0."""
    notes = []
    rows = _comparable(columns, extents, log)
    wrong = rows[_overlap(_corners(columns.boxes[rows]), extents[rows]) < _DISAGREE]
    if len(wrong):
        notes.append(f"{len(wrong)} of {len(rows)} boxes overlap their masks by less than "
                     f"{_DISAGREE} IoU: annotation id {_some_ids(log, wrong)}; masks are learned "
                     "inside the box, so one of the two is wrong")
    if (log.annotation_ids == 0).any():
        notes.append("an annotation has id 0: pycocotools counts a detection of it as a miss; "
                     "number annotations from 1")
    return notes


def _comparable(columns: raw.Columns, extents: np.ndarray, log: DefectLog) -> np.ndarray:
    """Rows of usable annotations, crowds left out, that have both a box and an outline."""
    return np.flatnonzero(log.usable & (columns.ids[:, 3] == 0)
                          & np.isfinite(extents).all(axis=1)
                          & np.isfinite(columns.boxes).all(axis=1))


def _some_ids(log: DefectLog, rows: np.ndarray) -> str:
    ids = ", ".join(str(number) for number in log.annotation_ids[rows[:5]])
    return ids + (", ..." if len(rows) > 5 else "")


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Turn x y width height `[n, 4]` into x1 y1 x2 y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of corresponding boxes `[n, 4]` x1 y1 x2 y2; one pixel of slack for thin outlines."""
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 0) + 1
    other_size = others[:, 2:] - others[:, :2] + 1
    shared = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2]) + 1
    intersection = np.maximum(shared, 0).prod(axis=1)
    return intersection / (size.prod(axis=1) + other_size.prod(axis=1) - intersection)
