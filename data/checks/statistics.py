"""Counts and sizes of one split, from its packed annotations; no image is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import numpy as np

from data.coco import CocoDataset

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
        title = "side at {} px input, {} % below".format(input_size, share)
        rows.append([title] + ["{:.0f}".format(p[n]) if p else "-" for p in percentiles])
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
