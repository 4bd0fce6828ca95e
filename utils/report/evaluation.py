"""What an evaluation leaves in the run folder: scores, confusion matrix, pictures.

    evaluation/evaluation.json      what was evaluated, COCO's numbers, what is in the other files
    evaluation/per_class.csv        average precision of each class, in percent
    evaluation/confusion_matrix.csv
    evaluation/pictures/<image id>.jpg

Everything comes from detections that were scored anyway; the network does not run again.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, List, NamedTuple, Optional

from utils.files import write_whole
from utils.inference.evaluator import THRESHOLDS, CocoEvaluator, CocoResults
from utils.report import confusion
from utils.report.pictures import SCORE_THRESHOLD, Picture, choose_pictures, draw_picture
from utils.run_environment import timestamp
from utils.run_folder import RunFolder

FOLDER = "evaluation"
SUMMARY = os.path.join(FOLDER, "evaluation.json")
PER_CLASS = os.path.join(FOLDER, "per_class.csv")
MATRIX = os.path.join(FOLDER, "confusion_matrix.csv")
PICTURES = os.path.join(FOLDER, "pictures")


class Scored(NamedTuple):
    """An evaluation that has run."""

    evaluator: CocoEvaluator
    results: CocoResults
    dataset: Any
    """`data.coco.CocoDataset` of the images."""
    weights: str
    """Which weights were scored, in words."""
    iteration: Optional[int]
    """Of the training that made them; None if unknown."""


def add_evaluation(folder: RunFolder, scored: Scored) -> None:
    """Put an evaluation in the place of the one before."""
    images = scored.evaluator.images()
    names = scored.evaluator.category_names
    counts = confusion.count_confusions(images, list(names))
    scored.results.write_per_class(folder.file(PER_CLASS))
    data = confusion.to_csv(counts, list(names.values()))
    write_whole(folder.file(MATRIX), lambda stream: stream.write(data))
    place = {int(image_id): n for n, image_id in enumerate(scored.dataset.image_ids)}
    pictures = []
    for image in choose_pictures(images):
        index = place[image.image_id]
        pictures.append(draw_picture(image, scored.dataset[index].image,
                                     scored.dataset.image_info(index)[0], names))
    folder.write(SUMMARY, {
        "weights": scored.weights, "iteration": scored.iteration, "time": timestamp(),
        "annotations": scored.dataset.annotation_file, "images": len(images),
        "images_in_file": len(place), "notes": scored.results.notes,
        "box": _scores(scored.results, "box"), "mask": _scores(scored.results, "mask"),
        "confusion_matrix": {"score_threshold": confusion.SCORE_THRESHOLD,
                             "iou_threshold": confusion.IOU_THRESHOLD, "iou_of": "masks"},
        "pictures": {"score_threshold": SCORE_THRESHOLD,
                     "shown": [_write_picture(folder, picture) for picture in pictures]}})
    _remove_others(folder, pictures)


def recorded_evaluation(folder: RunFolder) -> Dict[str, Any]:
    """The contents of evaluation.json; empty where nothing was evaluated."""
    return folder.read(SUMMARY)


def _scores(results: CocoResults, kind: str) -> Dict[str, Any]:
    scores = getattr(results, kind)
    return dict(scores.statistics, per_threshold=dict(zip(
        (str(threshold) for threshold in THRESHOLDS), scores.per_threshold)))


def picture_file(image_id: int) -> str:
    """Path of a picture below the run folder."""
    return os.path.join(PICTURES, f"{image_id:012d}.jpg")


def _write_picture(folder: RunFolder, picture: Picture) -> Dict[str, Any]:
    name = picture_file(picture.image_id)
    write_whole(folder.file(name), lambda stream: stream.write(picture.jpeg))
    return {"file": name.replace(os.sep, "/"), "image_id": picture.image_id,
            "image": picture.file_name, "objects": picture.objects,
            "detections": picture.detections}


def _remove_others(folder: RunFolder, pictures: List[Picture]) -> None:
    """Pictures of an evaluation on other images would be mistaken for this one's."""
    kept = {os.path.basename(picture_file(picture.image_id)) for picture in pictures}
    with contextlib.suppress(OSError):
        for name in os.listdir(folder.file(PICTURES)):
            if name.endswith(".jpg") and name not in kept:
                os.unlink(folder.file(PICTURES, name))
