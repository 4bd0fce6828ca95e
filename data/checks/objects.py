"""Findings in the annotations of one split."""

from __future__ import annotations

from typing import Any, List, Sequence, Union

import numpy as np
from pycocotools import mask as mask_utils

from data.checks.statistics import owners
from data.coco import CocoDataset

_DISAGREE = 0.5
_EXAMPLES = 5
_SAME = 1e-4
"""Boxes whose corners differ by less, relative to the image, are the same."""


def object_findings(name: str, dataset: CocoDataset) -> List[str]:
    """Sentences about what was dropped or repaired, duplicates, and boxes unlike their masks."""
    defects = ["{}: {}".format(name, sentence) for sentence in dataset.report.sentences()[1:]]
    return defects + _duplicates(name, dataset) + _unlike_masks(name, dataset)


def duplicates(dataset: CocoDataset) -> np.ndarray:
    """Objects (rows) that repeat the box and class of an earlier one in the same image."""
    packed = dataset.annotations
    rows = np.flatnonzero(~packed.crowd)
    corners = np.rint(packed.boxes[rows] / _SAME).astype(np.int64)
    keys = np.column_stack([owners(dataset)[rows], packed.labels[rows], corners])
    order = np.lexsort(keys.T[::-1])  # stable: the earlier of two equal ones stays first
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    return np.sort(rows[order[1:][same]])


def rle_overlaps(dataset: CocoDataset) -> np.ndarray:
    """IoU of box and extent of the mask for each object, NaN for polygons: float64 `[m]`.

    Polygons are compared where the file is read.
    """
    packed = dataset.annotations
    rows = np.flatnonzero((packed.num_parts == 0) & ~packed.crowd)
    overlaps = np.full(len(packed.labels), np.nan)
    if not len(rows):
        return overlaps
    sizes = packed.image_sizes[owners(dataset)[rows]]
    rles = [packed.segmentation(row, width, height)
            for row, (width, height) in zip(rows.tolist(), sizes.tolist())]
    extents = np.asarray(mask_utils.toBbox(rles), np.float64).reshape(-1, 4)
    extents[:, 2:] += extents[:, :2]
    boxes = packed.boxes[rows] * np.concatenate([sizes, sizes], axis=1)
    # One pixel of slack, so that thin objects do not count as wrong.
    shared = (np.minimum(boxes[:, 2:], extents[:, 2:])
              - np.maximum(boxes[:, :2], extents[:, :2]) + 1).clip(0).prod(axis=1)
    areas = [(b[:, 2:] - b[:, :2] + 1).prod(axis=1) for b in (boxes, extents)]
    overlaps[rows] = shared / (areas[0] + areas[1] - shared)
    return overlaps


def some(values: Union[Sequence[Any], np.ndarray]) -> str:
    """The first few of them, for a sentence."""
    shown = ", ".join(str(value) for value in list(values)[:_EXAMPLES])
    return shown + (", ..." if len(values) > _EXAMPLES else "")


def _duplicates(name: str, dataset: CocoDataset) -> List[str]:
    rows = duplicates(dataset)
    if not len(rows):
        return []
    images = np.unique(dataset.image_ids[owners(dataset)[rows]])
    return ["{}: {} object{} the box and class of another in the same image: image id {}; each "
            "counts as a missed object in the score".format(
                name, len(rows), " repeats" if len(rows) == 1 else "s repeat", some(images))]


def _unlike_masks(name: str, dataset: CocoDataset) -> List[str]:
    overlaps = rle_overlaps(dataset)
    wrong = np.flatnonzero(overlaps < _DISAGREE)
    if not len(wrong):
        return []
    images = np.unique(dataset.image_ids[owners(dataset)[wrong]])
    return ["{}: {} of {} boxes overlap the extent of their mask by less than {} IoU: image id {}; "
            "masks are learned inside the box, so one of the two is wrong".format(
                name, len(wrong), int(np.isfinite(overlaps).sum()), _DISAGREE, some(images))]
