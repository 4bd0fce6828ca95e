"""One image with its ground truth, as the dataset hands it to augmentation and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Union

import numpy as np

Polygons = List[np.ndarray]
"""Outlines of one object: float32 `[m, 2]` arrays of x, y in pixels of the stored image."""

Rle = Dict[str, Any]
"""Compressed COCO run lengths: `{"size": [h, w], "counts": bytes}`, for pycocotools.mask."""

Segmentation = Union[Polygons, Rle]


@dataclass
class Sample:
    """An image and its usable objects; n may be 0 (a background image).

    Attributes:
        image_id: COCO image id.
        image: uint8 `[h, w, 3]`, BGR as OpenCV decodes it.
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 relative to the image, in [0, 1].
        labels: int64 `[n]`, 1..C-1.
        crowd: bool `[n]`, True where the annotation outlines a group (COCO's iscrowd).
        segmentations: the outline of each object, length n.
    """

    image_id: int
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: List[Segmentation]
