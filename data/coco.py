"""A folder of images with one COCO instances file."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence
from urllib.parse import unquote

import numpy as np

from data.annotations.packed import load_annotations
from data.image import read_header, read_image
from data.masks import Segmentation
from utils.errors import UserError, first_line, some

_UP = 3
"""Folders above the image folder in which a missing image is looked for."""


@dataclass
class Sample:
    """An image and its usable objects; n may be 0 (a background image).

    Attributes:
        image_id: COCO image id.
        image: uint8 `[h, w, 3]`, BGR as OpenCV decodes it.
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 relative to the image, in [0, 1].
        labels: int64 `[n]`, 1..C-1.
        crowd: bool `[n]`, True where the annotation outlines a group (COCO's iscrowd).
        segmentations: the outline of each object, length n.
    """

    image_id: int
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: list[Segmentation]


class CocoDataset:
    """Images with their usable objects; item n is a `Sample`.

    Every image of the file takes part, also those without objects. What annotations were dropped
    is in `report`. The dataset is read-only after construction, picklable and safe to share with
    forked and spawned workers.

    Attributes:
        annotations: all usable annotations as flat arrays; not to be changed.
        report: counts of the file and of what was dropped; `report.sentences()` are for the user.
        categories: sorted by id; class index n + 1 is `categories[n]`, 0 is background.
        class_names: their names.
        origin: a sentence on what the files were made from, where that was another tool's folder.

    Raises:
        UserError: the folder or file is missing, or the file is not a consistent COCO instances
            file.
    """

    def __init__(self, images_dir: str | Path, annotation_file: str | Path) -> None:
        self.images_dir = str(images_dir)
        self.annotation_file = str(annotation_file)
        if not os.path.isdir(self.images_dir):
            found = "is not a folder" if os.path.exists(self.images_dir) else "not found"
            raise UserError(f"image folder {found}: looked for {os.path.abspath(self.images_dir)}")
        self.origin = ""
        self.annotations = load_annotations(self.annotation_file, self._size_from_header)
        self.report, self.categories = self.annotations.report, self.annotations.categories
        self.class_names = [category.name for category in self.categories]

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Read image `index` and its objects.

        Raises:
            UserError: the image is missing, truncated, not an image, or of another size than the
                annotation file says.
        """
        packed = self.annotations
        index = range(len(self))[index]
        image_id = int(packed.image_ids[index])
        width, height = packed.image_sizes[index].tolist()
        path = self.image_path(index)
        image = read_image(path, f"image {image_id} of {self.annotation_file}", (width, height))
        found = image.shape[1::-1]
        if found != (width, height):
            turned = " (turned, and by no EXIF orientation that may be left out)" \
                if found == (height, width) else ""
            raise UserError(f"image {image_id}: {path} is {found[0]} x {found[1]} pixels (width x "
                            f"height), but {self.annotation_file} says {width} x {height}{turned}; "
                            "its boxes and masks would not fit")
        first, last = packed.object_offsets[index:index + 2].tolist()
        return Sample(
            image_id=image_id, image=image, boxes=packed.boxes[first:last].copy(),
            labels=packed.labels[first:last].astype(np.int64),
            crowd=packed.crowd[first:last].copy(),
            segmentations=[packed.segmentation(row, width, height) for row in range(first, last)])

    @property
    def image_ids(self) -> np.ndarray:
        """int64 `[N]`, COCO image ids in the order of the items."""
        return self.annotations.image_ids

    @property
    def max_objects(self) -> int:
        """Largest number of usable objects, crowds not counted, in one image."""
        return int(np.bincount(self.annotations.owners[~self.annotations.crowd], minlength=1).max())

    def image_info(self, index: int) -> tuple[str, int, int]:
        """File name, width and height in pixels of item `index`."""
        index = range(len(self))[index]
        width, height = self.annotations.image_sizes[index].tolist()
        return self.annotations.file_name(index), width, height

    def image_path(self, index: int) -> str:
        """Path of the image file of item `index`."""
        return os.path.join(self.images_dir, self.annotations.file_name(range(len(self))[index]))

    def missing_images(self, indices: Sequence[int] | None = None) -> list[int]:
        """Items (of `indices`, or of all) whose image is not in its folder; opens no image."""
        listings: dict[str, set[str]] = {}
        missing = []
        for index in range(len(self)) if indices is None else indices:
            folder, name = os.path.split(self.image_path(index))
            if folder not in listings:
                listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in listings[folder]:
                missing.append(index)
        return missing

    def check_images_exist(self, indices: Sequence[int] | None = None) -> None:
        """Look for items, or for all, in one listing of the image folder.

        Raises:
            UserError: images are missing; names the first ones and says how many.
        """
        missing = self.missing_images(indices)
        if missing:
            named = some(f"{self.annotations.file_name(n)} (image {self.image_ids[n]})"
                         for n in missing)
            hint = missing_hint(self.images_dir, self.annotations.file_name(missing[0]))
            raise UserError(f"{len(missing)} of the {len(self)} images of {self.annotation_file} "
                            f"are missing in {os.path.abspath(self.images_dir)}: {named}{hint}")

    def _size_from_header(self, file_name: str, image_id: int) -> tuple[int, int]:
        path = os.path.join(self.images_dir, file_name)
        try:
            return read_header(path).shown
        except (OSError, ValueError) as problem:
            raise UserError(f"image {image_id} of {self.annotation_file}: the width and height "
                            f"that it does not give cannot be read from {path}: "
                            f"{first_line(problem)}") from None


def missing_hint(images_dir: str, file_name: str) -> str:
    """What to change so that an image is found that is not in `images_dir` under the name that the
    annotation file gives it, as the end of a sentence; '' if unknown.
    """
    folder = os.path.abspath(images_dir)
    for above in list(Path(folder).parents)[:_UP]:
        if os.path.isfile(os.path.join(str(above), file_name)):
            return f"; it is found where {above} is given as the image folder"
    slashes = file_name.replace("\\", "/")
    base = slashes.rsplit("/", 1)[-1]
    if base != file_name and os.path.isfile(os.path.join(folder, base)):
        return f"; {base} itself is there: leave the folders out of file_name"
    place, _ = os.path.split(os.path.join(folder, slashes))
    for name in os.listdir(place) if os.path.isdir(place) else ():
        if _folded(name) == _folded(base):
            return (f"; {os.path.join(place, name)!a} is there, whose name differs in case, "
                    "blanks, slashes or the form of its accents: the names have to be equal")
    return ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).strip().casefold()
