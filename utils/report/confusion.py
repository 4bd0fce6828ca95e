"""Which classes are taken for which: the confusion matrix of an evaluation.

Detections with a score of at least `SCORE_THRESHOLD` are matched to the objects of their image,
of whatever class, where the IoU of the masks is at least `IOU_THRESHOLD`: the highest score first,
each takes the object with the largest IoU that is left (of equal ones one of its class). So of
several detections of one object, which suppression leaves where their classes differ, the surest
one counts. A row is the class of an object, a column that of a detection:

    [object's class][detection's class]   a matched pair; on the diagonal it is right
    [object's class][background]          an object that nothing was matched to: missed
    [background][detection's class]       a detection that nothing was left for: false or double

Crowd regions are no objects; an unmatched detection that lies in one (by half of its mask) does not
count, as in COCO's evaluation.
"""

from __future__ import annotations

import csv
import io
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import pycocotools.mask

from utils.inference.evaluator import ScoredImage
from utils.report.figure import INK, MUTED, Letters, new_figure, to_png

SCORE_THRESHOLD = 0.3
IOU_THRESHOLD = 0.5
BACKGROUND = "background"
_MOST_NUMBERS = 25
_MOST_LABELS = 120


def count_confusions(images: Iterable[ScoredImage], category_ids: Sequence[int],
                     score_threshold: float = SCORE_THRESHOLD,
                     iou_threshold: float = IOU_THRESHOLD) -> np.ndarray:
    """Count matches over all images; see the module's first lines.

    Args:
        images: detections and ground truth.
        category_ids: in the order of the rows and columns.
        score_threshold: smallest score of the masks that takes part.
        iou_threshold: smallest IoU of a pair.

    Returns:
        int64 `[n + 1, n + 1]` for n categories; the last row and column are the background.
    """
    place = {int(number): n for n, number in enumerate(category_ids)}
    background = len(place)
    counts = np.zeros((background + 1, background + 1), np.int64)
    for image in images:
        found = [item for item in image.detections if item["mask_score"] >= score_threshold]
        objects = [item for item in image.objects if not item["iscrowd"]]
        rows = [place[item["category_id"]] for item in objects]
        columns = [place[item["category_id"]] for item in found]
        pairs = _match(found, objects, iou_threshold)
        for detection, truth in pairs:
            counts[rows[truth], columns[detection]] += 1
        matched = {detection for detection, _ in pairs}
        crowds = [item for item in image.objects if item["iscrowd"]]
        for n in set(range(len(found))) - matched - _inside(found, crowds, iou_threshold):
            counts[background, columns[n]] += 1
        for n in set(range(len(objects))) - {truth for _, truth in pairs}:
            counts[rows[n], background] += 1
    return counts


def _match(found: Sequence[Dict[str, Any]], objects: Sequence[Dict[str, Any]],
           iou_threshold: float) -> List[Tuple[int, int]]:
    """Pairs of a detection and an object, each at most once, the highest score first."""
    if not found or not objects:
        return []
    ious = np.asarray(pycocotools.mask.iou(_rles(found), _rles(objects), [0] * len(objects)))
    pairs: Dict[int, int] = {}
    left = set(range(len(objects)))
    for detection in sorted(range(len(found)), key=lambda n: -found[n]["mask_score"]):
        candidates = [(-ious[detection, truth], objects[truth]["category_id"]
                       != found[detection]["category_id"], truth)
                      for truth in left if ious[detection, truth] >= iou_threshold]
        if candidates:
            pairs[detection] = min(candidates)[-1]
            left.remove(pairs[detection])
    return sorted(pairs.items())


def _inside(found: Sequence[Dict[str, Any]], crowds: Sequence[Dict[str, Any]],
            share: float) -> set:
    """Detections of whose mask at least `share` lies in a crowd region."""
    if not found or not crowds:
        return set()
    covered = np.asarray(pycocotools.mask.iou(_rles(found), _rles(crowds), [1] * len(crowds)))
    return set(np.nonzero((covered >= share).any(axis=1))[0].tolist())


def _rles(items: Sequence[Dict[str, Any]]) -> List[Any]:
    return [item["segmentation"] for item in items]


def to_csv(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """The counts with a first row and column of names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = list(names) + [BACKGROUND]
    writer.writerow(["object \\ detection"] + labels)
    for label, row in zip(labels, counts.tolist()):
        writer.writerow([label] + row)
    return text.getvalue().encode("utf-8")


def from_csv(data: bytes) -> Optional[Tuple[np.ndarray, List[str]]]:
    """Counts and class names that `to_csv` wrote; None for anything else."""
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"))))
    try:
        counts = np.array([row[1:] for row in rows[1:]], dtype=np.int64)
    except ValueError:
        return None
    names = rows[0][1:-1] if rows else []
    return (counts, names) if counts.shape == (len(names) + 1,) * 2 else None


def worst_confusions(counts: np.ndarray, most: int = 10) -> List[Tuple[int, int, int]]:
    """Row, column and count of the most frequent pairs of different classes, without background."""
    wrong = counts[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [(int(row), int(column), int(wrong[row, column])) for row, column in zip(rows, columns)
            if wrong[row, column]]


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG of the matrix; colours are shares of a row, numbers are counts."""
    labels = list(names) + [BACKGROUND]
    letters = Letters(labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.2 + 0.42 * len(labels), 4.2, 6.4 if len(labels) <= 40 else 11.0))
    figure, (axes,) = new_figure(side * 1.12, side)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
                        aspect="equal")
    axes.set_title("Confusion matrix", loc="left", fontsize=11, color=INK, fontweight="bold",
                   pad=10)
    axes.set_xlabel("detection", fontsize=9, color=MUTED)
    axes.set_ylabel("object", fontsize=9, color=MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _label_axes(axes, labels, letters)
    if len(labels) <= _MOST_NUMBERS:
        _write_numbers(axes, counts, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.03)
    bar.set_label("share of the row", fontsize=8.5, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.outline.set_visible(False)
    return to_png(figure)


def _label_axes(axes: Any, labels: Sequence[str], letters: Letters) -> None:
    if len(labels) > _MOST_LABELS:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    size = 8.5 if len(labels) <= 30 else max(4.0, 480.0 / len(labels))
    texts = [letters[label] for label in labels]
    axes.set_xticks(range(len(labels)))
    axes.set_yticks(range(len(labels)))
    axes.set_xticklabels(texts, rotation=90 if len(labels) > 8 else 35,
                         ha="center" if len(labels) > 8 else "right", rotation_mode="anchor"
                         if len(labels) <= 8 else "default")
    axes.set_yticklabels(texts)
    axes.tick_params(labelsize=size, colors=INK, length=0)
    letters.apply(axes.get_xticklabels() + axes.get_yticklabels())


def _write_numbers(axes: Any, counts: np.ndarray, shares: np.ndarray) -> None:
    size = float(np.clip(11 - 0.3 * len(counts), 4.5, 9))
    for row, column in zip(*np.nonzero(counts)):
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=size,
                  color="white" if shares[row, column] > 0.55 else INK)
