"""Statistics of a dataset: counts, sizes, odd objects, and how well anchors fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple, Union

import numpy as np
from pycocotools import mask as mask_utils

from data.coco import CocoDataset
from data.config import Config
from data.targets import ground_truth_slots

SMALL, MEDIUM = 32.0 ** 2, 96.0 ** 2
"""Areas in pixels of the stored image between COCO's small, medium and large objects."""
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass
class SplitStatistics:
    """Numbers of one split; n usable objects that are not crowds.

    Attributes:
        name: train or val.
        images, empty, objects, crowds: counts.
        class_names: in the order of the classes.
        objects_per_class, images_per_class: int64 `[C - 1]`.
        sizes: small, medium and large objects by the area of their boxes.
        sides: float64 `[n, 2]`, widths and heights of boxes relative to the image.
        most_objects: largest number in an image, and that image's id.
    """

    name: str
    images: int
    empty: int
    objects: int
    crowds: int
    class_names: List[str]
    objects_per_class: np.ndarray
    images_per_class: np.ndarray
    sizes: Tuple[int, int, int]
    sides: np.ndarray
    most_objects: Tuple[int, int]

    def side_percentiles(self, input_size: int) -> List[float]:
        """Percentiles of the boxes' mean side in pixels of a network's input."""
        if not self.objects:
            return []
        side = np.sqrt(self.sides.prod(axis=1)) * input_size
        return [float(value) for value in np.percentile(side, PERCENTILES)]


def measure(name: str, dataset: CocoDataset) -> SplitStatistics:
    """Count `dataset`."""
    packed = dataset.annotations
    owner = owners(dataset)
    solid = ~packed.crowd
    labels, owner = packed.labels[solid].astype(np.int64), owner[solid]
    sides = (packed.boxes[solid, 2:] - packed.boxes[solid, :2]).astype(np.float64)
    area = sides.prod(axis=1) * packed.image_sizes[owner].astype(np.float64).prod(axis=1)
    classes = len(dataset.categories)
    pairs = np.unique(owner * (classes + 1) + labels) % (classes + 1)
    per_image = np.bincount(owner, minlength=len(dataset))
    fullest = int(per_image.argmax())
    return SplitStatistics(
        name=name, images=len(dataset), empty=dataset.report.empty_images, objects=len(labels),
        crowds=dataset.report.crowds, class_names=dataset.class_names,
        objects_per_class=np.bincount(labels, minlength=classes + 1)[1:],
        images_per_class=np.bincount(pairs, minlength=classes + 1)[1:],
        sizes=(int((area < SMALL).sum()), int(((area >= SMALL) & (area < MEDIUM)).sum()),
               int((area >= MEDIUM).sum())),
        sides=sides, most_objects=(int(per_image[fullest]), int(dataset.image_ids[fullest])))


def owners(dataset: CocoDataset) -> np.ndarray:
    """Index of the image of each object, crowds included: int64 `[m]`."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.annotations.object_offsets))


def table(splits: Sequence[SplitStatistics], input_size: int) -> List[str]:
    """Lines of a table with a column for each split."""
    rows = [[""] + [split.name for split in splits]]
    for title, values in (
            ("images", [split.images for split in splits]),
            ("  without objects", [split.empty for split in splits]),
            ("objects", [split.objects for split in splits]),
            ("  small (below 32 x 32 px)", [split.sizes[0] for split in splits]),
            ("  medium", [split.sizes[1] for split in splits]),
            ("  large (from 96 x 96 px)", [split.sizes[2] for split in splits]),
            ("crowd regions", [split.crowds for split in splits]),
            ("most objects in an image", [split.most_objects[0] for split in splits])):
        rows.append([title] + [str(value) for value in values])
    percentiles = [split.side_percentiles(input_size) for split in splits]
    for n, share in enumerate(PERCENTILES):
        title = f"side at {input_size} px input, {share} % below"
        rows.append([title] + [f"{p[n]:.0f}" if p else "-" for p in percentiles])
    return _aligned(rows) + [""] + _class_table(splits)


def _class_table(splits: Sequence[SplitStatistics]) -> List[str]:
    rows = [["class"] + [head for split in splits for head in (split.name, "images")]]
    counts: List[Dict[str, Tuple[int, int]]] = [
        {name: (int(objects), int(images)) for name, objects, images in zip(
            split.class_names, split.objects_per_class, split.images_per_class)}
        for split in splits]
    names = list(dict.fromkeys(name for split in splits for name in split.class_names))
    for name in names:
        cells = [count.get(name) for count in counts]
        rows.append([name] + [str(value) for cell in cells for value in (cell or ("-", "-"))])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> List[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0])] + [
        cell.rjust(max(width, 7)) for cell, width in zip(row[1:], widths[1:])]).rstrip()
        for row in rows]


_DISAGREE = 0.5
_EXAMPLES = 5
_SAME = 1e-4
"""Boxes whose corners differ by less, relative to the image, are the same."""


def object_findings(name: str, dataset: CocoDataset) -> List[str]:
    """Sentences about what was dropped or repaired, duplicates, and boxes unlike their masks."""
    defects = [f"{name}: {sentence}" for sentence in dataset.report.sentences()[1:]]
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
    return [f"{name}: {len(wrong)} of {int(np.isfinite(overlaps).sum())} boxes overlap the extent "
            f"of their mask by less than {_DISAGREE} IoU: image id {some(images)}; masks are "
            "learned inside the box, so one of the two is wrong"]


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
    return ",".join("+".join(f"{side:g}" for side in level) for level in scales)


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
        lines.append(f"{tiny} of {train.objects} objects are smaller than {_TINY:g} px at the "
                     f"{config.max_size} px input; a larger input or cut-out images would show "
                     "them")
    if len(boxes) > _SAMPLE:
        boxes = boxes[np.random.RandomState(0).choice(len(boxes), _SAMPLE, replace=False)]
    recall = shape_recall(boxes, anchor_shapes(
        config.pred_scales, config.pred_aspect_ratios, config.use_square_anchors))
    lines.append(f"anchors {format_scales(config.pred_scales)} ({config.name}): {100 * recall:.1f} "
                 "% of the boxes have one of 0.5 IoU in shape")
    fitted = fitted_scales(boxes, config.pred_scales)
    better = shape_recall(boxes, anchor_shapes(
        fitted, config.pred_aspect_ratios, config.use_square_anchors))
    if better > recall + _WORTH_IT:
        lines.append(f"anchors that fit better: --pred_scales={format_scales(fitted)} "
                     f"({100 * better:.1f} %)")
    return lines
