"""What an evaluation scores against, and the library that matches detections with it.

The matching is faster-coco-eval's where that is installed, pycocotools' elsewhere: the same numbers
(tested to the last printed digit and beyond), the former in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Iterable, Mapping

import numpy as np
import pycocotools.mask

from data.annotations.reader import polygon_points, read_json_text
from layers.masks import Rle
from utils.errors import UserError

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:  # no wheels for Python 3.7
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

__all__ = ["COCO", "COCOeval", "GroundTruth", "coco_of"]


class GroundTruth:
    """The annotations of a COCO file with all that COCOeval reads; read when they are first used.

    Outlines are run lengths; an annotation without a usable one is left out. Box, area and crowd
    flag may be missing in annotations that people made themselves, and one with id 0 would never
    count as found (COCOeval takes 0 for "no match").

    `source` is the path of the file, or pycocotools' COCO object (left unchanged); `image_sizes`
    are width and height by image id, for files that leave them out; `rows` are the places of the
    usable annotations in the file, None for all: the libraries end at outlines that are none.
    """

    def __init__(self, source: str | COCO,
                 image_sizes: Mapping[int, tuple[int, int]] | None = None,
                 rows: np.ndarray | None = None) -> None:
        self._source, self._image_sizes, self._rows = source, image_sizes or {}, rows
        self.name = source if isinstance(source, str) else "the annotation file"
        self._coco: COCO | None = None

    @property
    def is_annotated(self) -> bool:
        """Whether the file has annotations to score against (test-dev's has none)."""
        return "annotations" in self.coco.dataset

    @property
    def coco(self) -> COCO:
        """As COCOeval takes it; not to be changed.

        Raises:
            UserError: the file is not COCO's.
        """
        if self._coco is None:
            try:
                self._coco = self._read()
            except (OSError, ValueError, KeyError, TypeError, AttributeError,
                    OverflowError) as error:
                raise UserError(f"cannot read {self.name} as a COCO annotation file: "
                                f"{error or type(error).__name__}") from error
        return self._coco

    def _read(self) -> COCO:
        document = (json.loads(read_json_text(Path(self._source)))
                    if isinstance(self._source, str) else self._source.dataset)
        images = []
        for image in document["images"]:
            size = image.get("width"), image.get("height")
            if None in size:
                size = self._image_sizes.get(image["id"], size)
            if None in size:
                raise UserError(f"{self.name}: image {image['id']} has no width and height")
            images.append({"id": image["id"], "width": int(size[0]), "height": int(size[1])})
        annotations = None
        if "annotations" in document:
            records = document["annotations"]
            if self._rows is not None:
                records = [records[row] for row in np.sort(self._rows).tolist()]
            annotations = _usable(records, {image["id"]: image for image in images})
        return coco_of(images, document.get("categories", []), annotations)


def coco_of(images: list[dict[str, Any]], categories: list[Any],
            annotations: list[dict[str, Any]] | None) -> COCO:
    """The library's object for these records."""
    made = COCO()
    made.dataset = {"images": images, "categories": categories}
    if annotations is not None:
        made.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        made.createIndex()
    return made


def _usable(annotations: Iterable[dict[str, Any]],
            images: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Annotations that have an outline, each with all its fields; `images` by id."""
    found = []
    for annotation in annotations:
        if annotation["image_id"] not in images:
            raise UserError(f"annotation {annotation.get('id')} refers to image id "
                            f"{annotation['image_id']}, which is not in 'images'")
        image = images[annotation["image_id"]]
        rle = _to_rle(annotation.get("segmentation"), image["width"], image["height"])
        if rle is not None:
            area, box = annotation.get("area"), annotation.get("bbox")
            found.append({
                "id": annotation.get("id", 0), "image_id": image["id"],
                "category_id": annotation["category_id"],
                "iscrowd": int(annotation.get("iscrowd") or 0),
                "bbox": box if box and any(box) else pycocotools.mask.toBbox(rle).tolist(),
                "area": float(pycocotools.mask.area(rle) if area is None else area),
                "segmentation": rle})
    if any(record["id"] == 0 for record in found):
        for number, record in enumerate(found, 1):
            record["id"] = number
    return found


def _to_rle(segmentation: Any, width: int, height: int) -> Rle | None:
    """Compressed run lengths as `COCO.annToRLE` makes them; None for an unusable outline."""
    if isinstance(segmentation, list):
        segmentation = [part for part in segmentation if polygon_points(part)]
        rles = pycocotools.mask.frPyObjects(segmentation, height, width) if segmentation else None
        return rles and pycocotools.mask.merge(rles)
    if not isinstance(segmentation, dict) or not segmentation.get("counts"):
        return None
    if isinstance(segmentation["counts"], list):
        return pycocotools.mask.frPyObjects(segmentation, height, width)
    return segmentation
