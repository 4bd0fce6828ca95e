"""What was found in one image, as plain arrays.

Masks are kept as run lengths, which take little memory, and become pixels only where they are asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import cv2
import numpy as np
import pycocotools.mask

from utils.drawing import MaskWindow, draw_instances

Rle = Dict[str, Any]
"""`{"size": [h, w], "counts": str}`, compressed run lengths in COCO's format."""


def decode_window(rle: Rle) -> MaskWindow:
    """Pixels of a mask within the rectangle around them; without any if the mask is empty."""
    left, top, width, height = (int(side) for side in pycocotools.mask.toBbox(rle))
    pixels = pycocotools.mask.decode(rle)[top:top + height, left:left + width]
    return MaskWindow(left, top, np.ascontiguousarray(pixels).astype(bool))


_OUTLINE_TOLERANCE = 0.5
"""Pixels by which the corners of polygons may leave the true outline."""


@dataclass
class Prediction:
    """The n objects found in an image, best score first.

    Attributes:
        image: uint8 `[h, w, 3]`, BGR: the pixels that were looked at, turned as its EXIF says.
        boxes: float32 `[n, 4]`, x1 y1 x2 y2 in pixels, not rounded.
        scores: float32 `[n]`, in 0..1.
        class_ids: int64 `[n]`, 0-based class in the network.
        class_names: n names.
        rles: n masks as COCO run lengths.
        all_class_names: every class of the network, in order.
        category_ids: what COCO-format files call the classes of the network, in order.
        path: file that the image came from, or None.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    class_names: List[str]
    rles: List[Rle]
    all_class_names: List[str] = field(repr=False)
    category_ids: List[int] = field(repr=False)
    path: Optional[str] = None
    _masks: Optional[np.ndarray] = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        found = ", ".join(f"{name} {score:.2f}"
                          for name, score in zip(self.class_names[:5], self.scores))
        more = ", ..." if len(self) > 5 else ""
        listed = ": " + found if found else ""
        return f"Prediction({width}x{height}, {len(self)} objects{listed}{more})"

    @property
    def masks(self) -> np.ndarray:
        """Bool `[n, h, w]`, made when first asked for: n times the image's pixels in bytes."""
        if self._masks is None:
            masks = np.zeros((len(self),) + self.image.shape[:2], bool)
            for n in range(len(self)):
                masks[n] = self.mask_of(n)
            self._masks = masks
        return self._masks

    def mask_of(self, n: int) -> np.ndarray:
        """Bool `[h, w]`, the mask of object n alone."""
        return pycocotools.mask.decode(self.rles[n]).astype(bool)

    def as_detections(self, masks: bool = True) -> Dict[str, Any]:
        """Arguments of `supervision.Detections`; without `masks` they stay unmade."""
        return {"xyxy": self.boxes, "mask": self.masks if masks and len(self) else None,
                "confidence": self.scores, "class_id": self.class_ids.astype(int),
                "data": {"class_name": np.array(self.class_names, dtype=str)}}

    def best(self, top_k: Optional[int] = None, score_threshold: float = 0.0) -> Prediction:
        """Only the first `top_k` objects, and only those with scores above the threshold."""
        keep = slice(0, int((self.scores > score_threshold).sum()) if score_threshold > 0 else None)
        if top_k is not None:
            keep = slice(0, min(top_k, len(self.scores[keep])))
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep],
                       class_ids=self.class_ids[keep], class_names=self.class_names[keep],
                       rles=self.rles[keep], _masks=None)

    def draw(self, top_k: Optional[int] = 15, score_threshold: float = 0.15, masks: bool = True,
             boxes: bool = True, text: bool = True, scores: bool = True) -> np.ndarray:
        """Draw the best objects and return a new image, uint8 `[h, w, 3]`, BGR.

        Args:
            top_k: at most this many, best first; None for all.
            score_threshold: only objects with a higher score; 0 for all.
            masks: fill and outline the masks.
            boxes: outline the boxes.
            text: write class names.
            scores: write scores behind the class names; without `text` nothing is written.
        """
        shown = self.best(top_k, score_threshold)
        windows = [decode_window(rle) for rle in shown.rles] if masks else None
        texts = [""] * len(shown)
        if text:
            texts = [f"{name} {score:.2f}" if scores else name
                     for name, score in zip(shown.class_names, shown.scores)]
        return draw_instances(shown.image, shown.boxes, windows,
                              shown.class_names, class_names=shown.all_class_names, texts=texts,
                              outline_boxes=boxes)

    def to_coco(self, image_id: int, polygons: bool = False) -> List[Dict[str, Any]]:
        """One record an object in COCO's result format.

        Args:
            image_id: written into the records.
            polygons: outlines instead of run lengths. Holes are filled then; an object without
                pixels has an empty list.
        """
        boxes = self.boxes.astype(np.float64)
        corners = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
        return [{"image_id": image_id, "category_id": self.category_ids[int(class_id)],
                 "category_name": name, "score": float(f"{float(score):.6g}"),
                 "bbox": [round(value, 3) for value in corner],
                 "segmentation": outline(rle) if polygons else rle}
                for class_id, name, score, corner, rle in zip(
                    self.class_ids, self.class_names, self.scores, corners.tolist(), self.rles)]

    def cut_outs(self) -> Iterator[Tuple[int, np.ndarray]]:
        """Yield the number and image of each object with pixels: uint8 `[h, w, 4]`, BGRA.

        The image is as large as the mask; what does not belong to the object is transparent.
        """
        for n, rle in enumerate(self.rles):
            left, top, pixels = decode_window(rle)
            if pixels.size:
                part = self.image[top:top + pixels.shape[0], left:left + pixels.shape[1]]
                yield n, np.dstack((part, pixels.astype(np.uint8) * 255))


def outline(rle: Rle) -> List[List[float]]:
    """Polygons `[x1, y1, x2, y2, ...]` around the parts of a mask, along the edges of its pixels.

    Simplified by less than a pixel; holes are filled.
    """
    left, top, pixels = decode_window(rle)
    if not pixels.size:
        return []
    height, width = pixels.shape
    # Twice as fine, edges on even lines and pixel centres on odd ones: a pixel grown by one line
    # reaches exactly to its edges.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    fine[1::2, 1::2] = pixels
    grown = cv2.dilate(fine, np.ones((3, 3), np.uint8))
    contours = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 2 * _OUTLINE_TOLERANCE, True).reshape(-1, 2)
        if len(corners) < 3:
            corners = contour.reshape(-1, 2)
        polygons.append((corners / 2 + (left, top)).reshape(-1).tolist())
    return polygons
