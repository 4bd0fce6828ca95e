"""Statistics of a dataset: counts, sizes, and how well anchors fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset
from data.config import Config
from data.targets import ground_truth_slots
from utils.errors import counted

SMALL, MEDIUM = 32.0 ** 2, 96.0 ** 2
"""Areas in pixels of the stored image between COCO's small, medium and large objects."""

_RECALL_IOU = 0.5
_WORTH_IT = 0.02
"""Recall that other anchors have to gain before they are suggested."""
_ROUNDS = 30
_TINY = 4.0
_SAMPLE = 50000

Scales = Tuple[Tuple[float, ...], ...]


@dataclass
class SplitStatistics:
    """Numbers of one split; n usable objects that are not crowds."""

    name: str
    counts: List[int]
    """Rows of the table, see `_TITLES`."""
    classes: Dict[str, Tuple[int, int]]
    """Objects and images by class name."""
    sides: np.ndarray
    """float64 `[n, 2]`, widths and heights of boxes relative to the image."""
    most_objects: Tuple[int, int]
    """Largest number in an image, and that image's id."""


_TITLES = ("images", "  without objects", "objects", "  small (below 32 x 32 px)", "  medium",
           "  large (from 96 x 96 px)", "crowd regions", "most objects in an image")


def measure(name: str, dataset: CocoDataset) -> SplitStatistics:
    """Count `dataset`."""
    packed, report = dataset.annotations, dataset.report
    solid = ~packed.crowd
    labels, owner = packed.labels[solid].astype(np.int64), packed.owners[solid]
    sides = (packed.boxes[solid, 2:] - packed.boxes[solid, :2]).astype(np.float64)
    area = sides.prod(axis=1) * packed.image_sizes[owner].astype(np.float64).prod(axis=1)
    of_size = np.bincount(np.searchsorted([SMALL, MEDIUM], area, side="right"), minlength=3)
    classes = len(dataset.categories)
    pairs = np.unique(owner * (classes + 1) + labels) % (classes + 1)
    images = np.bincount(pairs, minlength=classes + 1)[1:].tolist()
    per_image = np.bincount(owner, minlength=len(dataset))
    fullest = int(per_image.argmax())
    most = int(per_image[fullest]), int(dataset.image_ids[fullest])
    return SplitStatistics(
        name=name, sides=sides, most_objects=most,
        counts=[len(dataset), report.empty_images, len(labels), *of_size.tolist(), report.crowds,
                most[0]],
        classes=dict(zip(dataset.class_names, zip(report.objects_per_category.values(), images))))


def table(splits: Sequence[SplitStatistics]) -> List[str]:
    """Lines of two tables: counts with a column for each split, and classes."""
    titles = ["class"] + [head for split in splits for head in (split.name, "images")]
    rows = [titles]
    for name in dict.fromkeys(name for split in splits for name in split.classes):
        rows.append([name] + [str(value) for split in splits
                              for value in split.classes.get(name, ("-", "-"))])
    columns = [["", *_TITLES]] + [[split.name, *map(str, split.counts)] for split in splits]
    return _aligned(list(zip(*columns))) + [""] + _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> List[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0])] + [
        cell.rjust(max(width, 7)) for cell, width in zip(row[1:], widths[1:])]).rstrip()
        for row in rows]


def anchor_shapes(scales: Sequence[Sequence[float]], config: Config) -> np.ndarray:
    """Width and height in pixels of every anchor of these sides: float64 `[k, 2]`."""
    roots = np.sqrt(np.asarray(config.pred_aspect_ratios, np.float64))
    sides = np.concatenate([np.asarray(level, np.float64) for level in scales])[:, None]
    width = (sides * roots).ravel()
    height = width if config.use_square_anchors else (sides / roots).ravel()
    return np.column_stack([width, height])


def shape_recall(boxes: np.ndarray, anchors: np.ndarray) -> float:
    """Share of boxes `[n, 2]` that some anchor `[k, 2]` overlaps by 0.5 IoU, centre on centre."""
    best = np.zeros(len(boxes))
    for anchor in anchors:
        shared = np.minimum(boxes, anchor).prod(axis=1)
        np.maximum(best, shared / (boxes.prod(axis=1) + anchor.prod() - shared), out=best)
    return float((best >= _RECALL_IOU).mean())


def fitted_scales(boxes: np.ndarray, scales: Sequence[Sequence[float]]) -> Scales:
    """As many anchor sides in each level, at the middles of clusters of the boxes' sides.

    k-means of the logarithm of the mean side, started at quantiles: the same boxes give the same.
    """
    sides = np.log(np.sqrt(boxes.prod(axis=1)))
    count = sum(len(level) for level in scales)
    middles = np.quantile(sides, (np.arange(count) + 0.5) / count)
    for _ in range(_ROUNDS):
        bounds = (middles[1:] + middles[:-1]) / 2
        member = np.searchsorted(bounds, sides)
        size = np.bincount(member, minlength=count)
        total = np.bincount(member, sides, minlength=count)
        middles = np.sort(np.where(size > 0, total / np.maximum(size, 1), middles))
    found = iter(np.exp(middles).round().clip(1).tolist())
    return tuple(tuple(next(found) for _ in level) for level in scales)


def format_scales(scales: Sequence[Sequence[float]]) -> str:
    """As --pred_scales takes them: `20+30,42+60,84+110`."""
    return ",".join("+".join(f"{side:g}" for side in level) for level in scales)


def suggestions(train: SplitStatistics, config: Config) -> List[str]:
    """Lines about anchors, tiny objects and ground-truth slots, from the training boxes."""
    count, image_id = train.most_objects
    lines = [f"ground-truth slots: {ground_truth_slots(count)} (image {image_id} has "
             f"{counted(count, 'object')})"]
    if not len(train.sides):
        return lines
    boxes = (train.sides * config.max_size).clip(1e-3)
    tiny = int((np.sqrt(boxes.prod(axis=1)) < _TINY).sum())
    if tiny:
        lines.append(f"{tiny} of {len(boxes)} objects are smaller than {_TINY:g} px at the "
                     f"{config.max_size} px input; a larger input or cut-out images would show "
                     "them")
    if len(boxes) > _SAMPLE:
        boxes = boxes[np.random.RandomState(0).choice(len(boxes), _SAMPLE, replace=False)]
    recall = shape_recall(boxes, anchor_shapes(config.pred_scales, config))
    lines.append(f"anchors {format_scales(config.pred_scales)} ({config.name}): {100 * recall:.1f} "
                 "% of the boxes have one of 0.5 IoU in shape")
    fitted = fitted_scales(boxes, config.pred_scales)
    better = shape_recall(boxes, anchor_shapes(fitted, config))
    if better > recall + _WORTH_IT:
        lines.append(f"anchors that fit better: --pred_scales={format_scales(fitted)} "
                     f"({100 * better:.1f} %)")
    return lines
