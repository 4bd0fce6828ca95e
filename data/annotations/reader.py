"""Parse an annotation file into flat columns without ever holding it as Python objects.

`json` builds a dict per annotation and a float object per coordinate: several gigabytes for
COCO's training set. The hook here moves every annotation into typed arrays as soon as the parser
has read it, so that the peak is the file's text plus the columns. Nothing is judged here except
what makes a file unreadable as COCO instances; `data.annotations` judges the columns.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from pycocotools import mask as mask_utils

from utils.errors import UserError, first_line

BOX_GIVEN, BOX_MISSING, BOX_MALFORMED = 0, 1, 2
"""Values of `Columns.box_state`."""
OUTLINE_NONE, OUTLINE_POLYGONS, OUTLINE_RLE, OUTLINE_MALFORMED = 0, 1, 2, 3
"""Values of `Columns.outline`."""

ImageRecord = Tuple[Any, Any, Any, Any]
"""id, file_name, width, height of one image record, unchecked."""

_IMAGE_KEYS = ("id", "file_name", "width", "height")


def _column(typecode: str, width: int = 0) -> Any:
    """A field of `Columns`: the type its values are collected in, and values in a row."""
    return field(metadata={"typecode": typecode, "width": width})


@dataclass
class Columns:
    """What `read_columns` collects; row n of each column is annotation n of the file."""

    images: List[ImageRecord]
    """In file order."""
    categories: List[Any]
    """The file's `categories` as parsed."""
    ids: np.ndarray = _column("q", 4)
    """int64 `[n, 4]`: annotation id, image id, category id, iscrowd."""
    boxes: np.ndarray = _column("d", 4)
    """float64 `[n, 4]`, x y width height in pixels; NaN where `box_state` is not BOX_GIVEN."""
    box_state: np.ndarray = _column("B")
    outline: np.ndarray = _column("B")
    num_parts: np.ndarray = _column("i")
    """int32 `[n]`, polygons kept of the annotation; 1 for an RLE, else 0."""
    bad_parts: np.ndarray = _column("i")
    """int32 `[n]`, polygons left out because they are not x, y pairs of 3 points."""
    part_lengths: np.ndarray = _column("q")
    """int64, numbers in each polygon, polygons in file order (even, at least 6)."""
    coordinates: np.ndarray = _column("f")
    """float32, all polygons one after the other."""
    rle_sizes: np.ndarray = _column("q", 2)
    """int64 `[r, 2]`, height and width of each RLE, RLEs in file order."""
    rle_lengths: np.ndarray = _column("q")
    """int64 `[r]`, bytes of each RLE."""
    rle_bytes: np.ndarray = _column("B")
    """uint8, compressed counts of all RLEs one after the other."""


_COLUMNS = [column for column in fields(Columns) if column.metadata]


