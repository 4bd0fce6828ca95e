"""Find objects with an exported YOLACT, without the repository that it was trained in.

    python run.py image.jpg [more.jpg ...] [--out=FOLDER] [--top_k=5] [--score_threshold=0]

prints a record in COCO's result format for each object and, with --out, draws the images there.
From Python:

    from run import Segmenter
    segmenter = Segmenter("folder of the export")
    found = segmenter(cv2.imread("image.jpg"))    # boxes, scores, class_ids, class_names, masks
    cv2.imwrite("drawn.png", found.draw())

Needs NumPy, OpenCV and ONNX Runtime (or Ascend's ais_bench). Letters: P priors, C classes with
background, k prototypes, n objects, h x w prototype size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Sequence, Tuple

import cv2
import numpy as np

from utils.drawing import draw_instances
from utils.errors import UserError, one_line
from utils.exported import ExportedModel
from utils.pixels import MOST_PIXELS, image_from_array, is_truncated, promised_size

Rows = Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Boxes `[n, 4]`, scores `[n]`, 0-based classes `[n]`, coefficients `[n, k]`; best first."""


@dataclass
class Found:
    """The n objects of an image, best score first."""

    image: np.ndarray
    """uint8 `[h, w, 3]` BGR, as it was given."""
    boxes: np.ndarray
    """float32 `[n, 4]`, x1 y1 x2 y2 in pixels."""
    scores: np.ndarray
    """float32 `[n]`, 0..1."""
    class_ids: np.ndarray
    """int64 `[n]`, 0-based."""
    masks: np.ndarray
    """bool `[n, h, w]`"""
    all_class_names: list[str]
    category_ids: list[int]

    @property
    def class_names(self) -> list[str]:
        """Name of each object's class."""
        return [self.all_class_names[index] for index in self.class_ids]

    def draw(self) -> np.ndarray:
        """A new image with masks, boxes and names."""
        texts = [f"{name} {score:.2f}" for name, score in zip(self.class_names, self.scores)]
        return draw_instances(self.image, self.boxes, list(self.masks), self.class_names,
                              self.all_class_names, texts)

    def records(self, image_id: int = 1) -> list[dict[str, Any]]:
        """One record an object in COCO's result format."""
        return [{"image_id": image_id, "category_id": self.category_ids[class_id],
                 "category_name": self.all_class_names[class_id],
                 "score": float(f"{float(score):.6g}"),
                 "bbox": [round(float(value), 3) for value in (*box[:2], *(box[2:] - box[:2]))],
                 "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)}}
                for class_id, score, box, mask in zip(
                    self.class_ids, self.scores, self.boxes.astype(np.float64), self.masks)]


class Segmenter:
    """Finds objects in images.

    Args:
        path: folder of the export, or a model in it; that of this file by default.
        device: `cpu`, `cuda`, `npu`, or `auto`: whatever the installed runtime offers.

    Raises:
        UserError: the folder is not whole, or there is no runtime.
    """

    def __init__(self, path: str = "", device: str = "auto") -> None:
        self.model = ExportedModel(path or os.path.dirname(os.path.abspath(__file__)), device)
        self.facts = self.model.facts
        self.priors = self.model.priors()

    def __call__(self, image: np.ndarray, top_k: int | None = None,
                 score_threshold: float = 0.0) -> Found:
        """Find the objects of an image, uint8 `[h, w, 3]` BGR as OpenCV reads it.

        Args:
            image: of any size.
            top_k: at most this many, best first; None for all.
            score_threshold: only objects with a higher score; 0 for all.

        Raises:
            UserError: the image has another shape or type.
        """
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
                and image.shape[2] == 3 and image.size):
            found = (f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray)
                     else f"a {type(image).__name__}")
            raise UserError(f"image is {found}, expected an array uint8 [height, width, 3]")
        side = self.facts["image"]["size"]
        resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
        planes = np.ascontiguousarray(resized[:, :, ::-1].transpose(2, 0, 1))[None]
        outputs = {name: values[0] for name, values in self.model(planes).items()}
        rows, proto = self.detections(outputs), outputs["proto"]
        if self.facts["mask_iou"] is not None:
            rows = self._rescored(rows, proto)
        count = len(rows[1]) if score_threshold <= 0 else int((rows[1] > score_threshold).sum())
        rows = tuple(values[:count if top_k is None else min(top_k, count)]  # type: ignore
                     for values in rows)
        boxes, scores, classes, coefficients = rows
        height, width = image.shape[:2]
        masks = np.zeros((len(boxes), height, width), bool)
        for mask, soft in zip(masks, soft_masks(proto, coefficients, boxes)):
            mask[:] = cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
        return Found(image, to_pixels(boxes, height, width), scores, classes.astype(np.int64),
                     masks, self.facts["class_names"], self.facts["category_ids"])

    def detections(self, outputs: dict[str, np.ndarray]) -> Rows:
        """Detections of one image from its outputs, boxes relative to the image."""
        if self.facts["form"] == "detections":
            count = int(outputs["count"])
            return (outputs["boxes"][:count], outputs["scores"][:count],
                    outputs["classes"][:count], outputs["coefficients"][:count])
        limits = self.facts["thresholds"]
        scores = outputs["conf"][:, 1:]
        best = scores.max(1) > limits["score"]
        boxes = decode(outputs["loc"][best], self.priors[best])
        index, classes, kept = fast_nms(boxes, scores[best].T, limits["iou"], limits["top_k"],
                                        limits["max_detections"])
        return boxes[index], kept, classes, outputs["mask"][best][index]

    def _rescored(self, rows: Rows, proto: np.ndarray) -> Rows:
        """YOLACT++: scores times the IoU that is predicted for the masks, in their new order."""
        boxes, scores, classes, coefficients = rows
        if not len(boxes):
            return rows
        iou = self.model.mask_iou(soft_masks(proto, coefficients, boxes)[:, None])
        scores = scores * iou[np.arange(len(iou)), classes]
        order = np.argsort(-scores, kind="stable")
        return boxes[order], scores[order], classes[order], coefficients[order]


