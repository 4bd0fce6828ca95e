"""Pascal VOC: masks as PNG files in SegmentationObject, with an XML file for each image.

Where there is none, SegmentationClass says what the objects are, by the colours of CVAT's
labelmap.txt ("Segmentation mask"), or by the numbers of labelme2voc's class_names.txt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, List, Sequence, Tuple
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as mask_utils

from data.tools.conversion import (
    Conversion,
    Found,
    FoundImage,
    Outline,
    number,
    open_image,
    polygon,
    rectangle,
    run_lengths,
)
from data.tools.source_files import by_stem, list_files, listed_stems, read_pixels
from utils.errors import UserError, counted

_VOID = 255
_VOID_COLOUR = 0xE0E0C0
_LABEL_FILES = ("labelmap.txt", "class_names.txt")
_NO_CLASS = ("background", "_background_", "__ignore__")
_FITS = 0.3
"""IoU of an object's box and an instance's extent from which the instance may be its mask."""
_LIST_FOLDERS = ("ImageSets/Segmentation", "ImageSets/Main")

Listed = Tuple[ElementTree.Element, str, str, List[float]]
"""An object's element, its name, its place for sentences, and its box x1 y1 x2 y2 in pixels."""


def is_voc_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are laid out as those of Pascal VOC."""
    if (folder / "JPEGImages").is_dir() and any(
            path.suffix.lower() == ".xml" and folder / "Annotations" in path.parents
            for path in files):
        return True
    return (folder / "SegmentationObject").is_dir() and any(
        (folder / name).is_file() for name in _LABEL_FILES)


def read_voc(folder: Path, conversion: Conversion) -> Found:
    """Images with objects of each split; all as `train` where ImageSets has no train.txt.

    Masks come from SegmentationObject, else from a polygon in the XML, else, with
    `boxes_as_masks`, from the box.
    """
    annotations, images_folder = folder / "Annotations", folder / "JPEGImages"
    files = by_stem(list_files(annotations, (".xml",)))
    labels = {} if files else _labels(folder, conversion)
    for place in (images_folder,) if labels else (annotations, images_folder):
        if not place.is_dir():
            raise UserError(f"{folder.absolute()}: no folder {place.name}; give the folder that "
                            "holds JPEGImages, SegmentationObject, and Annotations (or "
                            f"SegmentationClass and {_LABEL_FILES[0]})")
    known = by_stem(list_files(images_folder))
    if labels:
        annotations = folder / "SegmentationObject"
        files = by_stem(list_files(annotations, (".png",)))
    if not files:
        raise UserError(f"{annotations}: no {'PNG' if labels else 'XML'} files")
    splits: dict[str, list[FoundImage]] = {}
    listed = listed_stems([folder / name for name in _LIST_FOLDERS])
    unmarked = 0 if listed else len(set(known) - set(files))
    for split, stems in (listed or {"train": sorted(files)}).items():
        splits[split] = []
        for stem in stems:
            with conversion.left_out():
                if stem not in files:
                    raise UserError(f"{annotations / stem}: image '{stem}' of the {split} list has "
                                    "no annotation")
                splits[split].append(
                    _masked_image(files[stem], known, folder, labels, conversion) if labels
                    else _image(files[stem], known, folder, conversion))
    if unmarked:
        conversion.notes.append(f"left out: {counted(unmarked, 'image')} without an annotation")
    names = dict.fromkeys(name for name in labels.values() if name not in _NO_CLASS)
    return Found(splits, list(names))


def _labels(folder: Path, conversion: Conversion) -> dict[int, str]:
    """Names of classes by their values in SegmentationClass; empty where no file has them."""
    coloured, numbered = (folder / name for name in _LABEL_FILES)
    if not coloured.is_file():
        lines = conversion.text(numbered).splitlines() if numbered.is_file() else []
        return {number: line.strip() for number, line in enumerate(lines) if line.strip()}
    found: dict[int, str] = {}
    for position, line in enumerate(conversion.text(coloured).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            match = re.match(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(:|$)", line.strip())
            if not match:
                raise UserError(f"{coloured}: line {position} is '{line[:60]}', expected "
                                "NAME:RED,GREEN,BLUE::")
            red, green, blue = (int(text) for text in match.groups()[1:4])
            name = found.setdefault(red << 16 | green << 8 | blue, match.group(1))
            if name != match.group(1) and not {name, match.group(1)} & set(_NO_CLASS):
                raise UserError(f"{coloured}: '{name}' and '{match.group(1)}' have the same colour")
    return found


def _image(file: Path, known: dict[str, Path], folder: Path, conversion: Conversion) -> FoundImage:
    root = _parse(file, conversion)
    if root.tag.lower() != "annotation":
        raise UserError(f"{file}: begins with <{root.tag[:60]}>, expected <annotation> as VOC has "
                        "it")
    name = Path((root.findtext("filename") or "").replace("\\", "/")).stem
    path = known.get(file.stem) or known.get(name)  # files are renamed, what is in them is not
    if path is None:
        raise UserError(f"{file}: its image '{root.findtext('filename') or file.stem}' was not "
                        "found")
    width, height = (number(root.findtext("size/" + side)) or None for side in ("width", "height"))
    image = open_image(path, str(file), (width, height))
    listed: list[Listed] = []
    for position, node in enumerate(root.findall("object"), 1):
        with conversion.left_out():
            listed.append(_listed(file, position, node))
    mask_file = folder / "SegmentationObject" / (path.stem + ".png")
    with conversion.left_out():
        found = _masks(mask_file, listed, image, conversion) if mask_file.is_file() else {}
        for n, (node, name, where, box) in enumerate(listed):
            with conversion.left_out():
                outline = found.get(n) if mask_file.is_file() else _drawn(
                    node, box, image, where, conversion.boxes_as_masks, mask_file)
                if outline is None:
                    raise UserError(f"{where}: no instance of {mask_file} fits its box")
                image.add(name, outline, where)
    return image


def _masked_image(file: Path, known: dict[str, Path], folder: Path, labels: dict[int, str],
                  conversion: Conversion) -> FoundImage:
    """An image whose objects are in `file`, and what they are in the same file of
    SegmentationClass.
    """
    if file.stem not in known:
        raise UserError(f"{file}: its image was not found in JPEGImages")
    place = folder / "SegmentationClass" / file.relative_to(folder / "SegmentationObject")
    source = next(folder / name for name in _LABEL_FILES if (folder / name).is_file())
    numbers, classes = (_values(path, source.name == _LABEL_FILES[0]) for path in (file, place))
    image = open_image(known[file.stem], str(file), numbers.shape[::-1])
    if classes.shape != numbers.shape:
        raise UserError(f"{place}: has {classes.shape[1]} x {classes.shape[0]} pixels, {file} "
                        f"{numbers.shape[1]} x {numbers.shape[0]}")
    for value in np.unique(numbers[numbers > 0]).tolist():
        with conversion.left_out():
            mask = numbers == value
            within, counts = np.unique(classes[mask], return_counts=True)
            kind, where = int(within[counts.argmax()]), f"{file}: object {_shown(value)}"
            if labels.get(kind, _NO_CLASS[0]) in _NO_CLASS:
                raise UserError(f"{where}: has {_shown(kind)} in {place}, which is no class of "
                                f"{source}")
            image.add(labels[kind], run_lengths(mask), where)
    return image


def _shown(value: int) -> str:
    return f"#{value:06x}" if value > _VOID else str(value)


def _values(file: Path, palette: bool = False) -> np.ndarray:
    """Numbers `[h, w]` of a mask, 0 where there is nothing or a border; colours are 0xrrggbb.

    `palette`: numbers stand for colours, too, where the file gives them.
    """
    opened = read_pixels(file)
    if len(opened.getbands()) > 1 or palette and opened.mode == "P":
        values = np.asarray(opened.convert("RGB"), np.int64) @ np.array([1 << 16, 1 << 8, 1])
        return np.where(values == _VOID_COLOUR, 0, values)
    values = np.array(opened)
    return np.where(values == _VOID, 0, values)


def _parse(file: Path, conversion: Conversion) -> ElementTree.Element:
    try:
        return ElementTree.parse(str(file)).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError):
        try:
            return ElementTree.fromstring(conversion.text(file))  # in a Chinese encoding
        except (ElementTree.ParseError, ValueError) as problem:
            raise UserError(f"{file}: not XML: {problem}") from None


def _listed(file: Path, position: int, node: ElementTree.Element) -> Listed:
    name = (node.findtext("name") or "").strip()
    where = f"{file}: object {position} ('{name}')"
    box = [number(node.findtext("bndbox/" + key)) for key in ("xmin", "ymin", "xmax", "ymax")]
    x1, y1, x2, y2 = (0.0 if value is None else value for value in box)
    if not name or None in box or x2 < x1 or y2 < y1:
        raise UserError(f"{where}: needs a name and a bndbox with xmin, ymin, xmax, ymax")
    return node, name, where, [x1 - 1, y1 - 1, x2, y2]  # VOC counts from 1, the last one included


def _drawn(node: ElementTree.Element, box: Sequence[float], image: FoundImage, where: str,
           boxes_as_masks: bool, mask_file: Path) -> Outline:
    """Outline from the XML alone: its polygons (x1, y1, x2, ...), or the box where allowed."""
    parts: list[Any] = []
    for drawn in node.findall("polygon"):
        points = [[number(drawn.findtext(f"{axis}{n + 1}")) for axis in "xy"]
                  for n in range(len(drawn) // 2)]
        if len(drawn) % 2 or any(None in point for point in points):
            raise UserError(f"{where}: a polygon that is not x1, y1, x2, y2, .. as numbers")
        parts += polygon(points, image.size, where)
    if not parts and not boxes_as_masks:
        raise UserError(f"{where}: has a box only ({mask_file} does not exist), but masks are "
                        "learned; add masks, or let data.convert take boxes: --boxes_as_masks")
    return parts or polygon(rectangle(*box), image.size, where)


def _masks(file: Path, listed: Sequence[Listed], image: FoundImage,
           conversion: Conversion) -> dict[int, Outline]:
    """The instance of each object by its index: number n + 1 for object n, where their boxes agree.

    Numbers in another order are taken by the boxes alone.
    """
    numbers = _values(file)
    if numbers.shape != image.size[::-1]:
        raise UserError(f"{file}: has {numbers.shape[1]} x {numbers.shape[0]} pixels, its image "
                        f"{image.size[0]} x {image.size[1]}")
    left = {int(n): run_lengths(numbers == n) for n in np.unique(numbers[numbers > 0])}
    chosen: dict[int, Outline] = {}
    for n, (_, _, _, (x1, y1, x2, y2)) in enumerate(listed):
        fits = {number: mask_utils.iou([mask_utils.toBbox(mask)], [[x1, y1, x2 - x1, y2 - y1]],
                                       [0])[0, 0] for number, mask in left.items()}
        best = n + 1 if fits.get(n + 1, 0) >= _FITS else max(fits, key=fits.__getitem__, default=0)
        if fits.get(best, 0) >= _FITS:
            chosen[n] = left.pop(best)
    if left and len(chosen) == len(listed):
        with conversion.left_out():
            raise UserError(f"{file}: instance {_shown(min(left))} fits no object of the XML file")
    return chosen
