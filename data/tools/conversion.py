"""What all converters share: outlines that are sound, splits, and COCO files written whole."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Union

import numpy as np
from pycocotools import mask as mask_utils

from data.description import FOLDER_FILE, SPLITS, format_dataset_file
from data.image import Size, read_header
from utils.errors import UserError, nearest
from utils.files import GUESSED, read_text, remove_abandoned, write_whole

_SHOWN_PROBLEMS = 20
_SIGNATURE = "converted by python -m data.convert"
"""Stands at the beginning of every file that a converter writes."""

Outline = Union[List[List[float]], Dict[str, Any]]
"""Polygons as flat x, y lists in pixels, or a compressed RLE."""


@dataclass
class FoundObject:
    """One object of a foreign format."""

    name: str
    outline: Outline
    where: str
    """File and number of the shape, for sentences."""


@dataclass
class FoundImage:
    """One image of a foreign format; no objects is a background image."""

    path: Path
    size: Size
    objects: list[FoundObject] = field(default_factory=list)

    def add(self, name: str, outline: Outline, where: str) -> None:
        """Add an object, see `FoundObject`."""
        self.objects.append(FoundObject(name, outline, where))


class Found(NamedTuple):
    """What a reader finds in a source."""

    splits: dict[str, list[FoundImage]]
    """`train` alone where the source has no splits."""
    names: Sequence[str] = ()
    """Class names in their order, where the source gives one."""


class Part(NamedTuple):
    """One split, ready to be written."""

    images_dir: Path
    annotations: Path | dict[str, Any]
    """A COCO file that is there, or the content of one."""
    images: int
    objects: int
    empty: int
    """Images without objects."""

    def __str__(self) -> str:
        return f"{self.images} images ({self.empty} without objects), {self.objects} objects"


@dataclass
class Conversion:
    """How a dataset of another tool is read, and what of it is left out."""

    skip_bad: bool = False
    """Count what cannot be converted and leave it out; otherwise it is an error."""
    boxes_as_masks: bool = False
    """Objects that have a box only get it as their mask; otherwise they cannot be converted."""
    classes: Sequence[str] = ()
    """Names in the order wanted; empty takes all."""
    val_fraction: float = 0.2
    """Of the images for validation, where the source has no splits."""
    seed: int = 0
    """Of that split."""
    way_out: str = "leave all such shapes and files out with --skip_bad"
    """What a user may do who cannot correct the source."""
    left: list[str] = field(default_factory=list)
    """Sentences about what was left out."""
    notes: list[str] = field(default_factory=list)
    """Further sentences for the user."""

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A `UserError` inside ends the block: it is remembered, or raised with the way out."""
        try:
            yield
        except UserError as problem:
            if not self.skip_bad:
                text, way_out = str(problem), f"; correct it, or {self.way_out}"
                raise UserError(text if text.endswith(way_out) else text + way_out) from None
            self.left.append(str(problem))

    def text(self, path: Path) -> str:
        """Text of a file of the source; the first whose encoding was guessed is in the notes."""
        guessed: list[str] = []
        text = read_text(path, notes=guessed)
        if not any(note.endswith(GUESSED) for note in self.notes):
            self.notes += guessed
        return text

    def lines(self) -> list[str]:
        """What was left out, at most the first of it, and the notes."""
        more = len(self.left) - _SHOWN_PROBLEMS
        return (["left out: " + sentence for sentence in self.left[:_SHOWN_PROBLEMS]]
                + [f"... and {more} more"] * (more > 0) + self.notes)

    def divided(self, items: Sequence[Any]) -> dict[str, list[Any]]:
        """Part `items` into train and val; the same seed and items give the same parts.

        A single one is for training.
        """
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction is {self.val_fraction}, expected at least 0 and less "
                            "than 1")
        count = int(round(len(items) * self.val_fraction))
        if self.val_fraction > 0:
            count = min(max(count, 1), len(items) - 1)
        chosen = set(np.random.RandomState(self.seed).permutation(len(items))[:count].tolist())
        parts = {"train": [item for n, item in enumerate(items) if n not in chosen],
                 "val": [item for n, item in enumerate(items) if n in chosen]}
        return {split: part for split, part in parts.items() if part}

    def parts(self, found: Found, source: Path) -> tuple[dict[str, Part], list[str]]:
        """Content of a COCO file for each split, and the class names.

        Ids count from 1 through all splits: the same input gives the same files.
        """
        splits = {split: images for split, images in found.splits.items() if images}
        if list(splits) == ["train"]:
            splits = self.divided(splits["train"])
        if "train" not in splits:
            raise UserError(f"{source}: no image for training was left")
        names = self._class_names(found, [image for part in splits.values() for image in part])
        parts, image_id, annotation_id = {}, 1, 1
        for split, images in splits.items():
            parts[split] = _part(images, names, image_id, annotation_id)
            image_id, annotation_id = image_id + len(images), annotation_id + parts[split].objects
        return parts, names

    def _class_names(self, found: Found, images: Sequence[FoundImage]) -> list[str]:
        """In order: those wanted, or all that occur, sorted. Objects of others are left out."""
        names = list(self.classes or found.names
                     or sorted({item.name for image in images for item in image.objects}))
        if not names:
            raise UserError(f"no objects in {len(images)} images: nothing to learn from")
        for image in images:
            objects, image.objects = image.objects, []
            for item in objects:
                with self.left_out():
                    if item.name not in names:
                        raise UserError(f"{item.where}: the class '{item.name}' is not among "
                                        f"--classes{nearest(item.name, names)}")
                    image.objects.append(item)
        return names


