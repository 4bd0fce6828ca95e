"""Parse an annotation file into flat columns without ever holding it as Python objects.

`json` builds a dict per annotation and a float object per coordinate: several gigabytes for
COCO's training set. The hook here moves every annotation into typed arrays as soon as the parser
has read it, so that the peak is the file's text plus the columns. An outline or a box that is none
is told from one that is missing; whether they fit their image and each other is judged by
`data.annotations.defects`.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Tuple

import numpy as np
from pycocotools import mask as mask_utils

from utils.errors import UserError, first_line
from utils.files import GUESSED, GUESSED_ENCODING, refuse_endless, unicode_encoding

ImageRecord = Tuple[Any, Any, Any, Any]
"""id, file_name, width, height of one image record, unchecked."""

_IMAGE_KEYS = ("id", "file_name", "width", "height")
_BEGINNING = 4096
"""Letters that show whether a file may be JSON."""
_PIECE = 1 << 24
"""Letters that are read at once."""
_COUNTS = re.compile(rb"(?:[P-o]{0,6}[0-O])+")
"""Well-formed compressed counts: 2^32 needs 7 characters, of which the last one is below P."""


@dataclass
class Columns:
    """What `read_columns` collects; row n of each column is annotation n of the file."""

    images: list[ImageRecord]
    """In file order."""
    categories: list[Any]
    """The file's `categories` as parsed."""
    ids: np.ndarray
    """int64 `[n, 4]`: annotation id, image id, category id, iscrowd."""
    boxes: np.ndarray
    """float64 `[n, 4]`, x y width height in pixels; zeros where none is given, NaN where it is not
    four finite numbers."""
    bad_parts: np.ndarray
    """int32 `[n]`, polygons left out because they are not x, y pairs of 3 points; 1 for an outline
    of another kind that is none."""
    polygon_lengths: np.ndarray
    """int64 `[n]`, numbers of each annotation in `coordinates`; 0: it has no polygons."""
    coordinates: np.ndarray
    """float32, x, y of all polygons; between two of one annotation stands a point of NaN."""
    rle_lengths: np.ndarray
    """int64 `[n]`, bytes of each annotation in `rle_bytes`; 0: it has no RLE."""
    rle_sizes: np.ndarray
    """int64 `[n, 2]`, height and width of each RLE, as it says itself."""
    rle_bytes: np.ndarray
    """uint8, compressed counts of all RLEs one after the other; no number is cut off."""
    notes: list[str]
    """Sentences about the file's text."""


