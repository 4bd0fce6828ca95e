"""The Semantic Boundaries Dataset as it is published: MATLAB files beside the images.

    img/A.jpg  inst/A.mat  train.txt  val.txt

Format: MAT-File Format, level 5, The MathWorks. What these files use of it is read here: SciPy,
which reads all of it, is large, and nothing else here needs it.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

from data.classes import known_classes
from data.tools.conversion import Conversion, Found, FoundImage, open_image, run_lengths
from data.tools.source_files import by_stem, list_files, listed_stems
from utils.errors import UserError
from utils.files import read_whole

CLASSES = known_classes("pascal_sbd").names
_VARIABLE = "GTinst"
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_STRUCT = 2  # class of an array
_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_MOST_BYTES = 1 << 28


def is_sbd_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are laid out as those of SBD."""
    return (folder / "img").is_dir() and any(
        path.suffix.lower() == ".mat" and path.parent == folder / "inst" for path in files)


def read_sbd(folder: Path, conversion: Conversion) -> Found:
    """Images with objects of each list; all as `train` where there is no train.txt."""
    known = by_stem(list_files(folder / "img"))
    files = by_stem(list_files(folder / "inst", (".mat",)))
    if not files:
        raise UserError(f"{folder.absolute()}: no inst/*.mat; give the folder that holds img and "
                        "inst")
    splits: dict[str, list[FoundImage]] = {}
    for split, stems in (listed_stems([folder]) or {"train": sorted(files)}).items():
        splits[split] = []
        for stem in stems:
            with conversion.left_out():
                for place, there in ((folder / "img", known), (folder / "inst", files)):
                    if stem not in there:
                        raise UserError(f"{place}: '{stem}' of the {split} list was not found")
                splits[split].append(_image(known[stem], files[stem]))
    return Found(splits, CLASSES)


def _image(path: Path, file: Path) -> FoundImage:
    try:
        fields = _read(read_whole(file))
        numbers, labels = fields["Segmentation"], fields["Categories"].ravel().tolist()
        height, width = numbers.shape
    except (OSError, KeyError, ValueError, IndexError, struct.error, zlib.error) as problem:
        raise UserError(f"{file}: is no file of instances as SBD has them (a MAT-file with "
                        f"{_VARIABLE}.Segmentation and .Categories): {problem!r}") from None
    image = open_image(path, str(file), (width, height))
    for number, label in enumerate(labels, 1):
        where = f"{file}: instance {number}"
        mask = numbers == number
        if not 1 <= label <= len(CLASSES) or not mask.any():
            raise UserError(f"{where}: has the category {label:g} and {int(mask.sum())} pixels, "
                            f"expected one of 1 to {len(CLASSES)}, and pixels")
        image.add(CLASSES[int(label) - 1], run_lengths(mask), where)
    return image


def _read(data: bytes) -> dict[str, np.ndarray]:
    """The numbers in the fields of the file's structure."""
    for kind, content in _elements(data[_HEADER:]):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(content, _MOST_BYTES)
            kind, content = next(_elements(unpacked), (kind, b""))
        if kind != _MATRIX:
            continue
        parts = list(_elements(content))
        if parts[0][1][0] == _STRUCT and parts[2][1].decode("ascii", "replace") == _VARIABLE:
            size = struct.unpack("<i", parts[3][1][:4])[0]
            text = parts[4][1]
            names = [text[n:n + size].split(b"\0")[0].decode("ascii", "replace")
                     for n in range(0, len(text), max(size, 1))]
            fields = zip(names, [element for _, element in parts[5:]])
            return {name: _numbers(element) for name, element in fields
                    if name in ("Segmentation", "Categories")}
    raise KeyError(_VARIABLE)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of the elements that stand one after the other."""
    place = 0
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, place)
        if kind >> 16:  # up to four bytes stand in the tag itself
            yield kind & 0xffff, data[place + 4:place + 4 + (kind >> 16)]
            place += 8
        else:
            yield kind, data[place + 8:place + 8 + size]
            place += 8 + size + (0 if kind == _COMPRESSED else -size % 8)


def _numbers(matrix: bytes) -> np.ndarray:
    """An array of numbers."""
    parts = list(_elements(matrix))
    kind, content = parts[3]
    shape = np.frombuffer(parts[1][1], "<i4").tolist()
    return np.frombuffer(content, _TYPES[kind]).reshape(shape, order="F")
