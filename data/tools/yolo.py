"""YOLO segmentation: a text file for each image, a line `class x1 y1 x2 y2 ...` for each object."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from data.datasets import FOLDER_FILE, SPLITS, parse_yaml
from data.tools.conversion import (
    FoundImage,
    FoundObject,
    Problems,
    list_images,
    picture_size,
    polygon,
    read_text,
    rectangle,
)
from utils.errors import UserError

_NAME_FILES = ("classes.txt", "obj.names")
_OUTSIDE = 0.01
"""Coordinates are relative to the image; this much beyond it is rounding."""


def read_yolo(source: Path, problems: Problems, boxes_as_masks: bool,
              classes: Optional[Sequence[str]] = None
              ) -> Tuple[Dict[str, List[FoundImage]], List[str]]:
    """Images with objects of each split, and the class names in the order of their numbers.

    Args:
        source: a `data.yaml`, its folder, or a folder with images/, labels/ and classes.txt; in the
            last case all images come as `train`.
        problems: where unusable lines go.
        boxes_as_masks: lines of a box become rectangles instead of problems.
        classes: names, where no file gives them.
    """
    if source.is_dir() and not (source / FOLDER_FILE).is_file():
        folders = {"train": [source / "images" if (source / "images").is_dir() else source]}
        names = list(classes or _listed_names(source))
    else:
        path = source / FOLDER_FILE if source.is_dir() else source
        content = parse_yaml(read_text(path), str(path))
        if not isinstance(content, dict) or not any(split in content for split in SPLITS):
            raise UserError(f"{path}: expected YOLO's keys train, val and names")
        names = _names(path, content.get("names"))
        folders = {split: _sources(path, content, split) for split in SPLITS
                   if content.get(split)}
    splits = {}
    for split, places in folders.items():
        images = [image for place in places for image in _list(place)]
        if not images:
            raise UserError("{}: no images for '{}' in {}".format(
                source, split, ", ".join(str(place) for place in places)))
        found = [_image(path, names, problems, boxes_as_masks) for path in images]
        splits[split] = [image for image in found if image is not None]
    return splits, names


def _names(path: Path, value: Any) -> List[str]:
    if isinstance(value, dict):
        if sorted(value) != list(range(len(value))):
            raise UserError("{}: the keys of names are {}, expected 0 to {}".format(
                path, ", ".join(str(key) for key in list(value)[:5]), len(value) - 1))
        value = [value[key] for key in range(len(value))]
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: names is {value!r}, expected a list of class names")
    names = [str(name) for name in value]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names holds the same class twice")
    return names


def _listed_names(folder: Path) -> List[str]:
    for name in _NAME_FILES:
        if (folder / name).is_file():
            lines = read_text(folder / name).splitlines()
            return [line.strip() for line in lines if line.strip()]
    raise UserError("{}: neither {} nor {} is there; give the class names in their order with "
                    "--classes=a,b,c".format(folder, FOLDER_FILE, " nor ".join(_NAME_FILES)))


def _sources(path: Path, content: Dict[str, Any], split: str) -> List[Path]:
    """Folders or list files of a split; written paths are taken as YOLO's tools take them."""
    value = content[split]
    entries = value if isinstance(value, list) else [value]
    places = []
    for entry in entries:
        text = str(entry)
        roots = [path.parent / str(content.get("path") or "."), path.parent]
        # Roboflow writes ../train/images for what lies beside the file.
        shortened = text[len("../"):] if text.startswith("../") else text
        candidates = [root / name for root in roots for name in (text, shortened)]
        there = [place for place in candidates if place.exists()]
        if not there:
            raise UserError("{}: '{}' names {}, which was not found: looked for {}".format(
                path, split, text, " and ".join(sorted({str(c) for c in candidates}))))
        places.append(there[0])
    return places


def _list(place: Path) -> List[Path]:
    if place.is_dir():
        return list_images(place)
    lines = [line.strip() for line in read_text(place).splitlines()]
    return [place.parent / line for line in lines if line]


def label_file(image: Path) -> Path:
    """Where YOLO looks for an image's labels: the last `images` of its path becomes `labels`."""
    parts = list(image.parts)
    for n in range(len(parts) - 2, -1, -1):
        if parts[n] == "images":
            parts[n] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _image(path: Path, names: Sequence[str], problems: Problems,
           boxes_as_masks: bool) -> Optional[FoundImage]:
    labels = label_file(path)
    size = picture_size(path, str(labels), problems)
    if size is None:
        return None
    objects = []
    if labels.is_file():
        for number, line in enumerate(read_text(labels).splitlines(), 1):
            if line.strip():
                item = _object(line.split(), size, names, f"{labels}: line {number}",
                               problems, boxes_as_masks)
                objects += [] if item is None else [item]
    return FoundImage(path, size[0], size[1], objects)


def _object(words: Sequence[str], size: Tuple[int, int], names: Sequence[str], where: str,
            problems: Problems, boxes_as_masks: bool) -> Optional[FoundObject]:
    try:
        values = np.array([float(word) for word in words])
    except ValueError:
        problems.add("{}: '{}' is not a line of numbers".format(where, " ".join(words)[:40]))
        return None
    label, rest = values[0], values[1:]
    if not 0 <= label < len(names) or label != int(label):  # nor a number at all
        problems.add(f"{where}: class {words[0]} is not one of the {len(names)} names (0 to "
                     f"{len(names) - 1})")
        return None
    if len(rest) == 4:
        if not boxes_as_masks:
            problems.add(f"{where}: a box (class and 4 numbers), but masks are learned; annotate "
                         "outlines, or take boxes as masks with --boxes_as_masks")
            return None
        x, y, width, height = rest
        rest = np.array(rectangle(x - width / 2, y - height / 2, x + width / 2,
                                  y + height / 2)).ravel()
    elif len(rest) < 6 or len(rest) % 2:
        problems.add(f"{where}: {len(rest)} numbers after the class, expected x, y pairs of at "
                     "least 3 points"
                     )
        return None
    if not ((rest >= -_OUTSIDE) & (rest <= 1 + _OUTSIDE)).all():
        problems.add(f"{where}: coordinates from {rest.min():g} to {rest.max():g}, expected 0 to "
                     "1, relative to the image"
                     )
        return None
    flat = polygon(rest.reshape(-1, 2) * size, size[0], size[1], where, problems)
    return None if flat is None else FoundObject(names[int(label)], [flat], where)
