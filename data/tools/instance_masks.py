"""Masks as images: one PNG for each object, or one for each image with a number for each object.

    ID/images/ID.png      ID/masks/*.png               an object each (Data Science Bowl's nuclei)
    images/A.png          masks/A/*.png, masks/A_1.png an object each
    PNGImages/A.png       PedMasks/A_mask.png          numbers (Penn-Fudan)
    A_rgb.png             A_label.png                  numbers (CVPPP)
    images/A.png          masks/A.png                  numbers

Numbers are those of instances, 0 is the background; they are not classes, of which there is one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Sequence, Tuple

import cv2
import numpy as np

from data.image import SUFFIXES
from data.tools.conversion import Conversion, Found, FoundImage, open_image, run_lengths
from data.tools.source_files import by_split, read_pixels
from utils.errors import UserError, counted

_CLASS = "object"
_MASK_FOLDERS = ("masks", "mask", "pedmasks", "instances")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pngimages", "jpegimages")
_MASK_NAME = re.compile(r"(.+)_(?:masks?|labels?|instances?)")
_IMAGE_NAME = re.compile(r"(.+)_(?:rgb|img|image)")
_LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif")
_VOID = 255
"""The number of borders, where they have one; among smaller numbers it is hardly an object's."""
_MOST_LOOKED_AT = 50
"""Of the numbers of an image; those of classes are fewer."""
_MOST_NUMBERS = 10000
"""More values than this in an image are no instances."""

Key = Tuple[Tuple[str, ...], str]
"""Folders below the source, without those that say what is in them, and the name without what says
so."""


class Mask(NamedTuple):
    """A file with a mask."""

    path: Path
    numbered: bool
    """It holds the numbers of all objects of the image, not one object."""


