"""What all converters share: outlines that are sound, splits, and COCO files written whole."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
from pycocotools import mask as mask_utils

from data.datasets import FOLDER_FILE, SPLITS, format_dataset_file
from data.image import SUFFIXES, Size, read_header
from utils.errors import UserError, counted, nearest
from utils.files import write_whole

_SHOWN_PROBLEMS = 20
_WAY_OUT = "; correct it, or leave all such shapes and files out with --skip_bad"
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
    objects: List[FoundObject] = field(default_factory=list)


@dataclass
class Problems:
    """What cannot be converted: an error, or counted and left out where `skip` is set."""

    skip: bool
    sentences: List[str] = field(default_factory=list)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A `UserError` inside ends the block: it is remembered, or raised with the way out."""
        try:
            yield
        except UserError as problem:
            if not self.skip:
                text = str(problem)
                raise UserError(text if text.endswith(_WAY_OUT) else text + _WAY_OUT) from None
            self.sentences.append(str(problem))

    def lines(self) -> List[str]:
        """The first sentences, and how many more there are."""
        left = len(self.sentences) - _SHOWN_PROBLEMS
        return ["left out: " + sentence for sentence in self.sentences[:_SHOWN_PROBLEMS]] + (
            [f"... and {left} more"] if left > 0 else [])


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


def rectangle(x1: float, y1: float, x2: float, y2: float) -> List[List[float]]:
    """Corners of a box, in any order of its ends."""
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def run_lengths(mask: np.ndarray) -> Dict[str, Any]:
    """Compressed RLE of a mask `[h, w]`, ready for JSON."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def union(first: Outline, second: Outline, size: Size) -> Outline:
    """Both outlines as one."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return run_lengths(mask_utils.decode([_runs(first, size), _runs(second, size)]).any(axis=2))


def _runs(outline: Outline, size: Size) -> Dict[str, Any]:
    if isinstance(outline, dict):
        return outline
    return mask_utils.merge(mask_utils.frPyObjects(outline, size[1], size[0]))


def open_image(path: Path, where: str, given: Optional[Tuple[float, float]] = None) -> FoundImage:
    """An image file that has been found; its header alone is read.

    Args:
        path: the image.
        where: what refers to it, for the sentence.
        given: width and height that the annotations give, where they do. They tell whether a photo
            with an EXIF orientation was annotated as viewers show it or as it is stored.

    Raises:
        UserError: it is missing, not an image, or of another size.
    """
    try:
        size = read_header(path).annotated(given)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{where}: {path} does not exist") from None
    except (OSError, ValueError):
        raise UserError(f"{where}: {path} is not an image that can be read") from None
    if given is not None and given != size:
        raise UserError(f"{where}: says {given[0]:g} x {given[1]:g} pixels, but {path} has "
                        f"{size[0]} x {size[1]}")
    return FoundImage(path, size)


def number(value: Any) -> Optional[float]:
    """A finite number that a file gives as a number or a text; None for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if abs(found) < float("inf") and not isinstance(value, bool) else None


def list_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> List[Path]:
    """Files in a folder and below by their endings, sorted by name.

    Links to folders are followed; what macOS leaves in archives (`__MACOSX`, `._*`) is not there.
    """
    found: List[Path] = []
    visited: Set[str] = set()
    for place, folders, names in os.walk(str(folder), followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in visited else [name for name in folders if name != "__MACOSX"]
        if real not in visited:
            found += [Path(place) / name for name in names if not name.startswith("._")
                      and os.path.splitext(name)[1].lower() in suffixes]
        visited.add(real)
    return sorted(found)


def read_text(path: Path) -> str:
    """Text of a file in UTF-8 or a Chinese Windows' encoding.

    Raises:
        UserError: it is missing, or neither of these.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"file not found: {path.absolute()}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from None
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return data.decode(encoding)
        except ValueError:
            continue
    raise UserError(f"{path}: is not text in UTF-8")


