"""Validation images with ground truth beside prediction."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence

import cv2
import numpy as np
import pycocotools.mask

from utils.drawing import draw_instances, side_by_side
from utils.inference.evaluator import ScoredImage

SCORE_THRESHOLD = 0.3
MOST_PICTURES = 8
_MOST_DETECTIONS = 40
_SHORTEST, _LONGEST = 360, 720
"""Pixels between which the longer side of a drawn image lies."""
_JPEG_QUALITY = 88


class Picture(NamedTuple):
    """A drawn pair, as a JPEG file, and what is on it."""

    image_id: int
    file_name: str
    objects: int
    detections: int
    jpeg: bytes


def choose_pictures(images: Sequence[ScoredImage], most: int = MOST_PICTURES) -> List[ScoredImage]:
    """The images that are drawn: the same ones in each evaluation of the same images.

    Spread evenly over those with objects, in the order of their ids; where these are fewer than
    `most`, images without objects fill up.
    """
    ordered = sorted(images, key=lambda image: image.image_id)
    with_objects = [image for image in ordered
                    if any(not item["iscrowd"] for item in image.objects)]
    if len(with_objects) < most:
        seen = {image.image_id for image in with_objects}
        others = [image for image in ordered if image.image_id not in seen]
        chosen = with_objects + others[:most - len(with_objects)]
        return sorted(chosen, key=lambda image: image.image_id)
    return [with_objects[n * len(with_objects) // most] for n in range(most)]


def draw_picture(image: ScoredImage, pixels: np.ndarray, file_name: str,
                 names: Dict[int, str]) -> Picture:
    """Draw ground truth beside prediction.

    Args:
        image: detections and objects; detections from `SCORE_THRESHOLD` on are drawn.
        pixels: uint8 `[h, w, 3]` BGR.
        file_name: of the image.
        names: of all classes, by category id.
    """
    longer = max(pixels.shape[:2])
    scale = float(np.clip(longer, _SHORTEST, _LONGEST)) / longer
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=shrink)
    found = sorted((item for item in image.detections if item["mask_score"] >= SCORE_THRESHOLD),
                   key=lambda item: -item["mask_score"])[:_MOST_DETECTIONS]
    truth = _draw(canvas, scale, image.objects, names, [
        " (group)" if item["iscrowd"] else "" for item in image.objects])
    prediction = _draw(canvas, scale, found, names, [
        " {:.2f}".format(item["mask_score"]) for item in found])
    pair = side_by_side([truth, prediction], ["ground truth", "prediction"])
    done, data = cv2.imencode(".jpg", pair, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done
    return Picture(image.image_id, file_name,
                   sum(not item["iscrowd"] for item in image.objects), len(found), data.tobytes())


def _draw(canvas: np.ndarray, scale: float, items: Sequence[Dict[str, Any]],
          names: Dict[int, str], suffixes: Sequence[str]) -> np.ndarray:
    boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [names[item["category_id"]] for item in items]
    numbers = {name: n + 1 for n, name in enumerate(names.values())}
    texts = [_drawable(label, numbers[label]) + suffix
             for label, suffix in zip(labels, suffixes)]
    return draw_instances(canvas, boxes * scale, _Masks(items, canvas), labels,
                          class_names=list(names.values()), texts=texts)


def _drawable(name: str, number: int) -> str:
    """The name, or the class's number where OpenCV before 5 would draw question marks."""
    if int(cv2.__version__.split(".")[0]) >= 5 or all(32 <= ord(letter) < 127 for letter in name):
        return name
    return f"class {number}"


class _Masks(Sequence[np.ndarray]):
    """Masks at the size of the drawing, made as they are asked for."""

    def __init__(self, items: Sequence[Dict[str, Any]], canvas: np.ndarray) -> None:
        self._items = items
        self._size = canvas.shape[1], canvas.shape[0]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        mask = pycocotools.mask.decode([self._items[number]["segmentation"]])[:, :, 0]
        return cv2.resize(mask * 255, self._size, interpolation=cv2.INTER_LINEAR) > 127
