"""labelme: one JSON file beside each image, with shapes in pixels."""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import os
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from data.image import SUFFIXES, Size, load_pil
from data.tools.conversion import (
    Conversion,
    Found,
    FoundImage,
    FoundObject,
    Outline,
    number,
    open_image,
    polygon,
    rectangle,
    run_lengths,
    union,
)
from data.tools.source_files import by_split
from utils.errors import UserError, counted
from utils.files import read_text
from utils.parsing import parse_json

_IGNORED_LABELS = ("__ignore__", "_background_")
_POLYGONS = ("polygon", "rotation", "oriented_rectangle", "quadrilateral")
_CIRCLE_STEP = 2.0
"""Pixels along a circle between corners of its polygon."""
_MOST_CORNERS = 2000
_TRIED = 5
"""JSON files of a folder that are opened to see whether they are labelme's."""


def is_labelme_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are labelme's."""
    for path in _json_files(files)[:_TRIED]:
        with contextlib.suppress(UserError):
            if _read(path) is not None:
                return True
    return False


def _json_files(files: Sequence[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() == ".json"]


def read_labelme(folder: Path, conversion: Conversion) -> Found:
    """Images with objects of all labelme files in and below `folder`, and notes.

    Shapes of one label that share a group_id are one object.
    """
    if not folder.is_dir():
        raise UserError(f"folder of labelme files not found: {folder.absolute()}")
    return Found(by_split(folder, (".json",), conversion.notes, lambda place, files: _images(
        place, files, conversion)))


def _images(folder: Path, there: Sequence[Path], conversion: Conversion) -> list[FoundImage]:
    files = _json_files(there)
    images: dict[str, FoundImage] = {}
    for file in files:
        with conversion.left_out():
            content = _read(file, conversion.text)
            if content is None:
                continue
            image = _image(file, content)
            key = str(image.path.resolve())
            if key in images:
                raise UserError(f"{file}: its image {image.path} has an annotation file already")
            _add_objects(image, file, content["shapes"], conversion)
            images[key] = image
    if not images:
        raise UserError(f"{folder}: no labelme files ({len(files)} .json files are there); "
                        "expected JSON files with 'shapes' and 'imagePath'")
    unmarked = sum(str(path.resolve()) not in images for path in there
                   if path.suffix.lower() in SUFFIXES)
    if unmarked:
        conversion.notes.append(f"left out: {counted(unmarked, 'image')} without a labelme file; "
                                "save one, with no shapes, for images that show no object")
    return list(images.values())


def _read(file: Path, text: Callable[[Path], str] = read_text) -> dict[str, Any] | None:
    """Content of a labelme file; None for JSON that is something else."""
    content = parse_json(text(file), str(file))
    return content if isinstance(content, dict) and "shapes" in content else None


def _image(file: Path, content: dict[str, Any]) -> FoundImage:
    name = content.get("imagePath")
    if not isinstance(name, str) or not name or not isinstance(content["shapes"], list):
        raise UserError(f"{file}: needs the text 'imagePath' and the list 'shapes'")
    path = file.parent / name.replace("\\", "/")
    beside = file.parent / path.name  # annotated elsewhere, then copied together
    if not os.path.exists(str(path)) and os.path.exists(str(beside)):
        path = beside
    if not os.path.exists(str(path)) and content.get("imageData"):
        raise UserError(f"{file}: {path} does not exist; its picture is in the file itself, as "
                        "imageData: save it there, as labelme_export_json does")
    width, height = (number(content.get("image" + side)) for side in ("Width", "Height"))
    return open_image(path, str(file), (width, height))


def _add_objects(image: FoundImage, file: Path, shapes: Sequence[Any],
                 conversion: Conversion) -> None:
    groups: dict[tuple[str, str], FoundObject] = {}
    for position, shape in enumerate(shapes, 1):
        with conversion.left_out():
            label = shape.get("label") if isinstance(shape, dict) else None
            if label in _IGNORED_LABELS:
                continue
            if not isinstance(label, (str, int, float)) or not str(label).strip():
                raise UserError(f"{file}: shape {position}: has no label")
            name, where = str(label).strip(), f"{file}: shape {position} ('{label}')"
            outline = _outline(shape, image.size, where)
            key = name, str(shape.get("group_id"))
            if shape.get("group_id") not in (None, "") and key in groups:
                groups[key].outline = union(groups[key].outline, outline, image.size)
            else:
                image.add(name, outline, where)
                groups[key] = image.objects[-1]


def _outline(shape: dict[str, Any], size: Size, where: str) -> Outline:
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise UserError(f"{where}: points are not a list of x, y pairs of numbers")
    if kind == "mask":
        return _mask(shape, points, size, where)
    if kind == "circle" and len(points) == 2:
        points = _circle(*points)
    elif kind == "rectangle" and len(points) == 2:
        points = rectangle(*points[0], *points[1])
    elif kind not in _POLYGONS and not (kind == "rectangle" and len(points) == 4):
        raise UserError(f"{where}: a shape_type '{kind}' of {len(points)} points has no area; "
                        "expected a polygon, rectangle, circle or mask")
    return polygon(points, size, where)


def _is_point(point: Any) -> bool:
    return (isinstance(point, list) and len(point) == 2
            and all(type(value) is float or type(value) is int and abs(value) < 2 ** 63
                    for value in point))


def _circle(centre: Sequence[float], edge: Sequence[float]) -> list[list[float]]:
    radius = math.hypot(edge[0] - centre[0], edge[1] - centre[1])
    count = math.ceil(min(max(12, 2 * math.pi * radius / _CIRCLE_STEP), _MOST_CORNERS))
    angles = [2 * math.pi * n / count for n in range(count)]
    return [[centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)]
            for angle in angles]


def _mask(shape: dict[str, Any], points: Sequence[Sequence[float]], size: Size,
          where: str) -> Outline:
    """A drawn mask: a PNG in base64, its upper left corner at the first point."""
    try:
        data = base64.b64decode(shape.get("mask") or "", validate=True)
        part = np.asarray(load_pil(data).convert("L"))
        left, top = (int(round(value)) for value in points[0])
    except (binascii.Error, OSError, ValueError, TypeError, IndexError, OverflowError):
        raise UserError(f"{where}: its mask is not a PNG in base64 with a corner point") from None
    width, height = size
    full = np.zeros((height, width), np.uint8)
    cut = part[max(-top, 0):max(height - top, 0), max(-left, 0):max(width - left, 0)]
    full[max(top, 0):max(top, 0) + cut.shape[0], max(left, 0):max(left, 0) + cut.shape[1]] = cut
    if not full.any():
        raise UserError(f"{where}: its mask is empty or outside the image")
    return run_lengths(full > 0)