class _Collector:
    """`object_hook` of the JSON parser: swallows annotations, shrinks image records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids, self.boxes, self.bad_parts = array("q"), array("d"), array("i")
        self.polygon_lengths, self.coordinates = array("q"), array("f")
        self.rle_lengths, self.rle_sizes, self.rle_bytes = array("q"), array("q"), array("B")

    @property
    def rows(self) -> int:
        """Annotations so far."""
        return len(self.bad_parts)

    def columns(self, images: list[ImageRecord], categories: list[Any],
                notes: list[str]) -> Columns:
        """What was collected, as NumPy arrays that share its memory."""
        return Columns(
            images, categories, ids=np.asarray(self.ids).reshape(-1, 4),
            boxes=np.asarray(self.boxes).reshape(-1, 4), bad_parts=np.asarray(self.bad_parts),
            polygon_lengths=np.asarray(self.polygon_lengths),
            coordinates=np.asarray(self.coordinates), rle_lengths=np.asarray(self.rle_lengths),
            rle_sizes=np.asarray(self.rle_sizes).reshape(-1, 2),
            rle_bytes=np.asarray(self.rle_bytes), notes=notes)

    def __call__(self, record: dict[str, Any]) -> Any:
        # Some tools repeat image_id in image records or attributes, and file_name in annotations.
        if "image_id" in record and "category_id" in record:
            return self._annotation(record)
        if "file_name" in record and "id" in record:
            return tuple(record.get(key) for key in _IMAGE_KEYS)
        return record

    def _annotation(self, record: dict[str, Any]) -> int:
        """Append one annotation to the columns; return its row, which replaces it in the list."""
        try:
            self.ids.extend((record["id"], record["image_id"], record["category_id"],
                             record.get("iscrowd", 0)))
        except (KeyError, TypeError, OverflowError):
            raise _bad_ids(self.path, record) from None
        box = _numbers("d", record.get("bbox") or (0, 0, 0, 0))
        self.boxes.extend(box if len(box) == 4 else (np.nan,) * 4)
        self._outline(record.get("segmentation"))
        return self.rows - 1

    def _outline(self, segmentation: Any) -> None:
        size, counts, bad = [0, 0], b"", 0
        start = len(self.coordinates)
        if isinstance(segmentation, list):
            bad = self._polygons(segmentation)
        elif segmentation:
            size, counts = _compressed(segmentation)
            bad = int(not counts)
        self.bad_parts.append(bad)
        self.polygon_lengths.append(len(self.coordinates) - start)
        self.rle_sizes.extend(size)
        self.rle_lengths.append(len(counts))
        self.rle_bytes.frombytes(counts)

    def _polygons(self, parts: list[Any]) -> int:
        """Append the polygons that are some; return how many are not."""
        coordinates, bad = self.coordinates, 0
        start = len(coordinates)
        for part in parts:
            points = polygon_points(part)
            if not points:
                bad += part != []
                continue
            if len(coordinates) > start:
                coordinates.extend((np.nan, np.nan))
            coordinates.extend(points)
        return bad


def polygon_points(part: Any) -> array[float]:
    """x, y of a polygon as float32; an empty array where it is none."""
    points = _numbers("f", part)
    return points if len(points) >= 6 and len(points) % 2 == 0 else array("f")


def _numbers(typecode: str, values: Any) -> array[float]:
    """`values` as an array; an empty one where they are not a list of finite numbers."""
    try:
        return array(typecode, values if math.isfinite(sum(values)) else ())
    except (TypeError, OverflowError):
        return array(typecode)


def _compressed(rle: Any) -> tuple[list[int], bytes]:
    """Size and compressed counts of an RLE; zeros and no counts where it is none."""
    size, counts = (rle.get("size"), rle.get("counts")) if isinstance(rle, dict) else (None, None)
    if not isinstance(size, list) or len(size) != 2 or not all(
            type(side) is int and 0 < side < 2 ** 31 for side in size):
        return [0, 0], b""
    if isinstance(counts, list) and all(type(run) is int and 0 <= run < 2 ** 32 for run in counts):
        counts = mask_utils.frPyObjects({"counts": counts, "size": size}, *size)["counts"]
    elif isinstance(counts, str):
        counts = counts.encode("utf-8", "surrogatepass")
    if isinstance(counts, bytes) and _COUNTS.fullmatch(counts):
        return size, counts
    return [0, 0], b""


def is_id(value: Any) -> bool:
    """Whether a value can be an id: a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 63


def _bad_ids(path: Path, record: dict[str, Any]) -> UserError:
    """Say which of the four integers of an annotation is missing or not an integer."""
    where = f"annotation {record.get('id')!r} (image_id {record['image_id']!r})"
    if "score" in record and "id" not in record:
        return UserError(f"{path}: {where} has a score and no id; the file looks like results of a "
                         "network, expected the annotations that these are scored with")
    if "category_id" not in record:
        kind = "captions" if "caption" in record else \
            "panoptic segmentation" if "segments_info" in record else "something else"
        return UserError(f"{path}: {where} has no category_id; the file looks like {kind}, "
                         "expected COCO instances such as instances_train2017.json")
    for key in ("id", "image_id", "category_id", "iscrowd"):
        value = record.get(key, 0 if key == "iscrowd" else None)
        if not is_id(value) and not isinstance(value, bool):
            expected = ("0 or 1" if key == "iscrowd" else
                        "an integer (64 bit); write ids as whole numbers without quotes")
            return UserError(f"{path}: {where} has {key} {value!r}, expected {expected}")
    raise AssertionError("four good integers were refused")


def read_columns(path: Path) -> Columns:
    """Read the COCO instances file `path`; test-dev's image_info has no `annotations`.

    Raises:
        UserError: the file is missing, is not JSON, is not COCO, or has ids that are not integers.
    """
    collector = _Collector(path)
    notes: list[str] = []
    document = _parse(path, read_json_text(path, notes), collector)
    if not isinstance(document, dict):
        hint = " (a results file?)" if isinstance(document, list) and collector.rows else ""
        raise UserError(f"{path}: the top level of the JSON is a {type(document).__name__}{hint}, "
                        "expected a COCO object with images, annotations and categories")
    for key in ("images", "categories", "annotations"):
        if key not in document and key != "annotations":
            found = ", ".join(repr(str(name)) for name in list(document)[:5]) or "nothing"
            raise UserError(f"{path}: not a COCO annotation file: it has no '{key}'; found "
                            f"{found}; expected images, annotations and categories")
        if not isinstance(document.get(key, []), list):
            raise UserError(f"{path}: '{key}' is a {type(document[key]).__name__}, expected a list")
    _check_rows(path, document.get("annotations", []), collector.rows)
    for number, record in enumerate(document["images"]):
        if not isinstance(record, tuple):
            name = record.get("id") if isinstance(record, dict) else record
            raise UserError(f"{path}: image {name!r} (number {number} in the list) has no "
                            "file_name; every image needs an id and a file_name")
    return collector.columns(document["images"], document["categories"], notes)


