"""labelme: one JSON file beside each image, with shapes in pixels."""

from __future__ import annotations

import base64
import binascii
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from data.tools.conversion import (
    FoundImage,
    FoundObject,
    Outline,
    Problems,
    list_images,
    picture_size,
    polygon,
    read_text,
    rectangle,
    run_lengths,
)
from utils.errors import UserError

_POLYGONS = ("polygon", "rotation")
_CIRCLE_STEP = 2.0
"""Pixels along a circle between corners of its polygon."""


def read_labelme(folder: Path, problems: Problems, ignore_labels: Sequence[str] = (),
                 ignore_shapes: Sequence[str] = ()) -> Tuple[List[FoundImage], List[str]]:
    """Images with objects of all labelme files in and below `folder`, and notes.

    Shapes of one label that share a group_id are one object.
    """
    if not folder.is_dir():
        raise UserError(f"folder of labelme files not found: {folder.absolute()}")
    files = sorted(folder.rglob("*.json"))
    images: Dict[str, FoundImage] = {}
    ignored = foreign = 0
    for file in files:
        content = _read(file)
        if content is None:
            foreign += 1
            continue
        image, left_out = _image(file, content, problems, ignore_labels, ignore_shapes)
        ignored += left_out
        if image is None:
            continue
        key = str(image.path.resolve())
        if key in images:
            problems.add(f"{file}: its image {image.path} has an annotation file already")
            continue
        images[key] = image
    if not images:
        raise UserError(f"{folder}: no labelme files ({len(files)} .json files are there); "
                        "expected JSON files with 'shapes' and 'imagePath'")
    notes = [f"{ignored} shapes were ignored, as asked for"] if ignored else []
    if foreign:
        notes.append(f"{foreign} other .json files were not read")
    unmarked = sum(str(path.resolve()) not in images for path in list_images(folder))
    if unmarked:
        notes.append("left out: {} without a labelme file; save one, with no shapes, for images "
                     "that show no object".format(
                         "1 image" if unmarked == 1 else f"{unmarked} images"))
    return list(images.values()), notes


def _read(file: Path) -> Optional[Dict[str, Any]]:
    """Content of a labelme file; None for JSON that is something else."""
    try:
        content = json.loads(read_text(file))
    except ValueError as problem:
        raise UserError(f"{file}: not JSON: {problem}") from None
    return content if isinstance(content, dict) and "shapes" in content else None


def _image(file: Path, content: Dict[str, Any], problems: Problems, ignore_labels: Sequence[str],
           ignore_shapes: Sequence[str]) -> Tuple[Optional[FoundImage], int]:
    name = content.get("imagePath")
    shapes = content["shapes"]
    if not isinstance(name, str) or not name or not isinstance(shapes, list):
        problems.add(f"{file}: needs the text 'imagePath' and the list 'shapes'")
        return None, 0
    path = file.parent / name.replace("\\", "/")
    beside = file.parent / path.name
    if not path.exists() and beside.exists():  # annotated elsewhere, then copied together
        path = beside
    given = content.get("imageWidth"), content.get("imageHeight")
    size = picture_size(path, str(file), problems, given)
    if size is None:
        return None, 0
    if given != (None, None) and given != size:
        problems.add("{}: says {} x {} pixels, but {} has {} x {}".format(
            file, given[0], given[1], path, *size))
        return None, 0
    kept = []
    for number, shape in enumerate(shapes, 1):
        if not (isinstance(shape, dict) and (shape.get("label") in ignore_labels
                                             or shape.get("shape_type") in ignore_shapes)):
            kept.append((number, shape))
    objects = _objects(file, kept, size, problems)
    return FoundImage(path, size[0], size[1], objects), len(shapes) - len(kept)


def _objects(file: Path, shapes: Sequence[Tuple[int, Any]], size: Tuple[int, int],
             problems: Problems) -> List[FoundObject]:
    found: Dict[Any, FoundObject] = {}
    for number, shape in shapes:
        where = f"{file}: shape {number}"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            problems.add(f"{where}: has no label")
            continue
        where += f" ('{label}')"
        outline = _outline(shape, size, where, problems)
        if outline is None:
            continue
        group = shape.get("group_id")
        key = (label, "single", number) if group is None else (label, "group", str(group))
        if key in found:
            found[key].outline = _union(found[key].outline, outline, size)
        else:
            found[key] = FoundObject(label.strip(), outline, where)
    return list(found.values())


def _outline(shape: Dict[str, Any], size: Tuple[int, int], where: str,
             problems: Problems) -> Optional[Outline]:
    kind = shape.get("shape_type") or "polygon"
    points = _points(shape.get("points"))
    if points is None:
        problems.add(f"{where}: points are not a list of x, y pairs of numbers")
        return None
    if kind == "mask":
        return _mask(shape, points, size, where, problems)
    if kind == "circle" and len(points) == 2:
        points = _circle(*points)
    elif kind == "rectangle" and len(points) == 2:
        points = rectangle(*points[0], *points[1])
    elif kind not in _POLYGONS and not (kind == "rectangle" and len(points) == 4):
        problems.add(f"{where}: a shape_type '{kind}' of {len(points)} points has no area; "
                     "expected a polygon, rectangle, circle or mask (leave others out with "
                     f"--ignore_shapes={kind})")
        return None
    flat = polygon(points, size[0], size[1], where, problems)
    return None if flat is None else [flat]


def _points(value: Any) -> Optional[List[List[float]]]:
    if not isinstance(value, list):
        return None
    for point in value:
        if not (isinstance(point, list) and len(point) == 2
                and all(type(number) in (int, float) for number in point)):
            return None
    return value


def _circle(centre: Sequence[float], edge: Sequence[float]) -> List[List[float]]:
    radius = math.hypot(edge[0] - centre[0], edge[1] - centre[1])
    count = max(12, int(math.ceil(2 * math.pi * radius / _CIRCLE_STEP)))
    angles = [2 * math.pi * n / count for n in range(count)]
    return [[centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)]
            for angle in angles]


def _mask(shape: Dict[str, Any], points: Sequence[Sequence[float]], size: Tuple[int, int],
          where: str, problems: Problems) -> Optional[Outline]:
    """A drawn mask: a PNG in base64, its upper left corner at the first point."""
    try:
        data = base64.b64decode(shape.get("mask") or "", validate=True)
        part = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (binascii.Error, ValueError, TypeError, cv2.error):
        part = None
    if part is None or not points:
        problems.add(f"{where}: its mask is not a PNG in base64 with a corner point")
        return None
    width, height = size
    full = np.zeros((height, width), np.uint8)
    left, top = (int(round(value)) for value in points[0])
    cut = part[max(-top, 0):max(height - top, 0), max(-left, 0):max(width - left, 0)]
    full[max(top, 0):max(top, 0) + cut.shape[0], max(left, 0):max(left, 0) + cut.shape[1]] = cut
    if not full.any():
        problems.add(f"{where}: its mask is empty or outside the image")
        return None
    return run_lengths(full > 0)


def _union(first: Outline, second: Outline, size: Tuple[int, int]) -> Outline:
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    masks = [_decode(outline, size) for outline in (first, second)]
    return run_lengths(masks[0] | masks[1])


def _decode(outline: Outline, size: Tuple[int, int]) -> np.ndarray:
    from pycocotools import mask as mask_utils

    runs = outline if isinstance(outline, dict) else mask_utils.merge(
        mask_utils.frPyObjects(outline, size[1], size[0]))
    return mask_utils.decode(runs)
