"""What a dataset holds, what is wrong with it, how well anchors fit it: tables and sentences."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Mapping, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset, missing_hint
from data.config import MOST_DETECTIONS, Config
from data.config_fields import as_text
from data.image import read_header
from utils.errors import UserError, counted, some
from utils.files import digest

Splits = Mapping[str, CocoDataset]
"""Training data as `train` and, where there is any, validation data as `val`."""

Files = List[Tuple[str, str]]
"""Split and path of images."""

Progress = Callable[[int, int], None]

_SHOWN = 10
_SAME = 1e-4
"""Boxes whose corners differ by less, relative to the image, are the same."""
_NEARLY_BLACK = 15
"""Images without a brighter value show nothing; 12 bits are read so where they lie in 16."""
_MANY_CROWDS = 0.25
"""Share of crowds among the annotations above which they are hardly meant; nor are they where a
class has nothing else."""
SMALL, MEDIUM = 32.0 ** 2, 96.0 ** 2
"""Areas in pixels of the stored image between COCO's small, medium and large objects."""

_RECALL_IOU = 0.5
_WORTH_IT = 0.02
"""Recall that other anchors have to gain before they are suggested."""
_ROUNDS = 30
_TINY = 4.0
_SAMPLE = 50000

Scales = Tuple[Tuple[float, ...], ...]


def annotation_findings(splits: Splits) -> list[str]:
    """Sentences about the annotations of each split, and about the classes of both."""
    found = []
    for name, dataset in splits.items():
        texts = dataset.report.sentences()[1:] + _crowds(dataset) + _duplicates(dataset)
        found += [f"{name}: {text}" for text in texts]
    return found + _classes(splits)


def _crowds(dataset: CocoDataset) -> list[str]:
    packed, objects = dataset.annotations, dataset.report.objects_per_category
    crowds = np.bincount(packed.labels[packed.crowd], minlength=len(objects) + 1)[1:]
    only = [name for (name, count), hidden in zip(objects.items(), crowds) if hidden and not count]
    total = int(crowds.sum())
    if total <= _MANY_CROWDS * (total + dataset.report.objects) and not only:
        return []
    return [f"{total} of {total + dataset.report.objects} annotations have iscrowd 1"
            + (f" (all of {some(only)})" if only else "") + ", so they are neither learned nor "
            "scored; where they outline single objects (CVAT marks every brush mask so), set "
            "iscrowd to 0"]


def duplicates(dataset: CocoDataset) -> np.ndarray:
    """Objects (rows) that repeat the box and class of an earlier one in the same image."""
    packed = dataset.annotations
    rows = np.flatnonzero(~packed.crowd)
    corners = np.rint(packed.boxes[rows] / _SAME).astype(np.int64)
    keys = np.column_stack([packed.owners[rows], packed.labels[rows], corners])
    order = np.lexsort(keys.T[::-1])  # stable: the earlier of two equal ones stays first
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    return np.sort(rows[order[1:][same]])


def _duplicates(dataset: CocoDataset) -> list[str]:
    rows = duplicates(dataset)
    if not len(rows):
        return []
    images = np.unique(dataset.image_ids[dataset.annotations.owners[rows]])
    return [f"{counted(len(rows), 'object')} {'repeats' if len(rows) == 1 else 'repeat'} the box "
            f"and class of another in the same image: image id {some(images)}; each counts as a "
            "missed object in the score"]


def _classes(splits: Splits) -> list[str]:
    """Sentences about classes without objects, of nearly one name, and that differ."""
    counts = {split: dataset.report.objects_per_category for split, dataset in splits.items()}
    found = []
    for split, objects in counts.items():
        empty = [name for name, count in objects.items() if not count]
        if empty:
            found.append(f"{split}: {len(empty)} of {len(objects)} classes "
                         f"{'has' if len(empty) == 1 else 'have'} no object: {some(empty)}")
        alike: dict[str, list[str]] = {}
        for name in objects:
            alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
        found += [f"{split}: {len(names)} classes differ in letter case or white space alone: "
                  f"{some(map(repr, names))}; they are learned as different ones"
                  for names in alike.values() if len(names) > 1]
    if len(counts) < 2:
        return found
    train, val = counts["train"], counts["val"]
    if set(val) != set(train):
        only = [some(sorted(set(one) - set(other))) or "none"
                for one, other in ((train, val), (val, train))]
        found.append(f"train and val have different classes: only in train: {only[0]}; only in "
                     f"val: {only[1]}")
    elif list(val) != list(train):
        found.append("train and val have the same classes under different ids: "
                     f"{some(train)} in train, {some(val)} in val; they are matched by name")
    unseen = [name for name, count in val.items() if count and train.get(name) == 0]
    if unseen:
        found.append(f"val: has objects of classes that train has none of: {some(unseen)}")
    return found


def copy_findings(splits: Splits, same_name: bool = False) -> list[str]:
    """Sentences about images whose files are equal, within a split and between both.

    Only files of equal size are read; with `same_name`, only those of equal names too.
    """
    found, leaks = [], []
    groups = _equal_files(splits, (os.path.basename,) if same_name else ())
    for split in splits:
        copies: list[str] = []
        for files in groups:
            copies += [os.path.basename(path) for owner, path in files if owner == split][1:]
        if copies:
            found.append(f"{split}: {counted(len(copies), 'image')} of the same content as "
                         f"another: {some(copies)}")
    for files in groups:
        if len({split for split, _ in files}) > 1:
            leaks += [os.path.basename(path) for split, path in files if split == "val"]
    if leaks:
        found.append(f"{len(leaks)} of the {len(splits['val'])} images of val are in train too: "
                     f"{some(leaks)}; scores on them say nothing")
    return found


