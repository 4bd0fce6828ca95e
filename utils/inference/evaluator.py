"""Official COCO scores of detections and masks, and the result files that COCO's server takes.

The matching and the numbers are a library's own (`utils.inference.ground_truth`); here are the
bookkeeping around it and the tables.

No printed line but the two rows of the table may contain the word "box" or "mask": the launchers,
and scripts that people have written around them, find these rows by those words.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np
import pycocotools.mask

from layers.masks import Rle
from utils.errors import UserError
from utils.files import write_whole
from utils.inference.ground_truth import COCO, COCOeval, GroundTruth, coco_of

_BOX_DECIMALS = 3
_SCORE_DIGITS = 6


STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl",
              "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve numbers: average precision and recall, over IoU .50:.95 where not named otherwise;
s, m, l are small, medium and large objects, AR1..AR100 the detections allowed per image."""

THRESHOLDS = tuple(range(50, 100, 5))
"""IoU thresholds of the table, in percent."""


@dataclass
class ClassScore:
    """Average precision of one class; None where the images hold no object of it."""

    category_id: int
    name: str
    objects: int
    ap: float | None
    ap50: float | None


@dataclass
class Scores:
    """All scores of one kind (boxes or masks), in [0, 1]; None where there is no ground truth."""

    statistics: dict[str, float | None]
    """The numbers of `STATISTICS`."""
    per_threshold: list[float | None]
    """Average precision at each of `THRESHOLDS`."""
    per_class: list[ClassScore]
    """By category id."""

    @property
    def ap(self) -> float | None:
        """Mean average precision over classes and IoU .50:.95."""
        return self.statistics["AP"]


@dataclass
class CocoResults:
    """The outcome of an evaluation."""

    box: Scores
    mask: Scores
    num_images: int
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""

    def table(self) -> str:
        """Average precision in percent over the IoU thresholds, in the original's layout."""
        heads = ["", "all "] + [f".{threshold} " for threshold in THRESHOLDS]
        rule = "-------+" * len(heads)
        rows = [_row([name, _percent(scores.ap)] + [_percent(ap) for ap in scores.per_threshold])
                for name, scores in (("box", self.box), ("mask", self.mask))]
        return "\n".join([_row(heads), rule] + rows + [rule])

    def statistics_table(self) -> str:
        """The twelve numbers of COCO, in percent."""
        lines = ["COCO        " + "".join(f"{name:>7s}" for name in STATISTICS)]
        for name, scores in (("detection", self.box), ("segmentation", self.mask)):
            lines.append(f"{name:12s}" + "".join(
                f"{_percent(scores.statistics[key]):>7s}" for key in STATISTICS))
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain types, for logs: the numbers of `STATISTICS` for box and mask, in [0, 1]."""
        return {"images": self.num_images, "box": dict(self.box.statistics),
                "mask": dict(self.mask.statistics)}

    def write_per_class(self, path: str) -> None:
        """Write average precision per class, in percent, as CSV; empty cells have no objects."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["category_id", "name", "objects", "box_AP", "box_AP50", "mask_AP",
                         "mask_AP50"])
        for box, mask in zip(self.box.per_class, self.mask.per_class):
            cells = [box.ap, box.ap50, mask.ap, mask.ap50]
            writer.writerow([box.category_id, text_cell(box.name), box.objects] + [
                "" if value is None else f"{100 * value:.2f}" for value in cells])
        write_whole(path, text.getvalue().encode("utf-8"))


class ScoredImage(NamedTuple):
    """An image's detections and its ground truth."""

    image_id: int
    detections: list[dict[str, Any]]
    """`category_id`, `score`, `mask_score`, `bbox` (x y w h, pixels), `segmentation` (run lengths).
    """
    objects: list[dict[str, Any]]
    """Annotations with at least `category_id`, `bbox`, `segmentation` (run lengths), `iscrowd`."""


