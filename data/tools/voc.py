"""Pascal VOC: an XML file for each image, masks as PNG files in SegmentationObject."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple
from xml.etree import ElementTree

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

_VOID = 255
_FITS = 0.3
"""IoU of an object's box and an instance's extent from which the instance may be its mask."""
_LIST_FOLDERS = ("ImageSets/Segmentation", "ImageSets/Main")


def read_voc(folder: Path, problems: Problems, boxes_as_masks: bool,
             images_folder: Optional[Path] = None) -> Dict[str, List[FoundImage]]:
    """Images with objects of each split; all as `train` where ImageSets has no train.txt.

    Masks come from SegmentationObject, else from a polygon in the XML, else, with
    `boxes_as_masks`, from the box.
    """
    annotations = folder / "Annotations"
    if not annotations.is_dir():
        raise UserError(f"{folder.absolute()}: no folder Annotations; give the folder that holds "
                        "Annotations, JPEGImages and SegmentationObject")
    images_folder = images_folder or folder / "JPEGImages"
    if not images_folder.is_dir():
        raise UserError(f"image folder not found: {images_folder.absolute()}; name it with "
                        "--images")
    known = {path.stem: path for path in list_images(images_folder)}
    files = {path.stem: path for path in annotations.glob("*.xml")}
    if not files:
        raise UserError(f"{annotations}: no XML files")
    splits = {}
    for split, stems in _lists(folder, sorted(files)).items():
        images = []
        for stem in stems:
            if stem not in files:
                problems.add("{}: image '{}' of the {} list has no annotation".format(
                    annotations / (stem + ".xml"), stem, split))
                continue
            image = _image(files[stem], known, folder, problems, boxes_as_masks)
            images += [] if image is None else [image]
        splits[split] = images
    return splits


def _lists(folder: Path, stems: Sequence[str]) -> Dict[str, List[str]]:
    for name in _LIST_FOLDERS:
        if (folder / name / "train.txt").is_file():
            found = {}
            for split in ("train", "val"):
                path = folder / name / (split + ".txt")
                lines = read_text(path).splitlines() if path.is_file() else []
                if lines:
                    found[split] = [line.split()[0] for line in lines if line.strip()]
            return found
    return {"train": list(stems)}


def _image(file: Path, known: Dict[str, Path], folder: Path, problems: Problems,
           boxes_as_masks: bool) -> Optional[FoundImage]:
    try:
        root = ElementTree.fromstring(read_text(file).encode("utf-8"))
    except ElementTree.ParseError as problem:
        problems.add(f"{file}: not XML: {problem}")
        return None
    name = Path((root.findtext("filename") or "").replace("\\", "/")).stem
    path = known.get(name) or known.get(file.stem)
    if path is None:
        problems.add("{}: its image '{}' was not found".format(
            file, root.findtext("filename") or file.stem))
        return None
    given = tuple(_number(root.findtext("size/" + side)) for side in ("width", "height"))
    size = picture_size(path, str(file), problems, given)
    if size is None:
        return None
    if given not in (size, (0, 0), (None, None)):
        problems.add("{}: says {:g} x {:g} pixels, but {} has {} x {}".format(
            file, given[0] or 0, given[1] or 0, path, *size))
        return None
    objects = _objects(file, root, folder / "SegmentationObject" / (path.stem + ".png"), size,
                       problems, boxes_as_masks)
    return FoundImage(path, size[0], size[1], objects)


def _objects(file: Path, root: ElementTree.Element, mask_file: Path, size: Tuple[int, int],
             problems: Problems, boxes_as_masks: bool) -> List[FoundObject]:
    listed = []
    for number, node in enumerate(root.findall("object"), 1):
        name = (node.findtext("name") or "").strip()
        where = f"{file}: object {number} ('{name}')"
        box = [_number(node.findtext("bndbox/" + key)) for key in ("xmin", "ymin", "xmax", "ymax")]
        corners = [value for value in box if value is not None]
        if not name or len(corners) < 4 or corners[2] < corners[0] or corners[3] < corners[1]:
            problems.add(f"{where}: needs a name and a bndbox with xmin, ymin, xmax, ymax")
            continue
        # VOC counts pixels from 1 and includes the last one.
        listed.append((node, name, where, [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]))
    if not mask_file.is_file():
        outlines: List[Optional[Outline]] = [
            _drawn(node, box, size, where, problems, boxes_as_masks, mask_file)
            for node, _, where, box in listed]
    else:
        outlines = _masks(mask_file, [box for _, _, _, box in listed],
                          [where for _, _, where, _ in listed], size, problems)
    return [FoundObject(name, outline, where)
            for (_, name, where, _), outline in zip(listed, outlines) if outline is not None]


def _drawn(node: ElementTree.Element, box: Sequence[float], size: Tuple[int, int], where: str,
           problems: Problems, boxes_as_masks: bool, mask_file: Path) -> Optional[Outline]:
    """Outline from the XML alone: its polygon (x1, y1, x2, ...), or the box where allowed."""
    points: List[List[Optional[float]]] = []
    drawn = node.find("polygon")
    while drawn is not None:
        point = [_number(drawn.findtext(axis + str(len(points) + 1))) for axis in "xy"]
        if None in point:
            break
        points.append(point)
    if not points and not boxes_as_masks:
        problems.add(f"{where}: has a box only ({mask_file} does not exist), but masks are "
                     "learned; add masks, or take boxes as masks with --boxes_as_masks")
        return None
    corners = points or rectangle(*box)
    flat = polygon(corners, size[0], size[1], where, problems)
    return None if flat is None else [flat]


def _masks(file: Path, boxes: Sequence[Sequence[float]], wheres: Sequence[str],
           size: Tuple[int, int], problems: Problems) -> List[Optional[Outline]]:
    """The instance of each object: number n for object n as VOC has it, else by its box."""
    numbers = _instances(file, size, problems)
    if numbers is None:
        return [None] * len(boxes)
    present = [int(n) for n in np.unique(numbers) if n not in (0, _VOID)]
    extents = [_extent(numbers == n) for n in present]
    overlap = np.array([[_iou(box, extent) for extent in extents] for box in boxes])
    overlap = overlap.reshape(len(boxes), len(present))
    chosen = _assign(overlap, present)
    for n, where in enumerate(wheres):
        if n not in chosen:
            problems.add(f"{where}: no instance of {file} fits its box")
    left = [number for n, number in enumerate(present) if n not in chosen.values()]
    if left:
        problems.add(f"{file}: instance {left[0]} fits no object of the XML file")
    return [run_lengths(numbers == present[chosen[n]]) if n in chosen else None
            for n in range(len(boxes))]


def _assign(overlap: np.ndarray, present: Sequence[int]) -> Dict[int, int]:
    """Index of the instance for each object that has one, by falling IoU."""
    in_order = {n: n for n in range(len(overlap))}
    if list(present) == list(range(1, len(overlap) + 1)) and (overlap.diagonal() >= _FITS).all():
        return in_order
    chosen: Dict[int, int] = {}
    for flat in np.argsort(-overlap, axis=None, kind="stable").tolist():
        row, column = divmod(flat, overlap.shape[1])
        if overlap[row, column] < _FITS:
            break
        if row not in chosen and column not in chosen.values():
            chosen[row] = column
    return chosen


def _instances(file: Path, size: Tuple[int, int], problems: Problems) -> Optional[np.ndarray]:
    """Instance number of each pixel `[h, w]`; a picture in VOC's colours is read back."""
    from PIL import Image

    try:
        with Image.open(str(file)) as image:
            if image.mode in ("P", "L"):
                numbers = np.array(image)
            else:
                colors = np.array(image.convert("RGB")).astype(np.int64)
                numbers = _from_colors(colors @ np.array([65536, 256, 1]))
    except (OSError, ValueError):
        problems.add(f"{file}: is not an image that can be read")
        return None
    if numbers.shape != size[::-1]:
        problems.add("{}: has {} x {} pixels, its image {} x {}".format(
            file, numbers.shape[1], numbers.shape[0], *size))
        return None
    return numbers


def _from_colors(colors: np.ndarray) -> np.ndarray:
    palette = {}
    for number in range(256):
        color = 0
        for bit in range(8):
            for channel, shift in enumerate((16, 8, 0)):
                color |= (number >> (3 * bit + channel) & 1) << (7 - bit) << shift
        palette[color] = number
    values, index = np.unique(colors, return_inverse=True)
    return np.array([palette.get(int(value), _VOID) for value in values])[index].reshape(
        colors.shape)


def _extent(mask: np.ndarray) -> List[float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _iou(box: Sequence[float], other: Sequence[float]) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return shared / (areas - shared) if areas > shared else 0.0


def _number(text: Optional[str]) -> Optional[float]:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
