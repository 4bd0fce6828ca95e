"""What all converters share: outlines that are sound, splits, and COCO files written whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from pycocotools import mask as mask_utils

from data.datasets import FOLDER_FILE, format_dataset_file
from data.image import Size, read_header
from utils.errors import UserError, nearest
from utils.files import write_whole

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".ppm")
_SHOWN_PROBLEMS = 20

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
    width: int
    height: int
    objects: List[FoundObject]


@dataclass
class Problems:
    """What cannot be converted: an error, or counted and left out where `skip` is set."""

    skip: bool
    sentences: List[str] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        """Raise `UserError(sentence)`, or remember it."""
        if not self.skip:
            raise UserError(sentence + "; correct it, or leave all such shapes and files out with "
                            "--skip_bad")
        self.sentences.append(sentence)

    def lines(self) -> List[str]:
        """The first sentences, and how many there are."""
        if not self.sentences:
            return []
        left = len(self.sentences) - _SHOWN_PROBLEMS
        return ["left out: " + sentence for sentence in self.sentences[:_SHOWN_PROBLEMS]] + (
            [f"... and {left} more"] if left > 0 else [])


def polygon(points: Any, width: int, height: int, where: str,
            problems: Problems) -> Optional[List[float]]:
    """Flat x, y list of `points` `[n, 2]` in pixels, cut off at the image; None if reported."""
    outline = np.asarray(points, np.float64)
    if len(outline) < 3:
        problems.add(f"{where}: an outline of {len(outline)} points, expected at least 3")
        return None
    if not np.isfinite(outline).all():
        problems.add(f"{where}: coordinates that are not finite")
        return None
    inside = np.clip(outline, 0, [width, height])
    x, y = inside.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    if area < 1e-2 or (np.ptp(inside, axis=0) <= 0).any():
        problems.add("{}: {}".format(where, "an outline without area"
                                     if (inside == outline).all() else
                                     f"an outline outside the image of {width} x {height} pixels"))
        return None
    return [round(value, 3) for value in inside.ravel().tolist()]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> List[List[float]]:
    """Corners of a box, in any order of its ends."""
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def run_lengths(mask: np.ndarray) -> Dict[str, Any]:
    """Compressed RLE of a mask `[h, w]`, ready for JSON."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def picture_size(path: Path, where: str, problems: Problems,
                 given: Tuple[Any, ...] = ()) -> Optional[Size]:
    """Width and height of an image file, from its header; None if reported.

    Args:
        path: the image.
        where: what refers to it, for the sentence.
        problems: where a missing or unreadable file goes.
        given: width and height that the annotations give, where they do. They tell whether a photo
            with an EXIF orientation was annotated as viewers show it or as it is stored.
    """
    try:
        return read_header(path).annotated(given)  # type: ignore[arg-type]
    except (OSError, ValueError) as problem:
        missing = isinstance(problem, FileNotFoundError)
        problems.add("{}: {} {}".format(where, path, "does not exist" if missing else
                                        "is not an image that can be read"))
        return None


def list_images(folder: Path) -> List[Path]:
    """Image files in a folder and below, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def read_text(path: Path) -> str:
    """UTF-8 text of a file; a `UserError` names it where that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"file not found: {path.absolute()}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from None


def split_randomly(items: Sequence[Any], val_fraction: float, seed: int) -> Dict[str, List[Any]]:
    """Part `items` into train and val; the same seed and items give the same parts."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction is {val_fraction}, expected at least 0 and less than 1")
    count = int(round(len(items) * val_fraction))
    if val_fraction > 0:
        if len(items) < 2:
            raise UserError("{} image{} cannot be divided into training and validation; give "
                            "--val_fraction=0".format(len(items), "" if len(items) == 1 else "s"))
        count = min(max(count, 1), len(items) - 1)
    chosen = set(np.random.RandomState(seed).permutation(len(items))[:count].tolist())
    parts = {"train": [item for n, item in enumerate(items) if n not in chosen],
             "val": [item for n, item in enumerate(items) if n in chosen]}
    return {split: part for split, part in parts.items() if part}


def choose_classes(splits: Dict[str, List[FoundImage]], wanted: Optional[Sequence[str]],
                   problems: Problems) -> List[str]:
    """Class names in order: `wanted`, or all that occur, sorted. Objects of others are reported."""
    images = [image for part in splits.values() for image in part]
    found = {item.name for image in images for item in image.objects}
    names = list(wanted) if wanted else sorted(found)
    if not names:
        raise UserError(f"no objects in {len(images)} images: nothing to learn from")
    for image in images:
        kept = []
        for item in image.objects:
            if item.name in names:
                kept.append(item)
            else:
                problems.add(f"{item.where}: the class '{item.name}' is not among "
                             f"--classes{nearest(item.name, names)}")
        image.objects = kept
    return names


def write_dataset(splits: Dict[str, List[FoundImage]], names: Sequence[str], out: Path,
                  progress: Callable[[str], None]) -> str:
    """Write one COCO file for each split and the description; returns the description's path.

    Images stay where they are. Ids count from 1 through all splits: the same input gives the same
    files.
    """
    described = {}
    image_id = annotation_id = 1
    for split, images in splits.items():
        folder = Path(os.path.commonpath([os.path.abspath(str(image.path.parent))
                                          for image in images]))
        content = _coco(images, names, folder, image_id, annotation_id)
        image_id += len(images)
        annotation_id += len(content["annotations"])
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        _write(out / (split + ".json"), text)
        described[split] = (_relative(folder, out), split + ".json")
        progress("{}: {} images ({} without objects), {} objects".format(
            out / (split + ".json"), len(images),
            sum(not image.objects for image in images), len(content["annotations"])))
    path = out / FOLDER_FILE
    _write(path, format_dataset_file(described, names))
    return str(path)


def _coco(images: Sequence[FoundImage], names: Sequence[str], folder: Path, image_id: int,
          annotation_id: int) -> Dict[str, Any]:
    ids = {name: number for number, name in enumerate(names, 1)}
    records: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for number, image in enumerate(images, image_id):
        name = os.path.relpath(str(image.path), str(folder))
        records.append({"id": number, "file_name": name.replace(os.sep, "/"),
                        "width": image.width, "height": image.height})
        for item in image.objects:
            area, box = _measure(item.outline, image)
            annotations.append({
                "id": annotation_id + len(annotations), "image_id": number,
                "category_id": ids[item.name], "iscrowd": 0, "area": area, "bbox": box,
                "segmentation": item.outline})
    return {"info": {"description": "converted by python -m data.convert"}, "images": records,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()]}


def _measure(outline: Outline, image: FoundImage) -> Tuple[float, List[float]]:
    """Area in pixels and the box x, y, width, height."""
    if isinstance(outline, dict):
        return float(mask_utils.area(outline)), [float(v) for v in mask_utils.toBbox(outline)]
    runs = mask_utils.frPyObjects(outline, image.height, image.width)
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in outline])
    low, high = points.min(axis=0), points.max(axis=0)
    box = [round(float(value), 3) for value in np.concatenate([low, high - low])]
    return float(mask_utils.area(mask_utils.merge(runs))), box


def _relative(folder: Path, start: Path) -> str:
    try:
        return os.path.relpath(str(folder), str(start)).replace(os.sep, "/")
    except ValueError:  # another drive
        return str(folder)


def _write(path: Path, text: str) -> None:
    write_whole(str(path), lambda stream: stream.write(text.encode("utf-8")))
