"""Draw ground truth beside detections for a few validation images.

`python test/quickstart_picture.py DATA BOXES MASKS OUT`: a folder in COCO's layout, the two result
files that `eval.py --output_coco_json` wrote, and the picture to write.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Dict, List

import cv2
import numpy as np
import pycocotools.mask

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.coco import (
    CocoDataset,  # noqa: E402
    Sample,  # noqa: E402
)
from data.datasets import dataset_paths  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.drawing import draw_instances, side_by_side  # noqa: E402
from utils.errors import UserError  # noqa: E402

ENLARGED = 2
"""Shown at twice the size: the images of the embedded dataset are small."""
PAIRS_IN_A_ROW = 2
SHORTENED = ("ground truth", "prediction")


def main(argv: List[str]) -> int:
    """Command line entry."""
    parser = ArgumentParser(prog="test/quickstart_picture.py", description=(
        "Draw ground truth beside detections for a few validation images."))
    parser.add_argument("data", help="folder in COCO's layout")
    parser.add_argument("boxes", help="box results of eval.py --output_coco_json")
    parser.add_argument("masks", help="mask results of eval.py --output_coco_json")
    parser.add_argument("out", help="picture to write")
    parser.add_argument("--images", type=int, default=6, help="number of images")
    parser.add_argument("--score_threshold", type=float, default=0.5,
                        help="detections below it are not drawn")
    args = parser.parse_args(argv)
    dataset = CocoDataset(*dataset_paths("coco2017", args.data, "val"))
    found = _by_image(_read(args.boxes), _read(args.masks), args.score_threshold)
    names = {category.id: category.name for category in dataset.categories}
    pairs = []
    for index in range(min(args.images, len(dataset))):
        sample = dataset[index]
        pairs.append(_pair(sample, found.get(sample.image_id, []), names))
    if not cv2.imwrite(args.out, _grid(pairs)):
        raise UserError(f"cannot write the picture to {args.out}")
    return 0


def _read(path: str) -> List[Dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read the results {path}: {problem}") from problem


def _by_image(boxes: List[Dict[str, Any]], masks: List[Dict[str, Any]],
              threshold: float) -> Dict[int, List[Dict[str, Any]]]:
    """Detections of each image; box and mask results list the same ones in the same order."""
    found: Dict[int, List[Dict[str, Any]]] = {}
    for box, mask in zip(boxes, masks):
        if (box["image_id"], box["score"]) != (mask["image_id"], mask["score"]):
            raise UserError("the box and mask results are of different detections; evaluate again")
        if box["score"] >= threshold:
            found.setdefault(box["image_id"], []).append(
                dict(box, segmentation=mask["segmentation"]))
    return found


def _pair(sample: Sample, found: List[Dict[str, Any]], names: Dict[int, str]) -> np.ndarray:
    class_names = [names[key] for key in sorted(names)]
    height, width = sample.image.shape[:2]
    image = cv2.resize(sample.image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
    truth = draw_instances(
        image, sample.boxes * np.array([width, height, width, height]) * ENLARGED,
        _enlarge([_decode(item, height, width) for item in sample.segmentations], image),
        [class_names[label - 1] + (" (group)" if crowd else "")
         for label, crowd in zip(sample.labels, sample.crowd)], class_names=class_names)
    corners = np.array([item["bbox"] for item in found], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    prediction = draw_instances(
        image, corners * ENLARGED,
        _enlarge([_decode(item["segmentation"], height, width) for item in found], image),
        [names[item["category_id"]] for item in found], class_names,
        [f"{names[item['category_id']]} {item['score']:.2f}" for item in found])
    return side_by_side([truth, prediction], SHORTENED)


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Uint8 `[h, w]` from polygons or run lengths."""
    if isinstance(segmentation, dict):
        return pycocotools.mask.decode([segmentation])[:, :, 0]
    polygons = [np.asarray(polygon, dtype=np.float64).ravel().tolist() for polygon in segmentation]
    runs = pycocotools.mask.frPyObjects(polygons, height, width)
    return pycocotools.mask.decode(runs).max(axis=2)


def _enlarge(masks: List[np.ndarray], image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scaled = [cv2.resize(mask * 255, (width, height), interpolation=cv2.INTER_LINEAR) > 127
              for mask in masks]
    return np.array(scaled, dtype=bool).reshape(-1, height, width)


def _grid(pictures: List[np.ndarray]) -> np.ndarray:
    """All pictures in rows on white."""
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    rows = -(-len(pictures) // PAIRS_IN_A_ROW)
    grid = np.full((rows * height, PAIRS_IN_A_ROW * width, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, PAIRS_IN_A_ROW)
        grid[row * height:row * height + picture.shape[0],
             column * width:column * width + picture.shape[1]] = picture
    return grid


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