class _Collector:
    """`object_hook` of the JSON parser: swallows annotations, shrinks image records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.arrays = {column.name: array(column.metadata["typecode"]) for column in _COLUMNS}

    def columns(self, images: List[ImageRecord], categories: List[Any]) -> Columns:
        """What was collected, as NumPy arrays that share its memory."""
        found = {}
        for column in _COLUMNS:
            values, kind = self.arrays[column.name], np.dtype(column.metadata["typecode"])
            found[column.name] = np.frombuffer(values, kind) if len(values) else np.zeros(0, kind)
            if column.metadata["width"]:
                found[column.name] = found[column.name].reshape(-1, column.metadata["width"])
        return Columns(images, categories, **found)

    def __call__(self, record: Dict[str, Any]) -> Any:
        if "image_id" in record:
            return self._annotation(record)
        if "file_name" in record:
            return tuple(record.get(key) for key in _IMAGE_KEYS)
        return record

    def _annotation(self, record: Dict[str, Any]) -> int:
        """Append one annotation to the columns; return its row, which replaces it in the list."""
        try:
            self.arrays["ids"].extend((record["id"], record["image_id"], record["category_id"],
                             record.get("iscrowd", 0)))
        except (KeyError, TypeError, OverflowError):
            raise _bad_ids(self.path, record) from None
        self._box(record.get("bbox"))
        self._outline(record.get("segmentation"))
        row = self.rows
        self.rows += 1
        return row

    def _box(self, box: Any) -> None:
        length = len(self.arrays["boxes"])
        state = BOX_GIVEN
        if isinstance(box, list) and len(box) == 4:
            try:
                self.arrays["boxes"].extend(box)
            except (TypeError, OverflowError):
                state = BOX_MALFORMED
        else:
            state = BOX_MALFORMED if box else BOX_MISSING
        if state != BOX_GIVEN:
            del self.arrays["boxes"][length:]
            self.arrays["boxes"].extend((np.nan,) * 4)
        self.arrays["box_state"].append(state)

    def _outline(self, segmentation: Any) -> None:
        kept = bad = 0
        if isinstance(segmentation, list):
            kept, bad = self._polygons(segmentation)
            outline = OUTLINE_POLYGONS if kept else OUTLINE_MALFORMED if bad else OUTLINE_NONE
        elif isinstance(segmentation, dict) and segmentation:
            kept = int(self._rle(segmentation))
            outline = OUTLINE_RLE if kept else OUTLINE_MALFORMED
        else:
            outline = OUTLINE_MALFORMED if segmentation else OUTLINE_NONE
        self.arrays["outline"].append(outline)
        self.arrays["num_parts"].append(kept)
        self.arrays["bad_parts"].append(bad)

    def _polygons(self, parts: List[Any]) -> Tuple[int, int]:
        """Append the readable polygons; return how many were kept and how many were not."""
        kept = bad = 0
        coordinates = self.arrays["coordinates"]
        for part in parts:
            if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
                bad += part != []
                continue
            start = len(coordinates)
            try:
                coordinates.extend(part)
            except (TypeError, OverflowError):
                del coordinates[start:]
                bad += 1
                continue
            self.arrays["part_lengths"].append(len(part))
            kept += 1
        return kept, bad

    def _rle(self, rle: Dict[str, Any]) -> bool:
        """Append an RLE, compressed; return False where it is not one."""
        counts, size = rle.get("counts"), rle.get("size")
        if not isinstance(size, list) or len(size) != 2:
            return False
        if not all(type(side) is int and 0 < side < 2 ** 31 for side in size):
            return False
        if isinstance(counts, list):
            if not all(type(run) is int and 0 <= run < 2 ** 32 for run in counts):
                return False
            counts = mask_utils.frPyObjects({"counts": counts, "size": size}, *size)["counts"]
        elif isinstance(counts, str) and counts.isascii():
            counts = counts.encode("ascii")
        else:
            return False
        self.arrays["rle_sizes"].extend(size)
        self.arrays["rle_lengths"].append(len(counts))
        self.arrays["rle_bytes"].frombytes(counts)
        return True


def _bad_ids(path: Path, record: Dict[str, Any]) -> UserError:
    """Say which of the four integers of an annotation is missing or not an integer."""
    where = f"annotation {record.get('id')!r} (image_id {record['image_id']!r})"
    if "category_id" not in record:
        kind = "captions" if "caption" in record else \
            "panoptic segmentation" if "segments_info" in record else "something else"
        return UserError(f"{path}: {where} has no category_id; the file looks like {kind}, "
                         "expected COCO instances such as instances_train2017.json")
    for key in ("id", "image_id", "category_id", "iscrowd"):
        value = record.get(key, 0 if key == "iscrowd" else None)
        if not isinstance(value, int) or abs(value) >= 2 ** 63:
            expected = ("0 or 1" if key == "iscrowd" else
                        "an integer (64 bit); write ids as numbers without quotes")
            return UserError(f"{path}: {where} has {key} {value!r}, expected {expected}")
    raise AssertionError("four good integers were refused")


def read_columns(path: Path, require_annotations: bool = True) -> Columns:
    """Read the COCO instances file `path`.

    Args:
        path: a JSON file with `images`, `categories` and `annotations`.
        require_annotations: False accepts a file without `annotations` (test-dev's image_info).

    Raises:
        UserError: the file is missing, is not JSON, is not COCO, or has ids that are not integers.
    """
    collector = _Collector(path)
    document = _parse(path, _read_text(path), collector)
    if not isinstance(document, dict):
        hint = " (a results file?)" if isinstance(document, list) and collector.rows else ""
        raise UserError(f"{path}: the top level of the JSON is a {type(document).__name__}{hint}, "
                        "expected a COCO object with images, annotations and categories")
    for key in ("images", "categories", "annotations"):
        if key not in document and (key != "annotations" or require_annotations):
            found = ", ".join(repr(str(name)) for name in list(document)[:5]) or "nothing"
            raise UserError(f"{path}: not a COCO annotation file: it has no '{key}'; found "
                            f"{found}; expected images, annotations and categories")
        if not isinstance(document.get(key, []), list):
            raise UserError(f"{path}: '{key}' is a {type(document[key]).__name__}, expected a list")
    _check_rows(path, document.get("annotations", []), collector.rows)
    images = [_image_record(path, n, record) for n, record in enumerate(document["images"])]
    return collector.columns(images, document["categories"])


def _check_rows(path: Path, annotations: List[Any], rows: int) -> None:
    """Every entry of `annotations` has to be an annotation, and none may hide elsewhere."""
    if annotations == list(range(rows)):
        return
    for number, entry in enumerate(annotations):
        if isinstance(entry, dict):
            raise UserError(f"{path}: annotation {entry.get('id')!r} (number {number} in the list) "
                            "has no image_id; every annotation needs one")
        if entry != number:
            break
    raise UserError(f"{path}: 'annotations' does not hold exactly the file's annotations; expected "
                    "a flat list of objects with id, image_id and category_id")


def _image_record(path: Path, number: int, record: Any) -> ImageRecord:
    if isinstance(record, tuple):
        return record  # type: ignore[return-value]
    found = record.get("id") if isinstance(record, dict) else record
    raise UserError(f"{path}: image {found!r} (number {number} in the list) has no file_name; "
                    "every image needs an id and a file_name")


def _read_text(path: Path) -> str:
    if not path.exists():
        raise UserError(f"annotation file not found: looked for {path.absolute()}")
    if path.is_dir():
        raise UserError(f"{path.absolute()} is a folder, expected a COCO annotation file (.json)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (not UTF-8), expected COCO annotations as "
                        "JSON") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty, expected COCO annotations as JSON")
    return text[1:] if text.startswith("\ufeff") else text


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
