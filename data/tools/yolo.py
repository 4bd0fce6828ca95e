"""YOLO segmentation: a text file for each image, a line `class x1 y1 x2 y2 ...` for each object."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from data.description import FOLDER_FILE, SPLITS, is_yolo, parse_description, shown
from data.image import SUFFIXES
from data.tools.conversion import Conversion, Found, FoundImage, open_image, polygon, rectangle
from data.tools.source_files import list_files, outside, split_folders, split_of
from utils.errors import UserError, counted, some
from utils.files import read_text
from utils.parsing import whole_number

_NAME_FILES = ("classes.txt", "obj.names")
_OUTSIDE = 0.01
"""Coordinates are relative to the image; this much beyond it is rounding."""


def is_yolo_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are YOLO's: its description, or texts beside their images."""
    if find_description(folder) is not None:
        return True
    texts = {path for path in files if path.suffix.lower() == ".txt"}
    return bool(texts) and any(
        path.suffix.lower() in SUFFIXES and _label_file(path) in texts for path in files)


def find_description(source: Path) -> Path | None:
    """The description of YOLO's that a folder holds, data.yaml before others; None for none."""
    names = [FOLDER_FILE] + sorted(path.name for path in source.glob("*.y*ml"))
    for path in (source / name for name in names):
        with contextlib.suppress(UserError):
            if path.is_file() and is_yolo(parse_description(path)):
                return path
    return None


def places_of(source: Path) -> list[Path]:
    """Everything that a YOLO dataset reads: its description, and folders of images and labels."""
    path = find_description(source) if source.is_dir() else source
    if path is None:
        return [source]
    folders = {image.parent for place in sum(_described(path)[0].values(), [])
               for image in ([place / "image"] if place.is_dir() else _list(place))}
    return [path] + sorted(folders | {_label_file(folder / "image").parent for folder in folders})


def read_yolo(source: Path, conversion: Conversion) -> Found:
    """Images with objects of each split, and the class names in the order of their numbers.

    `source` is a `data.yaml`, its folder, or a folder with images/, labels/ and classes.txt, in
    which images/ may have folders of splits, or lie in them.
    """
    folders: dict[str, list[Path]]
    path = find_description(source) if source.is_dir() else source
    listed = any((source / name).is_file() for name in _NAME_FILES)
    if path is None and (listed or not (source / FOLDER_FILE).is_file()):
        images = source / "images" if (source / "images").is_dir() else source
        folders = {split: [] for split in split_folders(images)}
        if "train" in folders:
            folders[""] = []
            for file in list_files(images):
                folders[split_of(file.relative_to(images).parts[0])].append(file)
            conversion.notes += outside(images, folders.pop(""))
        else:
            folders = {"train": [images]}
        names = list(conversion.classes or _listed_names(source, conversion))
    else:
        folders, names = _described(path or source / FOLDER_FILE, conversion.notes)
    splits: dict[str, list[FoundImage]] = {}
    image_folders: set[Path] = set()
    for split, places_ in folders.items():
        paths = [path for place in places_ for path in _list(place)]
        if not paths:
            raise UserError(f"{source}: no images for '{split}' in {some(places_) or 'its folder'}")
        splits[split] = []
        owners: dict[Path, Path] = {}
        for path in paths:
            with conversion.left_out():
                labels = _label_file(path)
                if owners.setdefault(labels, path) != path and labels.is_file():
                    raise UserError(f"{owners[labels]} and {path} have the same label file, "
                                    f"{labels}; rename one of them or move it away")
                splits[split].append(_image(path, names, conversion))
        image_folders.update(path.parent for path in paths)
    for path in _strays(image_folders):
        with conversion.left_out():
            raise UserError(f"{path}: is the label file of no image; its name has to be the "
                            "image's, letter by letter, with .txt")
    read = [image.path for images in splits.values() for image in images]
    if read and not any(_label_file(path).is_file() for path in read):
        raise UserError(f"{source}: none of its {counted(len(read), 'image')} has a label file; "
                        f"that of {read[0]} would be {_label_file(read[0])}")
    return Found(splits, names)


def _strays(image_folders: Iterable[Path]) -> list[Path]:
    """Label files that no image of these folders has; among images, what begins as one."""
    found: list[Path] = []
    for folder in sorted(image_folders):
        labels = _label_file(folder / "image").parent
        if labels.is_dir():
            wanted = {_label_file(path) for path in folder.iterdir()
                      if path.suffix.lower() in SUFFIXES}
            found += [path for path in sorted(labels.iterdir()) if path.suffix.lower() == ".txt"
                      and path not in wanted and path.name not in _NAME_FILES
                      and not path.name.startswith("._")
                      and (labels != folder or _begins_with_object(path))]
    return found


def _begins_with_object(path: Path) -> bool:
    """Whether the first line of a text is a class and coordinates."""
    words = (read_text(path).strip().splitlines() or [""])[0].split()
    return len(words) > 4 and all(re.match(r"-?[0-9]*\.?[0-9]+(e-?[0-9]+)?\Z", word)
                                  for word in words)


def _described(path: Path, notes: list[str] | None = None
               ) -> tuple[dict[str, list[Path]], list[str]]:
    """Places of the images of each split, and the class names."""
    content = parse_description(path, notes)
    if not is_yolo(content):
        raise UserError(f"{path}: expected YOLO's keys train, val and names")
    if "kpt_shape" in content:
        raise UserError(f"{path}: has kpt_shape, so its lines are boxes with keypoints; expected "
                        "outlines")
    folders = {split: _sources(path, content, split) for split in SPLITS if content.get(split)}
    return ({split: places for split, places in folders.items() if places},
            _names(path, content.get("names"), content.get("nc")))