def polygon(points: Any, size: Size, where: str) -> Outline:
    """Outline of `points` `[n, 2]` in pixels, cut off at the image of width and height `size`.

    Raises:
        UserError: fewer than 3 points, not finite, or without area inside the image.
    """
    outline = np.asarray(points, np.float64)
    if len(outline) < 3:
        raise UserError(f"{where}: an outline of {len(outline)} points, expected at least 3")
    if not np.isfinite(outline).all():
        raise UserError(f"{where}: coordinates that are not finite")
    inside = np.clip(outline, 0, size)
    x, y = inside.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    if area < 1e-2 or (np.ptp(inside, axis=0) <= 0).any():
        kind = "without area" if (inside == outline).all() else \
            f"outside the image of {size[0]} x {size[1]} pixels"
        raise UserError(f"{where}: an outline {kind}")
    return [[round(value, 3) for value in inside.ravel().tolist()]]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    """Corners of a box, in any order of its ends."""
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Compressed RLE of a mask `[h, w]`, ready for JSON."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def union(first: Outline, second: Outline, size: Size) -> Outline:
    """Both outlines as one."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return run_lengths(mask_utils.decode([_runs(first, size), _runs(second, size)]).any(axis=2))


def _runs(outline: Outline, size: Size) -> dict[str, Any]:
    if isinstance(outline, dict):
        return outline
    return mask_utils.merge(mask_utils.frPyObjects(outline, size[1], size[0]))


def open_image(path: Path, where: str,
               given: tuple[float | None, float | None] = (None, None)) -> FoundImage:
    """The image that `where` refers to; its header alone is read.

    Width and height that the annotations give, where they give both, tell whether a photo with an
    EXIF orientation was annotated as viewers show it or as it is stored.

    Raises:
        UserError: it is missing, not an image, or of another size.
    """
    try:
        size = read_header(path).annotated(given)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{where}: {path} does not exist") from None
    except (OSError, ValueError):
        raise UserError(f"{where}: {path} is not an image that can be read") from None
    if None not in given and given != size:
        raise UserError(f"{where}: says {given[0]:g} x {given[1]:g} pixels, but {path} has "
                        f"{size[0]} x {size[1]}")
    return FoundImage(path, size)


def number(value: Any) -> float | None:
    """A finite number that a file gives as a number or a text; None for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < float("inf") and not isinstance(value, bool) else None


def refuse_foreign_files(out: Path) -> None:
    """Raise a `UserError` where a conversion would replace a file that no conversion wrote."""
    for path in [out / (split + ".json") for split in SPLITS] + [out / FOLDER_FILE]:
        try:
            with open(str(path), "rb") as stream:
                ours = _SIGNATURE.encode("ascii") in stream.read(200)
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise UserError(f"cannot write {path}: {problem}") from None
        if not ours:
            raise UserError(f"{path} is there and was not written by a conversion; it is not "
                            "replaced: give --out another folder, or move it away")


def write_dataset(parts: dict[str, Part], names: Sequence[str], out: Path,
                  portable: bool = True) -> list[str]:
    """Write the COCO files, and last the description; returns a line about each split.

    Images stay where they are. No class names are written where the files alone say them. Paths in
    a `portable` description are relative to its folder `out`.
    """
    remove_abandoned(str(out))
    described, lines = {}, []
    for split, part in parts.items():
        file = part.annotations
        if not isinstance(file, Path):
            # ASCII, as file names need not be text.
            text, file = json.dumps(file, separators=(",", ":")), out / f"{split}.json"
            write_whole(str(file), text.encode("ascii"))
        images, annotations = (os.path.relpath(str(path), str(out)) if portable
                               else os.path.abspath(str(path))
                               for path in (part.images_dir, file))
        described[split] = images, annotations
        lines.append(f"{file}: {part}")
    text = f"# {_SIGNATURE}\n" + format_dataset_file(described, names)
    write_whole(str(out / FOLDER_FILE), text.encode("utf-8"))
    return lines


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """Content of a COCO file that says at its beginning who wrote it."""
    return {"info": {"description": _SIGNATURE},
            **{key: value for key, value in content.items() if key != "info"}}


def _part(images: Sequence[FoundImage], names: Sequence[str], image_id: int,
          annotation_id: int) -> Part:
    folder = Path(os.path.commonpath([os.path.abspath(str(image.path.parent))
                                      for image in images]))
    ids = {name: number for number, name in enumerate(names, 1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position, image in enumerate(images, image_id):
        records.append({"id": position, "file_name": os.path.relpath(str(image.path), str(folder)),
                        "width": image.size[0], "height": image.size[1]})
        for item in image.objects:
            area, box = _measure(item.outline, image.size)
            annotations.append({
                "id": annotation_id + len(annotations), "image_id": position,
                "category_id": ids[item.name], "iscrowd": 0, "area": area, "bbox": box,
                "segmentation": item.outline})
    content = signed({"images": records, "annotations": annotations, "categories": [
        {"id": number, "name": name} for name, number in ids.items()]})
    return Part(folder, content, len(images), len(annotations),
                sum(not image.objects for image in images))


def _measure(outline: Outline, size: Size) -> tuple[float, list[float]]:
    """Area in pixels and the box x, y, width, height."""
    area = float(mask_utils.area(_runs(outline, size)))
    if isinstance(outline, dict):
        return area, [float(value) for value in mask_utils.toBbox(outline)]
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in outline])
    low, high = points.min(axis=0), points.max(axis=0)
    return area, [round(float(value), 3) for value in np.concatenate([low, high - low])]
