"""Validate an annotation file once and keep it as a few flat arrays.

Flat arrays instead of Python lists: under fork, worker processes touch the reference count of every
Python object they read and so copy the memory it lies in; an array is one object. They lie in a
file of the user's cache that every process maps into its memory: ranks and workers share one copy,
and the next start reads nothing again.

What is always an error: anything that makes the file contradict itself (unknown or duplicate ids).
What is dropped, counted and reported: single annotations that cannot be trained on.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Tuple

import numpy as np

from data.annotations.defects import AnnotationReport, Defect, Inspection, offsets
from data.annotations.kept_arrays import KeptArrays, keep, open_kept
from data.annotations.reader import (
    Columns,
    ImageRecord,
    begins_as_json,
    ends_as_json,
    is_id,
    read_columns,
)
from data.description import shown
from data.masks import Segmentation
from utils.errors import UserError, some

SizeReader = Callable[[str, int], Tuple[int, int]]
"""From file name and image id to width and height."""


class Category(NamedTuple):
    """One entry of the file's `categories`."""

    id: int
    name: str


@dataclass
class Annotations:
    """A validated annotation file; N images in file order, M usable objects grouped by image."""

    categories: list[Category]
    """Sorted by id; label n + 1 is `categories[n]`."""
    image_ids: np.ndarray
    """int64 `[N]`."""
    image_sizes: np.ndarray
    """int32 `[N, 2]`, width and height in pixels."""
    name_offsets: np.ndarray
    name_bytes: np.ndarray
    """UTF-8 file names; int64 `[N + 1]` bounds of each."""
    object_offsets: np.ndarray
    """int64 `[N + 1]`, objects of image i are `object_offsets[i:i + 2]`."""
    boxes: np.ndarray
    """float32 `[M, 4]`, x1 y1 x2 y2 relative to the image, in [0, 1]."""
    labels: np.ndarray
    """int16 or int32 `[M]`, 1..C-1."""
    crowd: np.ndarray
    """bool `[M]`."""
    rows: np.ndarray
    """int32 `[M]`, place of each object in the bounds below, which follow the file."""
    polygon_offsets: np.ndarray
    coordinates: np.ndarray
    """float32, x, y in pixels of polygons, a point of NaN between two of an object; int64 bounds of
    each object, equal ones where it has an RLE."""
    rle_offsets: np.ndarray
    rle_bytes: np.ndarray
    """Compressed counts of all RLEs; int64 bounds of each."""
    report: AnnotationReport
    """What was found and dropped."""
    kept_in: str | None = None
    """The file that the arrays lie in; None: in this process's memory."""

    def __reduce__(self) -> Any:
        if self.kept_in is None:
            return super().__reduce__()
        return _reopen, (self.kept_in, self.report.file)

    @property
    def owners(self) -> np.ndarray:
        """int64 `[M]`, index of the image of each object."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.object_offsets))

    @property
    def checksum(self) -> int:
        """CRC-32 of images and objects: another after any change of them."""
        found = 0
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                found = zlib.crc32(np.ascontiguousarray(value).data, found)
        return found

    def file_name(self, index: int) -> str:
        """File name of image `index`, as the annotation file gives it."""
        first, last = self.name_offsets[index], self.name_offsets[index + 1]
        return self.name_bytes[first:last].tobytes().decode("utf-8", "surrogatepass")

    def segmentation(self, index: int, width: int, height: int) -> Segmentation:
        """Outline of object `index` as a fresh copy; `width` and `height` are its image's."""
        row = int(self.rows[index])
        first, last = self.polygon_offsets[row:row + 2].tolist()
        if first == last:
            first, last = self.rle_offsets[row:row + 2].tolist()
            return {"size": [height, width], "counts": self.rle_bytes[first:last].tobytes()}
        points = self.coordinates[first:last].reshape(-1, 2).copy()
        gaps = np.flatnonzero(np.isnan(points[:, 0])).tolist()
        return [points[a + 1:b] for a, b in zip([-1] + gaps, gaps + [len(points)])]