def _names(path: Path, value: Any, count: Any) -> list[str]:
    """Class names in their order, `count` of them where that is given."""
    if isinstance(value, dict):
        numbers = {key: whole_number(str(key)) for key in value}
        by_number = {numbers[key]: name for key, name in value.items()}
        if set(by_number) != set(range(len(value))):
            raise UserError(f"{path}: the keys of names are "
                            f"{', '.join(str(key) for key in list(value)[:5])}, expected 0 to "
                            f"{len(value) - 1}")
        value = [by_number[key] for key in range(len(value))]
    if not isinstance(value, list) or not value or not all(
            type(name) in (str, int, float) for name in value):
        raise UserError(f"{path}: names is {shown(value)}, expected a list of class names; put "
                        "them in quotes (YAML reads no, yes, on, off as truth values)")
    names = [str(name) for name in value]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names holds the same class twice")
    if count is not None and whole_number(str(count)) != len(names):
        raise UserError(f"{path}: nc is {shown(count)}, but names holds "
                        f"{counted(len(names), 'class name')}; correct one of them")
    return names


def _listed_names(folder: Path, conversion: Conversion) -> list[str]:
    for name in _NAME_FILES:
        if (folder / name).is_file():
            text = conversion.text(folder / name)
            names = [line.strip() for line in text.rstrip().splitlines()]
            if "" in names or len(set(names)) < len(names):
                raise UserError(f"{folder / name}: has an empty line, or a class twice; expected "
                                "class names in their order, one a line")
            return names
    raise UserError(f"{folder}: neither {FOLDER_FILE} nor {' nor '.join(_NAME_FILES)} is there; "
                    f"write the class names in their order into {_NAME_FILES[0]}, one a line, or "
                    "give them to python -m data.convert yolo with --classes=a,b,c")


def _sources(path: Path, content: dict[str, Any], split: str) -> list[Path]:
    """Folders or list files of a split; written paths are taken as YOLO's tools take them."""
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    places = []
    for text in entries:
        if not isinstance(text, str):
            raise UserError(f"{path}: '{split}' is {shown(entries)}, expected paths")
        folder = content.get("path")
        roots = [path.parent / (folder if isinstance(folder, str) else "."), path.parent]
        # Roboflow writes ../train/images for what lies beside the file.
        shortened = text[len("../"):] if text.startswith(("../", "..\\")) else text
        candidates = [root / name for root in roots for written in (text, shortened)
                      for name in (written, written.replace("\\", "/"))]
        there = [place for place in candidates if os.path.exists(str(place))]
        if not there and split == "test":
            continue  # Roboflow names it always
        if not there:
            looked = " and ".join(sorted({str(place) for place in candidates}))
            raise UserError(f"{path}: '{split}' names {text}, which was not found: looked for "
                            f"{looked}")
        places.append(there[0])
    return places


def _list(place: Path) -> list[Path]:
    if place.is_dir():
        return list_files(place)
    if place.suffix.lower() in SUFFIXES:
        return [place]
    lines = [line.strip() for line in read_text(place).splitlines()]
    paths = [(place.parent / line, place.parent / line.replace("\\", "/"))
             for line in lines if line]
    return [slashed if os.path.exists(str(slashed)) else path for path, slashed in paths]


def _label_file(image: Path) -> Path:
    """Where YOLO looks for an image's labels: the last `images` of its path becomes `labels`."""
    parts = list(image.parts)
    for n in range(len(parts) - 2, -1, -1):
        if parts[n] == "images":
            parts[n] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _image(path: Path, names: Sequence[str], conversion: Conversion) -> FoundImage:
    labels = _label_file(path)
    image = open_image(path, str(labels))
    for row, line in enumerate(read_text(labels).splitlines() if labels.is_file() else (), 1):
        with conversion.left_out():
            if line.strip():
                _add_object(image, line.split(), names, f"{labels}: line {row}",
                            conversion.boxes_as_masks)
    return image


def _add_object(image: FoundImage, words: Sequence[str], names: Sequence[str], where: str,
                boxes_as_masks: bool) -> None:
    try:
        values = np.array([float(word) for word in words])
    except ValueError:
        raise UserError(f"{where}: '{' '.join(words)[:40]}' is not a line of numbers") from None
    label, rest = values[0], values[1:]
    if not 0 <= label < len(names) or label != int(label):  # nor a number at all
        raise UserError(f"{where}: class {words[0]} is not one of the {len(names)} names (0 to "
                        f"{len(names) - 1})")
    if len(rest) == 4:
        if not boxes_as_masks:
            raise UserError(f"{where}: a box (class and 4 numbers), but masks are learned; "
                            "annotate outlines, or let data.convert take boxes: --boxes_as_masks")
        x, y, width, height = rest
        rest = np.array(rectangle(x - width / 2, y - height / 2, x + width / 2,
                                  y + height / 2)).ravel()
    elif len(rest) < 6 or len(rest) % 2:
        raise UserError(f"{where}: {len(rest)} numbers after the class, expected x, y pairs of at "
                        "least 3 points")
    if not ((rest >= -_OUTSIDE) & (rest <= 1 + _OUTSIDE)).all():
        raise UserError(f"{where}: coordinates from {rest.min():g} to {rest.max():g}, expected 0 "
                        "to 1, relative to the image")
    outline = polygon(rest.reshape(-1, 2) * image.size, image.size, where)
    image.add(names[int(label)], outline, where)
