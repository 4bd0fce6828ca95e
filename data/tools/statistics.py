"""Statistics of a dataset: counts, sizes, and how well anchors fit."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset
from data.config import Config
from data.config_fields import as_text
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


def object_sides(dataset: CocoDataset) -> np.ndarray:
    """float64 `[n, 2]`, widths and heights relative to the image of the boxes of all objects."""
    packed = dataset.annotations
    return (packed.boxes[:, 2:] - packed.boxes[:, :2])[~packed.crowd].astype(np.float64)


def counts(dataset: CocoDataset) -> Dict[str, int]:
    """Numbers of images and objects by their titles in the table."""
    packed, report = dataset.annotations, dataset.report
    sizes = packed.image_sizes[packed.owners[~packed.crowd]].astype(np.float64)
    areas = object_sides(dataset).prod(axis=1) * sizes.prod(axis=1)
    small, medium, large = np.bincount(np.searchsorted([SMALL, MEDIUM], areas, side="right"),
                                       minlength=3).tolist()
    return {"images": len(dataset), "  without objects": report.empty_images,
            "objects": report.objects, "  small (below 32 x 32 px)": small, "  medium": medium,
            "  large (from 96 x 96 px)": large, "crowd regions": report.crowds,
            "most objects in an image": dataset.max_objects}


def class_counts(dataset: CocoDataset) -> Dict[str, Tuple[int, int]]:
    """Objects and images of each class by its name."""
    packed = dataset.annotations
    pairs = np.column_stack([packed.owners, packed.labels])[~packed.crowd]
    images = np.bincount(np.unique(pairs, axis=0)[:, 1], minlength=len(dataset.categories) + 1)
    objects = dataset.report.objects_per_category
    return dict(zip(objects, zip(objects.values(), images[1:].tolist())))


def table(splits: Mapping[str, CocoDataset]) -> List[str]:
    """Lines of two tables: counts with a column for each split, and classes."""
    numbers = [counts(dataset) for dataset in splits.values()]
    rows = [["", *splits]] + [[title, *(str(split[title]) for split in numbers)]
                              for title in numbers[0]]
    classes = [class_counts(dataset) for dataset in splits.values()]
    class_rows = [["class"] + [head for split in splits for head in (split, "images")]]
    for name in dict.fromkeys(name for split in classes for name in split):
        class_rows.append([name] + [str(value) for split in classes
                                    for value in split.get(name, ("-", "-"))])
    return _aligned(rows) + [""] + _aligned(class_rows)


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


def suggestions(train: CocoDataset, config: Config) -> List[str]:
    """Lines about anchors, tiny objects and ground-truth slots, from the training boxes."""
    from data.targets import ground_truth_slots  # imports PyTorch, which --help need not wait for

    packed = train.annotations
    per_image = np.bincount(packed.owners[~packed.crowd], minlength=len(train))
    lines = [f"ground-truth slots: {ground_truth_slots(train.max_objects)} (image "
             f"{train.image_ids[per_image.argmax()]} has {counted(train.max_objects, 'object')})"]
    boxes = (object_sides(train) * config.max_size).clip(1e-3)
    if not len(boxes):
        return lines
    tiny = int((np.sqrt(boxes.prod(axis=1)) < _TINY).sum())
    if tiny:
        lines.append(f"{tiny} of {len(boxes)} objects are smaller than {_TINY:g} px at the "
                     f"{config.max_size} px input; a larger input or cut-out images would show "
                     "them")
    if len(boxes) > _SAMPLE:
        boxes = boxes[np.random.RandomState(0).choice(len(boxes), _SAMPLE, replace=False)]
    recall = shape_recall(boxes, anchor_shapes(config.pred_scales, config))
    lines.append(f"anchors {as_text(config.pred_scales)} ({config.name}): {100 * recall:.1f} "
                 "% of the boxes have one of 0.5 IoU in shape")
    fitted = fitted_scales(boxes, config.pred_scales)
    better = shape_recall(boxes, anchor_shapes(fitted, config))
    if better > recall + _WORTH_IT:
        lines.append(f"anchors that fit better: --pred_scales={as_text(fitted)} "
                     f"({100 * better:.1f} %)")
    return lines
