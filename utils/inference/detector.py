"""A network with everything between its predictions and the objects of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layers.detection import Detect, Detections
from layers.mask_iou import mask_scores
from layers.masks import boxes_to_pixels, encode_masks
from utils.inference.pipeline import StageTimes
from yolact import Yolact

CPU = torch.device("cpu")

Rle = Dict[str, Any]
"""`{"size": [h, w], "counts": str}`, compressed run lengths in COCO's format."""


class ImageObjects(NamedTuple):
    """The n objects found in one image, best box first."""

    boxes: np.ndarray
    """float32 `[n, 4]`, x1 y1 x2 y2 in pixels."""
    rles: List[Rle]
    """n masks."""
    classes: np.ndarray
    """int64 `[n]`, 0-based class."""
    scores: np.ndarray
    """float32 `[n]`, of the boxes, in [0, 1]."""
    mask_scores: np.ndarray
    """float32 `[n]`, of the masks: those of the boxes unless the network scores masks itself."""


@dataclass(frozen=True)
class PendingDetections:
    """Detections of a batch that a device may still be working on."""

    detections: Detections
    proto: Tensor
    """`[B, h, w, k]`"""
    mask_scores: Tensor
    """`[B, N]`, in the order of the detections."""

    def fetch(self) -> PendingDetections:
        """The same on the CPU; waits for the device."""
        return PendingDetections(self.detections.to(CPU), self.proto.to(CPU),
                                 self.mask_scores.to(CPU))


@dataclass
class Detector:
    """Finds objects in batches of images.

    Attributes:
        model: on `device`; in evaluation mode when it is used.
        detect: from predictions to detections.
        device: that the work is done on.
        crop: cut masks off outside their boxes.
        score_threshold: only boxes with a higher score; 0 for all.
    """

    model: Yolact
    detect: Detect
    device: torch.device
    crop: bool = True
    score_threshold: float = 0.0

    @torch.no_grad()
    def launch(self, images: Tensor, times: StageTimes) -> PendingDetections:
        """Queue the work for uint8 images `[B,3,S,S]`; returns without waiting for it."""
        with times.stage("network"):
            predictions = self.model(images.to(self.device, non_blocking=True))
        with times.stage("detection"):
            found, proto = self.detect(predictions), predictions["proto"]
            if self.model.maskiou_net is None:
                return PendingDetections(found, proto, found.scores)
            return PendingDetections(found, proto, mask_scores(self.model.maskiou_net, found,
                                                               proto, self.crop))

    def objects(self, fetched: PendingDetections, n: int, height: int, width: int) -> ImageObjects:
        """The objects of image n of a batch, whose stored image has this size in pixels."""
        found = fetched.detections.of_image(n, self.score_threshold)
        rles = encode_masks(fetched.proto[n], found.coefficients, found.boxes, height, width,
                            self.crop)
        return ImageObjects(boxes_to_pixels(found.boxes, height, width).numpy(), rles,
                            found.classes.numpy(), found.scores.numpy(),
                            fetched.mask_scores[n, :len(rles)].numpy())
