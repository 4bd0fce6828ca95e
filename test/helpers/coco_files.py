"""A tiny valid COCO dataset on disk, for tests that break it in one place."""

from __future__ import annotations

import copy
import json

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 30

_SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]
_DOCUMENT = {
    "info": {"description": "test"},
    "images": [
        {"id": 30, "file_name": "c.png", "width": WIDTH, "height": HEIGHT},
        {"id": 10, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 20, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
    ],
    # Out of order, with gaps and a name beyond ASCII.
    "categories": [{"id": 7, "name": "dog"}, {"id": 0, "name": "chat noir \u732b"},
                   {"id": 90, "name": "cup"}],
    "annotations": [
        {"id": 101, "image_id": 10, "category_id": 7, "iscrowd": 0, "area": 100,
         "bbox": [5, 5, 10, 10], "segmentation": [_SQUARE]},
        {"id": 102, "image_id": 30, "category_id": 0, "iscrowd": 0, "area": 100,
         "bbox": [5, 5, 30, 10], "segmentation": [_SQUARE, [25, 5, 35, 5, 35, 15]]},
        {"id": 103, "image_id": 10, "category_id": 90, "iscrowd": 1, "area": 12,
         "bbox": [0, 0, 1, 12], "segmentation": {"size": [HEIGHT, WIDTH],
                                                 "counts": [0, 12, WIDTH * HEIGHT - 12]}},
        {"id": 104, "image_id": 10, "category_id": 0, "iscrowd": 0, "area": 100,
         "bbox": [5, 5, 10, 10], "segmentation": [_SQUARE]},
    ],
}


def document():
    """A fresh, valid annotation document; image 20 has no objects."""
    return copy.deepcopy(_DOCUMENT)


def write_json(folder, content):
    """Write `content` (text as it is, anything else as JSON); return the path."""
    path = folder / "instances.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def write_images(folder, records=None):
    """Write an image of noise for every record of `images`; return the folder."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    rng = np.random.RandomState(0)
    for record in _DOCUMENT["images"] if records is None else records:
        pixels = rng.randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        cv2.imwrite(str(images / record["file_name"]), pixels)
    return images