def load_annotations(path: str | Path, image_size: SizeReader | None = None) -> Annotations:
    """Read, check and pack the COCO instances file `path`; one without `annotations` (test-dev's)
    has no objects. `image_size` is for image records without a size; None makes them an error.

    Raises:
        UserError: the file is not a consistent COCO instances file.
    """
    path = Path(path)
    if not (begins_as_json(path) and ends_as_json(path)):
        _read(path, image_size)  # says so, before a digest of the whole file is taken
    return _unpacked(str(path), keep("annotations", str(path), Path(__file__).parent.glob("*.py"),
                                     lambda: _read(path, image_size)))


def _reopen(kept_in: str, file: str) -> Annotations:
    """What `load_annotations` returned in another process of this host, for the same `file`."""
    kept = open_kept(Path(kept_in))
    return load_annotations(file) if kept is None else _unpacked(file, kept)


def _unpacked(file: str, kept: KeptArrays) -> Annotations:
    facts = kept.facts["report"]
    defects = {key: Defect(**defect) for key, defect in facts["defects"].items()}
    return Annotations(
        categories=[Category(*category) for category in kept.facts["categories"]], **kept.arrays,
        report=AnnotationReport(**dict(facts, file=file, defects=defects)), kept_in=kept.path)


def _read(path: Path, image_size: SizeReader | None) -> KeptArrays:
    """What `_unpacked` takes; it lasts if no size came from an image."""
    columns = read_columns(path)
    categories = _categories(path, _without_root(columns))
    image_ids, sizes = _images(path, columns.images, image_size)
    names = [name.encode("utf-8", "surrogatepass") for _, name, _, _ in columns.images]
    image_index, labels, crowd = _resolve_ids(path, columns, image_ids, categories)
    found = Inspection(str(path), columns, sizes[image_index])

    rows = np.flatnonzero(found.usable)
    rows = rows[np.argsort(image_index[rows], kind="stable")]
    per_image = np.bincount(image_index[rows], minlength=len(image_ids))
    solid = rows[~crowd[rows]]
    per_class = np.bincount(labels[solid], minlength=len(categories) + 1)[1:].tolist()
    report = AnnotationReport(
        file=str(path), images=len(image_ids), annotations=len(labels), objects=len(solid),
        crowds=len(rows) - len(solid), empty_images=int((per_image == 0).sum()),
        objects_per_category=dict(zip([category.name for category in categories], per_class)),
        defects=found.defects, notes=columns.notes + found.notes)
    arrays = dict(
        image_ids=image_ids, image_sizes=sizes.astype(np.int32),
        name_offsets=offsets(np.array([len(name) for name in names])),
        name_bytes=np.frombuffer(b"".join(names), np.uint8),
        object_offsets=offsets(per_image), boxes=found.boxes[rows],
        labels=labels[rows].astype(np.int16 if len(categories) < 2 ** 15 else np.int32),
        crowd=crowd[rows], rows=rows.astype(np.int32),
        polygon_offsets=offsets(columns.polygon_lengths), coordinates=columns.coordinates,
        rle_offsets=offsets(columns.rle_lengths), rle_bytes=columns.rle_bytes)
    return KeptArrays({"categories": categories, "report": asdict(report)}, arrays,
                      lasting=not any(None in image[2:] for image in columns.images))


def _without_root(columns: Columns) -> list[Any]:
    """The file's categories without the one that Roboflow puts above the classes.

    It has no objects, and may have the name of a class.
    """
    records = columns.categories
    for root in records:
        if isinstance(root, dict) and root.get("supercategory") == "none":
            others = [record for record in records if record is not root]
            if others and all(isinstance(record, dict) and record.get("supercategory")
                              == root.get("name") for record in others) and not (
                                  columns.ids[:, 2] == root.get("id")).any():
                return others
    return records


