"""How well a recipe's anchors fit the sizes of the boxes, and which would fit better."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from data.checks.statistics import SplitStatistics
from data.config import Config
from data.targets import ground_truth_slots

RECALL_IOU = 0.5
_WORTH_IT = 0.02
"""Recall that other anchors have to gain before they are suggested."""
_ROUNDS = 30
_TINY = 4.0
_SAMPLE = 50000

Scales = Tuple[Tuple[float, ...], ...]


def anchor_shapes(scales: Sequence[Sequence[float]], ratios: Sequence[float],
                  square: bool) -> np.ndarray:
    """Width and height in pixels of every anchor: float64 `[k, 2]`."""
    roots = np.sqrt(np.asarray(ratios, np.float64))
    sides = np.concatenate([np.asarray(level, np.float64) for level in scales])[:, None]
    width = (sides * roots).ravel()
    return np.column_stack([width, width if square else (sides / roots).ravel()])


def shape_recall(boxes: np.ndarray, anchors: np.ndarray) -> float:
    """Share of boxes `[n, 2]` that some anchor `[k, 2]` overlaps by 0.5 IoU, centre on centre."""
    return float((best_overlap(boxes, anchors) >= RECALL_IOU).mean())


def best_overlap(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """IoU of each box with its best anchor, centre on centre: `[n]`."""
    best = np.zeros(len(boxes))
    for anchor in anchors:
        shared = np.minimum(boxes, anchor).prod(axis=1)
        np.maximum(best, shared / (boxes.prod(axis=1) + anchor.prod() - shared), out=best)
    return best


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
    return ",".join("+".join("{:g}".format(side) for side in level) for level in scales)


def suggestions(train: SplitStatistics, config: Config) -> List[str]:
    """Lines about anchors, tiny objects and ground-truth slots, from the training boxes."""
    count, image_id = train.most_objects
    slots = ground_truth_slots(count)
    lines = ["ground-truth slots: {} (image {} has {} object{})".format(
        slots, image_id, count, "" if count == 1 else "s")]
    if not train.objects:
        return lines
    boxes = (train.sides * config.max_size).clip(1e-3)
    tiny = int((np.sqrt(boxes.prod(axis=1)) < _TINY).sum())
    if tiny:
        lines.append("{} of {} objects are smaller than {:g} px at the {} px input; a larger input "
                     "or cut-out images would show them".format(
                         tiny, train.objects, _TINY, config.max_size))
    if len(boxes) > _SAMPLE:
        boxes = boxes[np.random.RandomState(0).choice(len(boxes), _SAMPLE, replace=False)]
    recall = shape_recall(boxes, anchor_shapes(
        config.pred_scales, config.pred_aspect_ratios, config.use_square_anchors))
    lines.append("anchors {} ({}): {:.1f} % of the boxes have one of 0.5 IoU in shape".format(
        format_scales(config.pred_scales), config.name, 100 * recall))
    fitted = fitted_scales(boxes, config.pred_scales)
    better = shape_recall(boxes, anchor_shapes(
        fitted, config.pred_aspect_ratios, config.use_square_anchors))
    if better > recall + _WORTH_IT:
        lines.append("anchors that fit better: --pred_scales={} ({:.1f} %)".format(
            format_scales(fitted), 100 * better))
    return lines