class CocoEvaluator:
    """Collect the detections of images, then score them.

    Only images that were added take part, with or without detections. What is scored are the
    rounded values that `write_json` writes, so the official tools find the same numbers.

    Args:
        annotations: path of the COCO file, pycocotools' COCO object (left unchanged), or what
            several evaluators share.
        category_ids: COCO category id of each class, by 0-based class index; None for a class that
            the dataset does not have, whose detections are left out.
    """

    def __init__(self, annotations: str | COCO | GroundTruth,
                 category_ids: Sequence[int | None]) -> None:
        self._truth = (annotations if isinstance(annotations, GroundTruth)
                       else GroundTruth(annotations))
        self.category_ids = [None if number is None else int(number) for number in category_ids]
        self._detections: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        """Number of images added."""
        return len(self._detections)

    def add(self, image_id: int, boxes_px: np.ndarray, masks_rle: Sequence[Rle],
            classes: Sequence[int], scores: Sequence[float],
            mask_scores: Sequence[float] | None = None) -> None:
        """Add the n detections of one image, once; n may be 0.

        Args:
            image_id: COCO's.
            boxes_px: `[n, 4]` x1 y1 x2 y2 in pixels.
            masks_rle: n run lengths at the image's size.
            classes: `[n]`, 0-based.
            scores: `[n]`, in [0, 1].
            mask_scores: `[n]`, what the masks are ranked by, where it differs from the boxes'.
        """
        image_id = int(image_id)
        if image_id in self._detections:
            raise ValueError(f"image {image_id} was added before")
        boxes = np.asarray(boxes_px, dtype=np.float64).reshape(-1, 4)
        mask_scores = scores if mask_scores is None else mask_scores
        if not (len(boxes) == len(masks_rle) == len(classes) == len(scores) == len(mask_scores)):
            raise ValueError(f"image {image_id}: {len(boxes)} boxes, {len(masks_rle)} masks, "
                             f"{len(classes)} classes, {len(scores)} and {len(mask_scores)} scores")
        corners = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
        self._detections[image_id] = [
            {"category_id": self.category_ids[int(index)], "score": _round_score(score),
             "mask_score": _round_score(mask_score),
             "bbox": [round(side, _BOX_DECIMALS) for side in corner],
             "segmentation": {"size": [int(side) for side in rle["size"]],
                              "counts": rle["counts"]}}
            for corner, rle, index, score, mask_score in zip(
                corners.tolist(), masks_rle, classes, scores, mask_scores)
            if self.category_ids[int(index)] is not None]

    def state(self) -> list[Any]:
        """What was added, as plain lists, for `merge` in another process."""
        return [[image_id, found] for image_id, found in self._detections.items()]

    def merge(self, state: Iterable[Any]) -> None:
        """Add another evaluator's `state()`; images that are known already are skipped."""
        for image_id, found in state:
            self._detections.setdefault(int(image_id), found)

    def images(self) -> list[ScoredImage]:
        """What was added, image by image, beside the ground truth; not to be changed."""
        truth = self._ground_truth()
        return [ScoredImage(image_id, found, truth.imgToAnns.get(image_id, []))
                for image_id, found in self._detections.items()]

    @property
    def category_names(self) -> dict[int, str]:
        """Names of the annotation file's categories by id, in the order of the ids."""
        known = self._ground_truth().cats
        return {number: known[number]["name"] for number in sorted(known)}

    @property
    def has_ground_truth(self) -> bool:
        """Whether the file has annotations to score against (test-dev's has none)."""
        return self._truth.is_annotated

    def evaluate(self) -> CocoResults:
        """Score everything added so far.

        Raises:
            UserError: the file is not COCO's, has no ground truth, or does not know an image or a
                category that was added.
        """
        truth = self._ground_truth()
        if not self.has_ground_truth:
            raise UserError(f"{self._truth.name} has no 'annotations', so nothing can be scored; "
                            "write result files with --output_coco_json instead")
        unknown = [number for number in self._detections if number not in truth.imgs]
        if unknown:
            raise UserError(f"image id {unknown[0]} is not in {self._truth.name}")
        notes = []
        if not any(self._detections.values()):
            notes.append(f"Nothing was detected in {len(self)} images, so every score is 0; is the "
                         "network trained, and --score_threshold not too high?")
        return CocoResults(box=self._score(truth, "bbox"), mask=self._score(truth, "segm"),
                           num_images=len(self), notes=notes)

    def write_json(self, bbox_path: str, mask_path: str) -> None:
        """Write two files in COCO's result format, each whole or not at all."""
        write_whole(bbox_path, functools.partial(self._write_kind, "bbox", "score"))
        write_whole(mask_path, functools.partial(self._write_kind, "segmentation", "mask_score"))

    def _write_kind(self, kind: str, score: str, stream: Any) -> None:
        separator = ""
        stream.write(b"[")
        for image_id, found in self._detections.items():
            for item in found:
                record = {"image_id": image_id, "category_id": item["category_id"],
                          kind: item[kind], "score": item[score]}
                text = separator + json.dumps(record, separators=(",", ":"))
                stream.write(text.encode("ascii"))
                separator = ",\n"
        stream.write(b"]\n")

    def _ground_truth(self) -> COCO:
        truth = self._truth.coco
        missing = [number for number in self.category_ids
                   if number is not None and number not in truth.cats]
        if missing:
            raise UserError(f"{self._truth.name} has no category with id {missing[0]}; it has "
                            + ", ".join(str(number) for number in sorted(truth.cats)))
        return truth

    def _found(self, iou_type: str) -> list[dict[str, Any]]:
        """The detections as COCOeval takes them. Areas are those of what is matched."""
        records: list[dict[str, Any]] = []
        for image_id, found in self._detections.items():
            areas = [item["bbox"][2] * item["bbox"][3] for item in found]
            if iou_type == "segm" and found:
                # One by one: of more than 255 at once pycocotools raises with NumPy 2.
                areas = [int(pycocotools.mask.area(item["segmentation"])) for item in found]
            for item, area in zip(found, areas):
                of_kind = {"score": item["score"]} if iou_type == "bbox" else {
                    "score": item["mask_score"], "segmentation": item["segmentation"]}
                records.append(dict(
                    of_kind, id=len(records) + 1, image_id=image_id, iscrowd=0, area=area,
                    category_id=item["category_id"], bbox=item["bbox"]))
        return records

    def _score(self, truth: COCO, iou_type: str) -> Scores:
        found = coco_of(truth.dataset["images"], truth.dataset["categories"],
                        self._found(iou_type))
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            evaluation = COCOeval(truth, found, iou_type)
            evaluation.params.imgIds = sorted(self._detections)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # [threshold, recall, class, area range, detections per image]; -1 where no ground truth is.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        objects = Counter(annotation["category_id"] for annotation in truth.dataset["annotations"]
                          if annotation["image_id"] in self._detections
                          and not annotation["iscrowd"])
        return Scores(
            statistics={name: None if value < 0 else float(value)
                        for name, value in zip(STATISTICS, evaluation.stats)},
            per_threshold=[_mean(values) for values in precision],
            per_class=[ClassScore(number, truth.cats[number]["name"], objects[number],
                                  _mean(precision[:, :, k]), _mean(precision[0, :, k]))
                       for k, number in enumerate(evaluation.params.catIds)])


def text_cell(text: str) -> str:
    """A text for a cell of a CSV file that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _round_score(score: float) -> float:
    """Significant digits, not decimals: small scores keep their order."""
    return float(f"{float(score):.{_SCORE_DIGITS}g}")


def _mean(precision: np.ndarray) -> float | None:
    """Mean without the entries that have no ground truth (-1); None if nothing is left."""
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def _row(cells: Sequence[str]) -> str:
    return "".join(f" {cell:>5s} |" for cell in cells)


def _percent(value: float | None) -> str:
    """Five characters at most: 31.98, 100.0, or n/a where there is no ground truth."""
    if value is None:
        return "n/a"
    return f"{100 * value:.2f}" if 100 * value < 99.995 else f"{100 * value:.1f}"