def is_mask_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether files of a folder are images with masks."""
    return any(_pairs(folder, files)[0].values())


def read_masks(folder: Path, conversion: Conversion) -> Found:
    """Images with the objects that their masks show, all of one class, `object` where
    `conversion.classes` does not name another.
    """
    if not folder.is_dir():
        raise UserError(f"folder of images and masks not found: {folder.absolute()}")
    return Found(by_split(folder, SUFFIXES, conversion.notes, lambda place, files: _images(
        place, files, conversion)))


def _images(folder: Path, files: Sequence[Path], conversion: Conversion) -> list[FoundImage]:
    pairs, strays = _pairs(folder, files)
    marked = {path: masks for path, masks in pairs.items() if masks}
    if not marked:
        raise UserError(f"{folder}: no masks; expected ID/images/ID.png with ID/masks/*.png, "
                        "images/A.png with masks/A.png, or A_rgb.png with A_label.png")
    for sentence in strays:
        with conversion.left_out():
            raise UserError(sentence)
    name, images = (conversion.classes or [_CLASS])[0], []
    black_and_white = one_number = True
    void = pieces = 0
    for path, masks in marked.items():
        with conversion.left_out():
            image = open_image(path, str(path.parent))
            for mask in masks:
                with conversion.left_out():
                    values = _read(mask.path, image)
                    numbers = np.unique(values[values > 0]).tolist()
                    one_number &= mask.numbered and len(numbers) < 2
                    void += mask.numbered and len(numbers) > 1 and (
                        numbers[-1] == _VOID and numbers[-2] < _VOID - 1)
                    black_and_white &= mask.numbered and numbers in ([], [255], [0xffffff])
                    pieces += _scattered(values, numbers) if mask.numbered else 0
                    _add(image, mask, values, numbers, name)
            images.append(image)
    if black_and_white and images:
        raise UserError(f"{folder}: masks such as {marked[images[0].path][0].path} are black and "
                        "white, which does not tell objects of an image apart; expected a number "
                        "for each object (1, 2, ..), or a file for each object")
    notes = conversion.notes
    if one_number and len(images) > 1:
        notes.append("no mask holds more than one number, so no image has more than one object")
    objects = sum(len(image.objects) for image in images)
    if pieces * 2 > objects:
        notes.append(f"{pieces} of {counted(objects, 'object')} consist of pieces that do not "
                     "touch; where numbers are those of classes, objects cannot be told apart")
    if void:
        notes.append(f"the number {_VOID} is taken for an object in {counted(void, 'mask')}; where "
                     "it marks borders, as in Pascal VOC, make it 0")
    if len(pairs) > len(marked):
        notes.append(f"left out: {counted(len(pairs) - len(marked), 'image')} without a mask")
    return images


def _pairs(folder: Path, files: Sequence[Path]) -> tuple[dict[Path, list[Mask]], list[str]]:
    """The masks of each image, and sentences about those without an image, or with two."""
    images: dict[Key, Path] = {}
    twins: list[tuple[Path, Path]] = []
    masks: list[tuple[Key, Path]] = []
    marked = any(_IMAGE_NAME.fullmatch(path.stem) for path in files)
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            continue
        place = path.relative_to(folder).parts[:-1]
        scope = tuple(part for part in place if part.lower() not in _MASK_FOLDERS + _IMAGE_FOLDERS)
        named = _MASK_NAME.fullmatch(path.stem)
        if named or any(part.lower() in _MASK_FOLDERS for part in place):
            if path.suffix.lower() in _LOSSLESS:
                masks.append(((scope, named.group(1) if named else path.stem), path))
            continue
        as_image = _IMAGE_NAME.fullmatch(path.stem)
        if as_image or not marked:  # others beside A_rgb.png: A_fg.png, A_centers.png
            first = images.setdefault((scope, as_image.group(1) if as_image else path.stem), path)
            twins += [(first, path)] * (first != path)
    found: dict[Path, list[Mask]] = {path: [] for path in images.values()}
    alone: dict[tuple[str, ...], Path | None] = {}
    for (scope, _), path in images.items():
        alone[scope] = None if scope in alone else path
    strays: list[str] = []
    for key, path in masks:
        image, numbered = images.get(key), True
        if image is None:
            image, numbered = _owner(key, images) or alone.get(key[0]), False
        if image is None:
            strays.append(f"{path}: is a mask without an image")
        else:
            found[image].append(Mask(path, numbered))
    strays += [f"{first} and {path} have the same name, and {found[first][0].path} is of one; "
               "rename one of them or move it away" for first, path in twins if found[first]]
    return found, strays


def _owner(key: Key, images: dict[Key, Path]) -> Path | None:
    """The image of a mask of one object: that its folder or the beginning of its name says."""
    scope, stem = key
    if scope and (scope[:-1], scope[-1]) in images:
        return images[scope[:-1], scope[-1]]
    while re.search("[_-]", stem):
        stem = re.split("[_-](?=[^_-]*$)", stem)[0]
        if (scope, stem) in images:
            return images[scope, stem]
    return None


def _read(path: Path, image: FoundImage) -> np.ndarray:
    """Whole numbers `[h, w]` of a mask."""
    size = open_image(path, str(path)).size
    image.size = open_image(image.path, f"{path}: a mask", size).size
    opened = read_pixels(path)
    values = np.array(opened)
    if opened.mode in ("LA", "RGB", "RGBA", "PA"):  # a colour is a number; nothing is transparent
        colours = np.asarray(opened.convert("RGBA"))
        values = colours[..., :3] @ np.array([1, 1 << 8, 1 << 16]) * (colours[..., 3] > 0)
    if values.dtype.kind == "f":
        raise UserError(f"{path}: holds {values.dtype}, expected whole numbers")
    return values


def _scattered(values: np.ndarray, numbers: Sequence[int]) -> int:
    """How many numbers have pixels in several places that do not touch."""
    return sum(cv2.connectedComponents((values == number).astype(np.uint8))[0] > 2
               for number in numbers[:_MOST_LOOKED_AT])


def _add(image: FoundImage, mask: Mask, values: np.ndarray, numbers: Sequence[int],
         name: str) -> None:
    if not numbers and not mask.numbered:
        raise UserError(f"{mask.path}: shows no object, all of it is 0")
    if not mask.numbered:
        image.add(name, run_lengths(values > 0), str(mask.path))
        return
    if len(numbers) > _MOST_NUMBERS:
        raise UserError(f"{mask.path}: holds {len(numbers)} values, expected the numbers of "
                        "instances")
    for number in numbers:
        image.add(name, run_lengths(values == number), f"{mask.path}: {number}")