def _categories(path: Path, records: list[Any]) -> list[Category]:
    if not records:
        raise UserError(f"{path}: 'categories' is empty, expected at least one object with id and "
                        "name")
    by_id: dict[int, str] = {}
    by_name: dict[str, int] = {}
    for record in records:
        number: Any = record.get("id") if isinstance(record, dict) else None
        name = record.get("name") if isinstance(record, dict) else None
        if not is_id(number) or not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: category {shown(record)} needs an integer id and a name")
        if number in by_id:
            raise UserError(f"{path}: category id {number} is given to both '{by_id[number]}' and "
                            f"'{name}'; ids have to be unique")
        if name in by_name:
            raise UserError(f"{path}: the category name '{name}' is given to both id "
                            f"{by_name[name]} and id {number}; names have to be unique")
        by_id[number], by_name[name] = name, number
    return [Category(number, by_id[number]) for number in sorted(by_id)]


def _images(path: Path, images: list[ImageRecord],
            image_size: SizeReader | None) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[N]` ids and int64 `[N, 2]` width and height, from the file or the image's header."""
    if not images:
        raise UserError(f"{path}: 'images' is empty, expected at least one image")
    sizes = []
    for number, name, width, height in images:
        if not is_id(number):
            raise UserError(f"{path}: image '{name}' has id {shown(number)}, expected an integer; "
                            "write ids as numbers without quotes")
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"{path}: image {number} has file_name {name!r}, expected the name of "
                            "a file")
        if width is None or height is None:
            if image_size is None:
                raise UserError(f"{path}: image {number} ('{name}') has no width and height")
            width, height = image_size(name, number)
        for side in (width, height):
            # Tables that pass through pandas come out as 640.0.
            if type(side) not in (int, float) or not 0 < side < 2 ** 31 or side != int(side):
                raise UserError(f"{path}: image {number} ('{name}') has width {width!r} and height "
                                f"{height!r}, expected whole numbers above 0")
        sizes.append((int(width), int(height)))
    ids = np.array([image[0] for image in images], np.int64)
    _refuse_duplicates(path, "image", ids)
    return ids, np.array(sizes, np.int64)


def _refuse_duplicates(path: Path, what: str, ids: np.ndarray) -> None:
    values, counts = np.unique(ids, return_counts=True)
    repeated = values[counts > 1].tolist()
    if repeated:
        occur = " occurs" if len(repeated) == 1 else "s occur"
        raise UserError(f"{path}: {len(repeated)} {what} id{occur} more than once: {what} id "
                        f"{some(repeated)}; ids have to be unique")


def _resolve_ids(path: Path, columns: Columns, image_ids: np.ndarray,
                 categories: list[Category]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the image, label and crowd flag of each annotation; every id has to be known."""
    ids = columns.ids
    _refuse_duplicates(path, "annotation", ids[:, 0])
    image_index, known = _look_up(ids[:, 1], image_ids)
    if not known.all():
        bad = np.flatnonzero(~known)
        raise UserError(f"{path}: annotation {ids[bad[0], 0]} refers to image id {ids[bad[0], 1]}, "
                        f"which is not in 'images' ({len(bad)} such annotations, {len(image_ids)} "
                        f"images with ids {image_ids.min()} to {image_ids.max()})")
    numbers = np.array([category.id for category in categories], np.int64)
    category_index, known = _look_up(ids[:, 2], numbers)
    if not known.all():
        bad = np.flatnonzero(~known)
        number, image, category = ids[bad[0], :3]
        raise UserError(f"{path}: annotation {number} (image {image}) has category_id {category}, "
                        f"which is not in 'categories' ({len(bad)} such annotations, "
                        f"{len(numbers)} categories with ids {numbers[0]} to {numbers[-1]})")
    flag = ids[:, 3]
    bad = np.flatnonzero((flag != 0) & (flag != 1))
    if len(bad):
        raise UserError(f"{path}: annotation {ids[bad[0], 0]} (image {ids[bad[0], 1]}) has iscrowd "
                        f"{flag[bad[0]]}, expected 0 or 1")
    return image_index, category_index + 1, flag == 1


def _look_up(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of each value in `known` (unique, any order), and whether it is there at all."""
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    index = order[place]
    return index, known[index] == values