def _check_rows(path: Path, annotations: list[Any], rows: int) -> None:
    """Every entry of `annotations` has to be an annotation, and none may hide elsewhere."""
    if annotations == list(range(rows)):
        return
    for number, entry in enumerate(annotations):
        if isinstance(entry, dict) and "image_id" in entry:
            raise _bad_ids(path, entry)
        if isinstance(entry, dict):
            raise UserError(f"{path}: annotation {entry.get('id')!r} (number {number} in the list) "
                            "has no image_id; every annotation needs one")
        if entry != number:
            break
    raise UserError(f"{path}: 'annotations' does not hold exactly the file's annotations; expected "
                    "a flat list of objects with id, image_id and category_id")


def begins_as_json(path: Path) -> bool:
    """Whether a file may be JSON; else it is not read to its end."""
    try:
        refuse_endless(path)
        with open(str(path), "rb") as stream:
            start = stream.read(_BEGINNING)
    except (OSError, ValueError):
        return False
    text = start.decode(unicode_encoding(start), "replace").lstrip("\ufeff \t\r\n")
    return text[:1] in ("", "{", "[")


def ends_as_json(path: Path) -> bool:
    """Whether a file that begins as JSON ends so, too: it was not cut off, nor filled with NULs."""
    with open(str(path), "rb") as stream:
        encoding = unicode_encoding(stream.read(4))
        last = max(os.path.getsize(str(path)) - _BEGINNING, 0)
        stream.seek(last - last % 4)
        return stream.read().decode(encoding, "replace").rstrip()[-1:] in ("}", "]")


def read_json_text(path: Path, notes: list[str] | None = None) -> str:
    """Text of an annotation file, in UTF-8, UTF-16 or a Chinese Windows' encoding; that it is in
    the last goes to `notes`, for others look the same.

    Raises:
        UserError: it is missing, cannot be read, or none of these.
    """
    if not os.path.exists(str(path)):
        raise UserError(f"annotation file not found: looked for {path.absolute()}")
    if os.path.isdir(str(path)):
        raise UserError(f"{path.absolute()} is a folder, expected a COCO annotation file (.json)")
    length = -1 if begins_as_json(path) else _BEGINNING
    try:
        refuse_endless(path)
        with open(str(path), "rb") as beginning:
            encoding = unicode_encoding(beginning.read(4))
        try:
            text = _text(path, encoding, length)
        except UnicodeDecodeError:
            text = _text(path, GUESSED_ENCODING, length)
            if notes is not None:
                notes.append(f"{path}: {GUESSED}")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (not UTF-8), expected COCO annotations as "
                        "JSON") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty, expected COCO annotations as JSON")
    return text


def _text(path: Path, encoding: str, length: int) -> str:
    """The first `length` letters of a file; all of it, if that is -1, but no further than a NUL,
    which JSON does not have: a sparse file of some bytes has gigabytes of them.
    """
    with open(str(path), encoding=encoding) as stream:
        pieces = [stream.read(_PIECE if length < 0 else length)]
        while pieces[-1] and length < 0 and "\0" not in pieces[-1]:
            pieces.append(stream.read(_PIECE))
    return "".join(pieces)


def _parse(path: Path, text: str, collector: _Collector) -> Any:
    try:
        return json.loads(text, object_hook=collector)
    except json.JSONDecodeError as error:
        hint = " (a Git LFS pointer: fetch the real file with `git lfs pull`)" \
            if text.startswith("version https://git-lfs") else ""
        raise UserError(f"{path}: not JSON ({error.msg} at line {error.lineno}, column "
                        f"{error.colno}){hint}, expected a complete COCO annotation file; download "
                        "or export it again") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise UserError(f"{path}: cannot be read as a COCO annotation file: {first_line(error)}"
                        ) from None
