"""Find objects in images, from Python:

from utils.inference import Predictor
predictor = Predictor("weights/last.pth")
result = predictor("cat.jpg")           # boxes, scores, class_names, class_ids, masks
cv2.imwrite("drawn.png", result.draw())
"""

from __future__ import annotations

import itertools
import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Generator, Iterable, Iterator, Sequence, Union, overload

import cv2
import numpy as np
import pycocotools.mask
import torch

from data.classes import ClassList, find_classes
from data.image import image_from_pil, read_image
from layers.masks import Rle
from utils.device import select_device, synchronize
from utils.drawing import MaskWindow, draw_instances
from utils.inference.detector import (
    Detector,
    ImageObjects,
    Item,
    LoadedModel,
    StageTimes,
    load_model,
    to_network_batch,
)
from utils.pixels import image_from_array
from utils.progress import ProgressBar

Source = Union[str, os.PathLike, np.ndarray, Any]
"""A file, a PIL image, or an array as `utils.pixels.image_from_array` takes it."""

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
    class_names: list[str]
    rles: list[Rle]
    all_class_names: list[str] = field(repr=False)
    category_ids: list[int] = field(repr=False)
    path: str | None = None
    _masks: np.ndarray | None = field(default=None, repr=False)

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
            self._masks = np.zeros((len(self),) + self.image.shape[:2], bool)
            for n in range(len(self)):
                self._masks[n] = self.mask_of(n)
        return self._masks

    def mask_of(self, n: int) -> np.ndarray:
        """Bool `[h, w]`, the mask of object n alone."""
        return pycocotools.mask.decode(self.rles[n]).astype(bool)

    def as_detections(self, masks: bool = True) -> dict[str, Any]:
        """Arguments of `supervision.Detections`; without `masks` they stay unmade."""
        return {"xyxy": self.boxes, "mask": self.masks if masks and len(self) else None,
                "confidence": self.scores, "class_id": self.class_ids.astype(int),
                "data": {"class_name": np.array(self.class_names, dtype=str)}}

    def best(self, top_k: int | None = None, score_threshold: float = 0.0) -> Prediction:
        """Only the first `top_k` objects (None: all), and only those with scores above the
        threshold (0: all).
        """
        keep = slice(0, int((self.scores > score_threshold).sum()) if score_threshold > 0 else None)
        if top_k is not None:
            keep = slice(0, min(top_k, len(self.scores[keep])))
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep],
                       class_ids=self.class_ids[keep], class_names=self.class_names[keep],
                       rles=self.rles[keep], _masks=None)

    def draw(self, top_k: int | None = 15, score_threshold: float = 0.15, masks: bool = True,
             boxes: bool = True, text: bool = True, scores: bool = True) -> np.ndarray:
        """Draw the best objects, see `best`, and return a new image, uint8 `[h, w, 3]`, BGR.

        Masks are filled and outlined, boxes outlined, and scores written behind the class names;
        without `text` nothing is written.
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

    def to_coco(self, image_id: int, polygons: bool = False) -> list[dict[str, Any]]:
        """One record an object in COCO's result format; with `polygons` outlines instead of run
        lengths. Holes are filled then, and an object without pixels has an empty list.
        """
        boxes = self.boxes.astype(np.float64)
        corners = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
        return [{"image_id": image_id, "category_id": self.category_ids[int(class_id)],
                 "category_name": name, "score": float(f"{float(score):.6g}"),
                 "bbox": [round(value, 3) for value in corner],
                 "segmentation": outline(rle) if polygons else rle}
                for class_id, name, score, corner, rle in zip(
                    self.class_ids, self.class_names, self.scores, corners.tolist(), self.rles)]

    def cut_outs(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number and image of each object with pixels: uint8 `[h, w, 4]`, BGRA.

        The image is as large as the mask; what does not belong to the object is transparent.
        """
        for n, rle in enumerate(self.rles):
            left, top, pixels = decode_window(rle)
            if pixels.size:
                part = self.image[top:top + pixels.shape[0], left:left + pixels.shape[1]]
                yield n, np.dstack((part, pixels.astype(np.uint8) * 255))