def split_randomly(items: Sequence[Any], val_fraction: float, seed: int) -> Dict[str, List[Any]]:
    """Part `items` into train and val; the same seed and items give the same parts."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction is {val_fraction}, expected at least 0 and less than 1")
    count = int(round(len(items) * val_fraction))
    if val_fraction > 0:
        if len(items) < 2:
            raise UserError(f"{counted(len(items), 'image')} cannot be divided into training and "
                            "validation; give --val_fraction=0")
        count = min(max(count, 1), len(items) - 1)
    chosen = set(np.random.RandomState(seed).permutation(len(items))[:count].tolist())
    parts = {"train": [item for n, item in enumerate(items) if n not in chosen],
             "val": [item for n, item in enumerate(items) if n in chosen]}
    return {split: part for split, part in parts.items() if part}


def choose_classes(splits: Dict[str, List[FoundImage]], wanted: Optional[Sequence[str]],
                   problems: Problems) -> List[str]:
    """Class names in order: `wanted`, or all that occur, sorted. Objects of others are left out."""
    images = [image for part in splits.values() for image in part]
    names = list(wanted or sorted({item.name for image in images for item in image.objects}))
    if not names:
        raise UserError(f"no objects in {len(images)} images: nothing to learn from")
    for image in images:
        objects, image.objects = image.objects, []
        for item in objects:
            with problems.left_out():
                if item.name not in names:
                    raise UserError(f"{item.where}: the class '{item.name}' is not among "
                                    f"--classes{nearest(item.name, names)}")
                image.objects.append(item)
    return names


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


def write_dataset(splits: Dict[str, List[FoundImage]], names: Sequence[str],
                  out: Path) -> List[str]:
    """Write one COCO file for each split and the description; returns a line about each split.

    Images stay where they are. Ids count from 1 through all splits: the same input gives the same
    files.
    """
    described, lines = {}, []
    image_id = annotation_id = 1
    for split, images in splits.items():
        folder = Path(os.path.commonpath([os.path.abspath(str(image.path.parent))
                                          for image in images]))
        content = _coco(images, names, folder, image_id, annotation_id)
        image_id += len(images)
        annotation_id += len(content["annotations"])
        file = out / (split + ".json")
        # ASCII, as file names need not be text.
        _write(file, json.dumps(content, separators=(",", ":")))
        described[split] = (_relative(folder, out), file.name)
        empty = sum(not image.objects for image in images)
        lines.append(f"{file}: {len(images)} images ({empty} without objects), "
                     f"{len(content['annotations'])} objects")
    _write(out / FOLDER_FILE, f"# {_SIGNATURE}\n" + format_dataset_file(described, names))
    return lines


def _coco(images: Sequence[FoundImage], names: Sequence[str], folder: Path, image_id: int,
          annotation_id: int) -> Dict[str, Any]:
    ids = {name: number for number, name in enumerate(names, 1)}
    records: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for position, image in enumerate(images, image_id):
        records.append({"id": position, "file_name": _relative(image.path, folder),
                        "width": image.size[0], "height": image.size[1]})
        for item in image.objects:
            area, box = _measure(item.outline, image.size)
            annotations.append({
                "id": annotation_id + len(annotations), "image_id": position,
                "category_id": ids[item.name], "iscrowd": 0, "area": area, "bbox": box,
                "segmentation": item.outline})
    return {"info": {"description": _SIGNATURE}, "images": records, "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in ids.items()]}


def _measure(outline: Outline, size: Size) -> Tuple[float, List[float]]:
    """Area in pixels and the box x, y, width, height."""
    area = float(mask_utils.area(_runs(outline, size)))
    if isinstance(outline, dict):
        return area, [float(value) for value in mask_utils.toBbox(outline)]
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in outline])
    low, high = points.min(axis=0), points.max(axis=0)
    return area, [round(float(value), 3) for value in np.concatenate([low, high - low])]


def _relative(path: Path, start: Path) -> str:
    try:
        return os.path.relpath(str(path), str(start)).replace(os.sep, "/")
    except ValueError:  # another drive
        return str(path)


def _write(path: Path, text: str) -> None:
    write_whole(str(path), lambda stream: stream.write(text.encode("utf-8")))