def _equal_files(splits: Splits, first: tuple[Callable[[str], Any], ...]) -> list[Files]:
    """Groups of equal files: each property, cheap ones first, parts what the last left together."""
    groups: list[Files] = [[(split, dataset.image_path(index))
                            for split, dataset in splits.items() for index in range(len(dataset))]]
    for property_of in (*first, os.path.getsize, digest):
        finer: list[Files] = []
        for files in groups:
            alike: dict[Any, Files] = {}
            for split, path in files:
                with contextlib.suppress(OSError, ValueError):  # a name that no file can have
                    alike.setdefault(property_of(path), []).append((split, path))
            finer += [group for group in alike.values() if len(group) > 1]
        groups = finer
    return groups


def image_findings(splits: Splits, workers: int = 2, progress: Progress | None = None) -> list[str]:
    """Read every image: sentences about files that are missing, cannot be used or show nothing."""
    found = []
    for name, dataset in splits.items():
        missing = dataset.missing_images()
        problems: list[str] = []
        black: list[str] = []
        there = sorted(set(range(len(dataset))) - set(missing))
        with ThreadPoolExecutor(workers) as pool:
            looks = pool.map(functools.partial(_look_at, dataset), there)
            for done, (index, (text, brightest)) in enumerate(zip(there, looks), 1):
                problems += [text] if text else []
                if brightest <= _NEARLY_BLACK:
                    black.append(dataset.image_info(index)[0])
                if progress is not None:
                    progress(done, len(there))
        if missing:
            names = [dataset.image_info(index)[0] for index in missing]
            found.append(f"{name}: {counted(len(names), 'image file')} missing: {some(names)}"
                         f"{missing_hint(dataset.images_dir, names[0])}")
        found += [f"{name}: {text}" for text in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            found.append(f"{name}: {len(problems) - _SHOWN} more images cannot be used")
        if black:
            found.append(f"{name}: {counted(len(black), 'image')} as good as black, without a "
                         f"value above {_NEARLY_BLACK} of 255: {some(black)}; 10 or 12 bits in a "
                         "file of 16 are read so: stretch them to 8 bits")
    return found


def _look_at(dataset: CocoDataset, index: int) -> tuple[str, int]:
    """Why an image cannot be used, empty if it can; and its largest value, up to 255."""
    try:
        return "", int(dataset[index].image.max())
    except UserError as problem:
        return str(problem), 255


def turned_notes(splits: Splits) -> list[str]:
    """A sentence about the images of each split that have an EXIF orientation.

    Headers alone are read. Files that cannot be read are left to those who report them.
    """
    notes = []
    for split, dataset in splits.items():
        turned, stored = [], []
        for index in range(len(dataset)):
            file_name, width, height = dataset.image_info(index)
            try:
                header = read_header(dataset.image_path(index))
            except (OSError, ValueError):
                continue
            if header.turned and (width, height) in header[:2]:
                turned.append(file_name)
                if header.annotated((width, height)) != header.shown:
                    stored.append(file_name)
        if turned:
            notes.append(f"{split}: {counted(len(turned), 'image')} with an EXIF orientation "
                         f"({some(turned)}), read upright as viewers show them" + (
                             f", but {len(stored)} ({some(stored)}) as stored, as the size in the "
                             "annotation file says" if stored else ""))
    return notes


def object_sides(dataset: CocoDataset) -> np.ndarray:
    """float64 `[n, 2]`, widths and heights relative to the image of the boxes of all objects."""
    packed = dataset.annotations
    return (packed.boxes[:, 2:] - packed.boxes[:, :2])[~packed.crowd].astype(np.float64)


def counts(dataset: CocoDataset) -> dict[str, int]:
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


def class_counts(dataset: CocoDataset) -> dict[str, tuple[int, int]]:
    """Objects and images of each class by its name."""
    packed = dataset.annotations
    pairs = np.column_stack([packed.owners, packed.labels])[~packed.crowd]
    images = np.bincount(np.unique(pairs, axis=0)[:, 1], minlength=len(dataset.categories) + 1)
    objects = dataset.report.objects_per_category
    return dict(zip(objects, zip(objects.values(), images[1:].tolist())))


def table(splits: Splits) -> list[str]:
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


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
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


def suggestions(train: CocoDataset, config: Config) -> list[str]:
    """Lines about ground-truth slots, dense images, tiny objects and anchors, for training."""
    from data.targets import ground_truth_slots  # imports PyTorch, which --help need not wait for

    packed = train.annotations
    per_image = np.bincount(packed.owners[~packed.crowd], minlength=len(train))
    lines = [f"ground-truth slots: {ground_truth_slots(train.max_objects)} (image "
             f"{train.image_ids[per_image.argmax()]} has {counted(train.max_objects, 'object')})"]
    dense = int((per_image > config.max_num_detections).sum())
    if dense:
        wanted = min(math.ceil(train.max_objects / 100) * 100, MOST_DETECTIONS)
        candidates = min(max(wanted * 3 // 2, config.nms_top_k), MOST_DETECTIONS)
        lines.append(f"{dense} of {counted(len(train), 'image')} show more objects than the "
                     f"{config.max_num_detections} that {config.name} finds: --set "
                     f"max_num_detections={wanted} --set nms_top_k={candidates}")
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