def decode(loc: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Corner boxes `[n, 4]` from regression outputs and priors cx cy w h."""
    center = priors[:, :2] + loc[:, :2] * np.float32(0.1) * priors[:, 2:]
    size = priors[:, 2:] * np.exp(loc[:, 2:] * np.float32(0.2))
    return np.concatenate((center - size / 2, center + size / 2), 1)


def fast_nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float, top_k: int,
             max_detections: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """YOLACT's Fast NMS within each class (Bolya et al. 2019, section 3.3).

    Args:
        boxes: `[n, 4]` corners.
        scores: `[C-1, n]`.
        iou_threshold: a box that overlaps a better one of its class by more than this goes.
        top_k: candidates of a class.
        max_detections: of the image.

    Returns:
        Index into `boxes`, class and score of each detection, best first.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]  # [C-1, m]
    keep = np.zeros(order.shape, bool)
    for row, candidates in zip(keep, order):
        x1, y1, x2, y2 = boxes[candidates].T
        area = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
        width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
        height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        iou = shared / np.maximum(area[:, None] + area - shared, np.float32(1e-20))
        row[:] = np.triu(iou, 1).max(0, initial=0) <= iou_threshold
    classes, place = np.nonzero(keep)
    index = order[classes, place]
    kept = scores[classes, index]
    best = np.argsort(-kept, kind="stable")[:max_detections]
    return index[best], classes[best], kept[best]


def soft_masks(proto: np.ndarray, coefficients: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Masks float32 `[n, h, w]` in 0..1, zero outside of the boxes grown by a pixel."""
    height, width = proto.shape[:2]
    masks = 1 / (1 + np.exp(-(coefficients @ proto.reshape(height * width, -1).T)))
    masks = masks.reshape(-1, height, width)
    sides = [np.sort(boxes[:, axis::2], axis=1) * np.float32(size) + np.array([-1, 1], np.float32)
             for axis, size in ((0, width), (1, height))]
    columns, rows = ((np.arange(size) >= side[:, :1]) & (np.arange(size) < side[:, 1:])
                     for side, size in zip(sides, (width, height)))  # [n, w], [n, h]
    return masks * (rows[:, :, None] & columns[:, None, :])


def to_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Relative corners `[n, 4]` -> pixels, ordered and clipped to the image."""
    x, y = np.sort(boxes[:, 0::2], axis=1), np.sort(boxes[:, 1::2], axis=1)
    x, y = np.clip(x * np.float32(width), 0, width), np.clip(y * np.float32(height), 0, height)
    return np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), 1).astype(np.float32)


def run_lengths(mask: np.ndarray) -> str:
    """Compressed run lengths of a mask `[h, w]`, as COCO's tools write them."""
    flat = np.concatenate(([False], mask.T.reshape(-1), [False]))
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], ends, [mask.size]))).tolist()
    if len(ends) and ends[-1] == mask.size:
        counts.pop()
    text = []
    for n, count in enumerate(counts):
        value = count - (counts[n - 2] if n > 2 else 0)
        more = True
        while more:  # five bits a letter, lowest first; the sign is in the last one's fifth bit
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr((bits | 32 if more else bits) + 48))
    return "".join(text)