class Predictor:
    """Finds objects in images. Not to be used by several threads at once.

    Args:
        weights: path of a weights file, of a run folder or of an export, `latest` or `interrupt`
            in `save_folder`, or a network from `load_model`.
        device: `auto`, `npu`, `cuda` or `cpu`, or one that was selected.
        config: recipe, where neither the weights nor their name say it.
        score_threshold: only objects with a higher score; 0 for all that the network finds.
        batch_size: images that pass the network together; on an accelerator always as many: the
            last batch is filled up.
        nms: `fast`, `cross_class` or `traditional`.
        crop: cut masks off outside their boxes.
        max_num_detections: objects per image; None for the recipe's.
        save_folder: see `weights`.
        precision: `float32`, `bfloat16`, `float16`, or `auto` for what is fastest here.

    Attributes:
        classes: names and category ids of the network's classes.

    Raises:
        UserError: the weights cannot be loaded, or there is no such device.
    """

    def __init__(self, weights: str | os.PathLike | LoadedModel = "latest",
                 device: str | torch.device = "auto", config: str | None = None,
                 score_threshold: float = 0.0, batch_size: int = 1, nms: str = "fast",
                 crop: bool = True, max_num_detections: int | None = None,
                 save_folder: str = "weights/", precision: str = "float32") -> None:
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold}, expected 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        for name, value, known in (("nms", nms, ("fast", "cross_class", "traditional")), (
                "precision", precision, ("float32", "bfloat16", "float16", "auto"))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        target = device if isinstance(device, torch.device) else select_device(str(device))
        if isinstance(weights, LoadedModel):
            loaded = weights
        else:
            loaded = load_model(os.fspath(weights), save_folder, config, max_num_detections)
            for sentence in loaded.source.warnings:
                warnings.warn(sentence, stacklevel=2)
        self.batch_size = batch_size
        self.classes: ClassList = find_classes(
            loaded.config.num_classes - 1, loaded.source.class_names, loaded.source.category_ids,
            loaded.config.dataset)
        self._detector = Detector(loaded.on(target, precision), loaded.build_detect(nms), target,
                                  crop, score_threshold)

    @overload
    def __call__(self, source: list[Source] | tuple[Source, ...],
                 rgb: bool = False) -> list[Prediction]:
        ...

    @overload
    def __call__(self, source: str | os.PathLike | np.ndarray, rgb: bool = False) -> Prediction:
        ...

    def __call__(self, source: Any, rgb: bool = False) -> Prediction | list[Prediction]:
        """Find the objects in an image, or in each of a list of images.

        Args:
            source: a file, an array, a PIL image, or a list of these. Files and PIL images are
                turned as their EXIF orientation says.
            rgb: arrays are red, green, blue; otherwise blue, green, red, as OpenCV has them.

        Raises:
            UserError: a file cannot be read.
            ValueError: an array has no shape or type of an image.
        """
        if isinstance(source, (list, tuple)):
            return list(self.iterate(source, rgb))
        return next(self.iterate([source], rgb))

    def iterate(self, sources: Iterable[Source], rgb: bool = False) -> Iterator[Prediction]:
        """Yield the prediction for each source as it is ready; at most a batch is in memory."""
        opened = ((os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
                   self._open(source, rgb)) for source in sources)
        while True:
            batch = list(itertools.islice(opened, self.batch_size))
            if not batch:
                return
            for path, prediction in self.find([batch], StageTimes()):
                prediction.path = path
                yield prediction

    def find(self, batches: Iterable[Sequence[tuple[Item, np.ndarray]]], times: StageTimes,
             progress: ProgressBar | None = None) -> Generator[tuple[Item, Prediction], None, None]:
        """Yield what is found in each image of batches of up to B, with what came with the image.

        A batch, of images uint8 `[h, w, 3]` BGR, is read and finished while the device works on
        another one; see `Detector.find`.
        """
        detector = self._detector
        prepared = ((to_network_batch([image for _, image in batch], detector.model.input_size,
                                      self.batch_size if detector.full_batches else len(batch)),
                     [((item, image), image.shape[0], image.shape[1]) for item, image in batch])
                    for batch in batches)
        for (item, image), objects in detector.find(prepared, times, progress):
            yield item, self._prediction(objects, image)

    def warm_up(self) -> None:
        """Run the network once, so that what is built on first use is there."""
        next(self.iterate([np.zeros((1, 1, 3), np.uint8)]))

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        synchronize(self._detector.device)

    def _open(self, source: Source, rgb: bool) -> np.ndarray:
        if isinstance(source, (str, os.PathLike)):
            return read_image(os.fspath(source))
        if isinstance(source, np.ndarray):
            return image_from_array(source, rgb)
        if hasattr(source, "convert") and hasattr(source, "mode"):
            return image_from_pil(source)
        raise ValueError(f"image is a {type(source).__name__}, expected a path, an array or a "
                         "PIL image")

    def _prediction(self, objects: ImageObjects, image: np.ndarray) -> Prediction:
        # YOLACT++ ranks by the masks' scores; otherwise this changes nothing.
        scores = objects.mask_scores
        order = np.argsort(-scores, kind="stable")
        if self._detector.score_threshold > 0:
            order = order[scores[order] > self._detector.score_threshold]
        class_ids = objects.classes[order]
        return Prediction(
            image=image, boxes=objects.boxes[order], scores=scores[order], class_ids=class_ids,
            class_names=[self.classes.names[index] for index in class_ids],
            rles=[objects.rles[index] for index in order],
            all_class_names=self.classes.names, category_ids=self.classes.category_ids)


def decode_window(rle: Rle) -> MaskWindow:
    """Pixels of a mask within the rectangle around them; without any if the mask is empty."""
    left, top, width, height = (int(side) for side in pycocotools.mask.toBbox(rle))
    pixels = pycocotools.mask.decode(rle)[top:top + height, left:left + width]
    return MaskWindow(left, top, np.ascontiguousarray(pixels).astype(bool))


def outline(rle: Rle) -> list[list[float]]:
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
