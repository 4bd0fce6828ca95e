"""What an evaluation leaves in a run folder.

    evaluation/evaluation.json        what was evaluated, how, COCO's numbers, what the images show
    evaluation/per_class.csv          average precision of each class, in percent
    evaluation/confusion_matrix.csv   see `count_confusions`
    evaluation/pictures/<id>.jpg      ground truth beside prediction

Everything comes from detections that were scored anyway; the network does not run again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import cv2
import numpy as np
import pycocotools.mask

from data.coco import CocoDataset
from utils.distributed.processes import launch_id
from utils.drawing import draw_instances, side_by_side
from utils.inference.evaluator import THRESHOLDS, CocoEvaluator, CocoResults, ScoredImage, text_cell
from utils.report import MATRIX, PER_CLASS, SUMMARY, build_report
from utils.run_folder import (
    CONFIG,
    RunFolder,
    best_row,
    damage_refused,
    folder_of_weights,
    open_run_folder,
    timestamp,
)
from utils.weights.files import Origin

AUTO, NONE = "auto", "none"
SCORE_THRESHOLD, IOU_THRESHOLD = 0.3, 0.5
_IMAGES = os.path.join("evaluation", "pictures")
_MAX_IMAGES = 8
_MAX_NAMED = 30
"""Objects of an image up to which each has its plate; more plates would hide what they name."""
_DRAWS_ALL = int(cv2.__version__.split(".")[0]) >= 5
"""OpenCV before 5 draws question marks for all but ASCII."""
_SHORTEST, _LONGEST = 360, 720
"""Pixels between which the longer side of a drawn image lies."""


class ScoredEvaluation(NamedTuple):
    """An evaluation that has run."""

    evaluator: CocoEvaluator
    results: CocoResults
    dataset: CocoDataset
    weights: str
    """Which weights were scored, in words."""
    origin: Origin | None
    """Iteration and training that made them; None if unknown."""
    settings: Mapping[str, Any]
    """What of score threshold, NMS and the like was not the default, by flag."""


def keep_evaluation(choice: str, evaluation: ScoredEvaluation, config_name: str) -> list[str]:
    """Put an evaluation into a run folder and draw its report; returns lines for the user.

    Where the training did not validate at the weights' iteration, its row of results.csv gets the
    scores of an evaluation as a validation is, of all images by the default settings, and the
    weights of the best of all rows are best.pth.

    `choice` is `none`; `auto` for the folder of the run that made the weights, if it is there; or a
    path, which is made if it does not exist. With a path an evaluation of more images, or with the
    default settings, is replaced; with `auto` it stays.

    Raises:
        UserError: the folder cannot be written.
    """
    if choice == NONE:
        return []
    folder = (folder_of_weights(evaluation.weights, evaluation.origin) if choice == AUTO
              else open_run_folder(choice))
    if folder is None:
        if choice == AUTO:
            return []
        folder = RunFolder(choice, launch_id({}))
        folder.write_config({"program": "eval.py", "config": config_name})
    lines, images = [], len(evaluation.evaluator)
    with damage_refused(folder.path):
        before = folder.read(SUMMARY)
        if before and _same_file(before["annotations"], evaluation.dataset.annotation_file) and (
                images < before["images"] or (evaluation.settings and not before["settings"])):
            settings = "" if before["settings"] else " with the default settings"
            kind = f"{before['images']} images{settings}"
            if choice == AUTO:
                return [f"Run folder : {folder.path} keeps its evaluation of {kind}; "
                        f"--run_folder={folder.path} replaces it"]
            lines.append(f"Run folder : this replaces the evaluation of {kind}")
        write_evaluation(folder, evaluation)
        origin, is_whole = evaluation.origin, images == len(evaluation.dataset)
        if is_whole and not evaluation.settings and origin and origin.run_id == folder.run_id:
            _add_scores(folder, evaluation, int(origin.iteration or 0))
        return lines + build_report(folder)


def _same_file(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _add_scores(folder: RunFolder, evaluation: ScoredEvaluation, iteration: int) -> None:
    """Give an iteration its scores, unless it has some or these are of other data."""
    config = folder.read(CONFIG)
    known = config.setdefault("data", {}).get("val")
    if known is not None and not _same_file(known["annotation_file"],
                                            evaluation.dataset.annotation_file):
        return
    if any(row["iteration"] == iteration and "mask_mAP" in row for row in folder.results()):
        return
    if known is None:
        config["data"]["val"] = describe_data(evaluation.dataset)
        folder.write_config(config)
    size = config.get("run", {}).get("iterations_per_epoch")
    folder.add_record("val", iteration=iteration, epoch=size and iteration // size,
                      **evaluation.results.summary())
    best = best_row(folder.results())
    if best is not None and best["iteration"] == iteration:
        folder.keep_weights(evaluation.weights, "best")


def describe_data(dataset: CocoDataset) -> dict[str, Any]:
    """What a dataset holds, in plain types, for the configuration of a run folder."""
    report = dataset.report
    return {
        "annotation_file": os.path.realpath(dataset.annotation_file),
        "images_folder": str(dataset.images_dir), "images": report.images,
        "images_without_objects": report.empty_images, "objects": report.objects,
        "crowd_regions": report.crowds, "dropped_annotations": report.dropped,
        "sentences": report.sentences()[1:],
        "objects_per_class": dict(report.objects_per_category)}


def write_evaluation(folder: RunFolder, evaluation: ScoredEvaluation) -> None:
    """Put an evaluation in the place of the one before, whatever that was."""
    results, dataset = evaluation.results, evaluation.dataset
    images, names = evaluation.evaluator.images(), evaluation.evaluator.category_names
    results.write_per_class(folder.file(PER_CLASS))
    folder.write_bytes(MATRIX, matrix_csv(count_confusions(images, list(names)),
                                          list(names.values())))
    place = {int(image_id): n for n, image_id in enumerate(dataset.image_ids)}
    shown: list[dict[str, Any]] = []
    for image in images_to_draw(images):
        index, name = place[image.image_id], f"{image.image_id:012d}.jpg"
        folder.write_bytes(os.path.join(_IMAGES, name),
                           draw_image(image, dataset[index].image, names))
        shown.append({
            "file": "evaluation/pictures/" + name, "image_id": image.image_id,
            "image": dataset.image_info(index)[0],
            "objects": sum(not item["iscrowd"] for item in image.objects),
            "detections": len(_surest(image))})
    folder.write(SUMMARY, {
        "weights": evaluation.weights, "time": timestamp(),
        "iteration": None if evaluation.origin is None else evaluation.origin.iteration,
        "annotations": os.path.realpath(dataset.annotation_file), "images": len(images),
        "images_in_file": len(dataset), "settings": dict(evaluation.settings),
        "notes": results.notes,
        **{kind: dict(scores.statistics, per_threshold=dict(zip(
            (str(threshold) for threshold in THRESHOLDS), scores.per_threshold)))
           for kind, scores in (("box", results.box), ("mask", results.mask))},
        "confusion_matrix": {"score_threshold": SCORE_THRESHOLD, "iou_threshold": IOU_THRESHOLD,
                             "iou_of": "masks"},
        "pictures": {"score_threshold": SCORE_THRESHOLD, "shown": shown}})
    with contextlib.suppress(OSError):  # those of other images would be mistaken for this one's
        for name in set(os.listdir(folder.file(_IMAGES))) - {
                os.path.basename(item["file"]) for item in shown}:
            os.unlink(folder.file(_IMAGES, name))


def count_confusions(images: Iterable[ScoredImage], category_ids: Sequence[int],
                     score_threshold: float = SCORE_THRESHOLD,
                     iou_threshold: float = IOU_THRESHOLD) -> np.ndarray:
    """Which classes are taken for which.

    Detections with a score of at least `score_threshold` are matched to the objects of their image,
    of whatever class, where the IoU of the masks is at least `iou_threshold`: the highest score
    first, each takes the object with the largest IoU that is left, of equal ones one of its class.
    Crowd regions are no objects; an unmatched detection that lies in one (by `iou_threshold` of its
    mask) does not count, as in COCO's evaluation.

    Returns:
        int64 `[n + 1, n + 1]` in the order of `category_ids`: rows are objects, columns detections.
        The last column are objects that were missed, the last row detections that nothing was left
        for: false or double.
    """
    place = {int(number): n for n, number in enumerate(category_ids)}
    counts = np.zeros((len(place) + 1, len(place) + 1), np.int64)
    for image in images:
        objects = [item for item in image.objects if not item["iscrowd"]]
        crowds = [item for item in image.objects if item["iscrowd"]]
        found = sorted((item for item in image.detections if item["mask_score"] >= score_threshold),
                       key=lambda item: -item["mask_score"])
        ious, covered = _overlaps(found, objects, 0), _overlaps(found, crowds, 1)
        left = set(range(len(objects)))
        for n, detection in enumerate(found):
            column = place[detection["category_id"]]
            candidates = [(-ious[n, truth],
                           objects[truth]["category_id"] != detection["category_id"], truth)
                          for truth in left if ious[n, truth] >= iou_threshold]
            if candidates:
                truth = min(candidates)[-1]
                left.remove(truth)
                counts[place[objects[truth]["category_id"]], column] += 1
            elif not (covered[n] >= iou_threshold).any():
                counts[-1, column] += 1
        for truth in left:
            counts[place[objects[truth]["category_id"]], -1] += 1
    return counts


def _overlaps(found: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]],
              crowd: int) -> np.ndarray:
    """IoU of masks, `[found, others]`; with crowd 1, the part of each found mask inside."""
    if not found or not others:
        return np.zeros((len(found), len(others)))
    masks = ([item["segmentation"] for item in items] for items in (found, others))
    return np.asarray(pycocotools.mask.iou(*masks, [crowd] * len(others)))


def matrix_csv(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """The counts with a first row and column of names."""
    text, labels = io.StringIO(), [*map(text_cell, names), "background"]
    csv.writer(text, lineterminator="\n").writerows(
        [["object \\ detection"] + labels]
        + [[label] + row for label, row in zip(labels, counts.tolist())])
    return text.getvalue().encode("utf-8")


def images_to_draw(images: Sequence[ScoredImage], most: int = _MAX_IMAGES) -> list[ScoredImage]:
    """The same ones in each evaluation of the same images.

    Spread evenly over those with objects, in the order of their ids; where these are fewer than
    `most`, images without objects fill up.
    """
    def is_empty(image: ScoredImage) -> bool:
        return all(item["iscrowd"] for item in image.objects)

    ordered = sorted(images, key=lambda image: (is_empty(image), image.image_id))
    full = sum(not is_empty(image) for image in images)
    if full >= most:
        return [ordered[n * full // most] for n in range(most)]
    return sorted(ordered[:most], key=lambda image: image.image_id)


def draw_image(image: ScoredImage, pixels: np.ndarray, names: Mapping[int, str]) -> bytes:
    """Ground truth beside prediction, as a JPEG file; `pixels` are uint8 `[h, w, 3]` BGR, `names`
    those of all classes by category id.
    """
    longer = max(pixels.shape[:2])
    scale = float(np.clip(longer, _SHORTEST, _LONGEST)) / longer
    height, width = (max(1, int(round(side * scale))) for side in pixels.shape[:2])
    canvas = cv2.resize(pixels, (width, height),
                        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    found = _surest(image)
    pair = side_by_side([
        _draw(canvas, scale, image.objects, names, [
            " (group)" if item["iscrowd"] else "" for item in image.objects]),
        _draw(canvas, scale, found, names, [f" {item['mask_score']:.2f}" for item in found])],
        ["ground truth", "prediction"])
    return bytes(cv2.imencode(".jpg", pair, [cv2.IMWRITE_JPEG_QUALITY, 88])[1])


def _surest(image: ScoredImage) -> list[dict[str, Any]]:
    found = [item for item in image.detections if item["mask_score"] >= SCORE_THRESHOLD]
    return sorted(found, key=lambda item: -item["mask_score"])


def _draw(canvas: np.ndarray, scale: float, items: Sequence[dict[str, Any]],
          names: Mapping[int, str], suffixes: Sequence[str]) -> np.ndarray:
    boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [names[item["category_id"]] for item in items]
    numbers = {name: n for n, name in enumerate(names.values(), 1)}
    size = canvas.shape[1], canvas.shape[0]
    masks = [cv2.resize(255 * pycocotools.mask.decode(item["segmentation"]), size) > 127
             for item in items]
    texts = [(label if _DRAWS_ALL or label.isascii() else f"class {numbers[label]}") + suffix
             for label, suffix in zip(labels, suffixes)]
    return draw_instances(canvas, boxes * scale, masks, labels, class_names=list(names.values()),
                          texts=texts if len(items) <= _MAX_NAMED else [""] * len(items))