def read_image(path: str) -> np.ndarray:
    """An image file as uint8 `[h, w, 3]` BGR, turned as its EXIF orientation says.

    Raises:
        UserError: it is missing, no image, cut off, too large, or of values out of range.
    """
    image = None
    if os.path.isfile(path):  # OpenCV warns of a missing file on stderr
        with contextlib.suppress(cv2.error, OSError):  # more pixels than it reads; no permission
            with open(path, "rb") as stream:
                data = stream.read()
            if data[4:8] == b"ftyp":  # AVIF, which OpenCV does not turn
                raise UserError(f"'{path}' is an AVIF image, which is not read here; save it as "
                                "JPEG or PNG")
            if is_truncated(data):  # OpenCV would make up the rest of it
                raise UserError(f"'{path}' is truncated, the end of the image is missing; copy it "
                                "again")
            width, height = promised_size(data)  # a file of some bytes may promise gigabytes
            if width * height > MOST_PIXELS:
                raise UserError(f"'{path}' is too large: {width} x {height} pixels, at most "
                                f"{MOST_PIXELS} are read")
            image = cv2.imdecode(np.frombuffer(data, np.uint8),
                                 cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise UserError(f"'{path}' is missing or no image that OpenCV can read")
    try:
        return image_from_array(image)
    except ValueError as problem:
        raise UserError(f"'{path}': {problem}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code (2: something the user has to change)."""
    parser = argparse.ArgumentParser(description="Find objects in images with the model beside.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default="", help="another folder, or a model of several in it")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu"))
    parser.add_argument("--out", default=None, metavar="FOLDER", help="draws the images there")
    parser.add_argument("--top_k", type=int, default=5, help="objects an image, best first")
    parser.add_argument("--score_threshold", type=float, default=0.0)
    args = parser.parse_args(argv)
    if args.top_k < 0 or not 0 <= args.score_threshold <= 1:
        parser.error("--top_k has to be at least 0, --score_threshold 0 to 1")
    try:
        records, is_whole = find(args)
        print(json.dumps(records), flush=True)
    except UserError as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        place = "standard output" if error.filename is None else f"'{error.filename}'"
        _complain(f"cannot write {place}: {error.strerror}")
        sys.stdout = None  # type: ignore[assignment]  # else its rest is tried again at the end
        return 2
    return 0 if is_whole else 2


def _complain(sentence: object) -> None:
    print(f"error: {one_line(str(sentence))}", file=sys.stderr, flush=True)


def find(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Find the objects of all images, and draw them where a folder is given.

    An image that cannot be read, and a drawing that cannot be written, is said and left out.

    Returns:
        Records of all objects, and whether nothing was left out.

    Raises:
        UserError: the model cannot be used, or a drawing would replace an image.
        OSError: the folder cannot be made.
    """
    segmenter = Segmenter(args.model, args.device)
    targets = _targets(args.images, args.out or "")
    if args.out is not None:
        os.makedirs(args.out, exist_ok=True)
    records, is_whole = [], True
    for number, (path, target) in enumerate(zip(args.images, targets), 1):
        try:
            image = read_image(path)
        except UserError as error:
            _complain(error)
            is_whole = False
            continue
        found = segmenter(image, args.top_k, args.score_threshold)
        records += [dict(record, file_name=path) for record in found.records(number)]
        if args.out is not None:
            try:
                _draw(found, target)
            except UserError as error:
                _complain(error)
                is_whole = False
    return records, is_whole


def _targets(images: Sequence[str], folder: str) -> list[str]:
    """Where each image is drawn, each in a file of its own.

    Raises:
        UserError: the images lie in the same folder, where a drawing may replace one.
    """
    for path in images if folder else ():
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder):
            raise UserError(f"'{folder}' is both the folder of '{path}' and the output folder; "
                            "choose another one with --out")
    stems = [os.path.splitext(os.path.basename(path))[0] for path in images]
    targets: list[str] = []
    for number, stem in enumerate(stems, 1):
        name = stem if stems.count(stem) == 1 else f"{stem}_{number}"
        while os.path.join(folder, name + ".png") in targets:
            name += f"_{number}"
        targets.append(os.path.join(folder, name + ".png"))
    return targets


def _draw(found: Found, path: str) -> None:
    drawn = cv2.imencode(".png", found.draw())[1]
    try:
        with open(path, "wb") as stream:
            stream.write(drawn.tobytes())
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
