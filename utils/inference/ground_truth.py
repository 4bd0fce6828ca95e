"""What an evaluation scores against, and the library that matches detections with it.

The matching is faster-coco-eval's where that is installed, pycocotools' elsewhere: the same numbers
(tested to the last printed digit and beyond), the former in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import numpy as np
import pycocotools.mask

from data.annotations.kept_arrays import KeptArrays, keep
from utils.errors import UserError
from utils.inference.prediction import Rle

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:  # no wheels for Python 3.7
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

__all__ = ["COCO", "COCOeval", "GroundTruth", "ImageSizes", "coco_of"]

ImageSizes = Mapping[int, Tuple[int, int]]
"""Width and height by image id."""


class GroundTruth:
    """The annotations of a COCO file with all that COCOeval reads; read when they are first used.

    Outlines are run lengths; an annotation without a usable one is left out. Box, area and crowd
    flag may be missing in annotations that people made themselves, and one with id 0 would never
    count as found (COCOeval takes 0 for "no match"). What was read is kept in the user's cache.

    Args:
        source: path of the file, or pycocotools' COCO object (left unchanged).
        image_sizes: for files that leave them out.
    """

    def __init__(self, source: Union[str, COCO], image_sizes: ImageSizes) -> None:
        self._source, self._image_sizes = source, image_sizes
        self._kept: Optional[KeptArrays] = None
        self._coco: Optional[COCO] = None

    @property
    def name(self) -> str:
        """Of the file, for sentences."""
        return self._source if isinstance(self._source, str) else "the annotation file"

    @property
    def is_annotated(self) -> bool:
        """Whether the file has annotations to score against (test-dev's has none)."""
        return bool(self._read().facts["annotated"])

    @property
    def coco(self) -> COCO:
        """As COCOeval takes it; not to be changed.

        Raises:
            UserError: the file is not COCO's.
        """
        if self._coco is None:
            self._coco = coco_of(*_records(self._read()))
        return self._coco

    def _read(self) -> KeptArrays:
        if self._kept is None:
            try:
                self._kept = self._pack() if not isinstance(self._source, str) else keep(
                    "ground_truth", self._source, [Path(__file__)], self._pack)
            except (OSError, ValueError, KeyError, TypeError, AttributeError,
                    OverflowError) as error:
                raise UserError(f"cannot read {self.name} as a COCO annotation file: "
                                f"{error or type(error).__name__}") from error
        return self._kept

    def _pack(self) -> KeptArrays:
        if isinstance(self._source, str):
            with open(self._source, encoding="utf-8-sig") as stream:
                document = json.load(stream)
        else:
            document = self._source.dataset
        sizes, given = {}, True
        for image in document["images"]:
            size = image.get("width"), image.get("height")
            if None in size:
                given = False
                size = self._image_sizes.get(image["id"], size)
            if None in size:
                raise UserError(f"{self.name}: image {image['id']} has no width and height")
            sizes[image["id"]] = int(size[0]), int(size[1])
        facts = {"annotated": "annotations" in document,
                 "categories": document.get("categories", [])}
        return KeptArrays(facts, {
            "image_ids": np.array(list(sizes), np.int64).reshape(-1),
            "image_sizes": np.array(list(sizes.values()), np.int64).reshape(-1, 2),
            **_columns(document.get("annotations", []), sizes)}, lasting=given)


def coco_of(images: List[Dict[str, Any]], categories: List[Any],
            annotations: Optional[List[Dict[str, Any]]]) -> COCO:
    """The library's object for these records."""
    made = COCO()
    made.dataset = {"images": images, "categories": categories}
    if annotations is not None:
        made.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        made.createIndex()
    return made


def _columns(annotations: Iterable[Dict[str, Any]],
             sizes: Dict[int, Tuple[int, int]]) -> Dict[str, np.ndarray]:
    """Annotations that have an outline, as arrays; `sizes` are width and height by image."""
    ids, boxes, areas, rles = [], [], [], []
    for annotation in annotations:
        image_id = annotation["image_id"]
        if image_id not in sizes:
            raise UserError(f"annotation {annotation.get('id')} refers to image id {image_id}, "
                            "which is not in 'images'")
        rle = _to_rle(annotation.get("segmentation"), *sizes[image_id])
        if rle is None:
            continue
        area = annotation.get("area")
        ids.append((annotation.get("id", 0), image_id, annotation["category_id"],
                    int(annotation.get("iscrowd") or 0)))
        areas.append(float(pycocotools.mask.area(rle) if area is None else area))
        boxes.append(annotation.get("bbox") or pycocotools.mask.toBbox(rle).tolist())
        rles.append(rle)
    counts = [rle["counts"] if isinstance(rle["counts"], bytes) else rle["counts"].encode("ascii")
              for rle in rles]
    columns = {"ids": np.array(ids, np.int64).reshape(-1, 4),
               "boxes": np.array(boxes, np.float64).reshape(-1, 4), "areas": np.array(areas),
               "rle_sizes": np.array([rle["size"] for rle in rles], np.int64).reshape(-1, 2),
               "rle_stops": np.cumsum([len(text) for text in counts], dtype=np.int64),
               "rle_bytes": np.frombuffer(b"".join(counts), np.uint8)}
    if (columns["ids"][:, 0] == 0).any():
        columns["ids"][:, 0] = np.arange(len(ids)) + 1
    return columns


def _records(kept: KeptArrays) -> Tuple[List[Any], List[Any], Optional[List[Dict[str, Any]]]]:
    """Images, categories and annotations as dictionaries."""
    arrays = kept.arrays
    images = [{"id": number, "width": width, "height": height} for number, (width, height) in zip(
        arrays["image_ids"].tolist(), arrays["image_sizes"].tolist())]
    if not kept.facts["annotated"]:
        return images, kept.facts["categories"], None
    data, start, annotations = arrays["rle_bytes"].tobytes(), 0, []
    for (number, image_id, category_id, crowd), box, area, size, stop in zip(*(
            arrays[name].tolist() for name in ("ids", "boxes", "areas", "rle_sizes", "rle_stops"))):
        annotations.append({
            "id": number, "image_id": image_id, "category_id": category_id, "iscrowd": crowd,
            "bbox": box, "area": area,
            "segmentation": {"size": size, "counts": data[start:stop]}})
        start = stop
    return images, kept.facts["categories"], annotations


def _to_rle(segmentation: Any, width: int, height: int) -> Optional[Rle]:
    """Compressed run lengths as `COCO.annToRLE` makes them; None for an unusable outline."""
    if isinstance(segmentation, list):
        segmentation = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]
        rles = pycocotools.mask.frPyObjects(segmentation, height, width) if segmentation else None
        return rles and pycocotools.mask.merge(rles)
    if not isinstance(segmentation, dict) or not segmentation.get("counts"):
        return None
    if isinstance(segmentation["counts"], list):
        return pycocotools.mask.frPyObjects(segmentation, height, width)
    return segmentation
