"""Matching of ground truth to priors in NumPy: equal to the original's, bit for bit, and fast."""

from __future__ import annotations

from typing import Dict, List, Tuple

import numpy as np

CENTRE_VARIANCE, SIZE_VARIANCE = np.float32(0.1), np.float32(0.2)
_SMALLEST_SIDE = np.float32(1e-6)
_NEVER, _TAKEN = np.float32(-1), np.float32(2)


class Matcher:
    """Match with fixed priors; see `data.targets.match` for thresholds and results.

    All arithmetic is float32 in the original's order, so that ties and thresholds fall as they do
    there. Most priors are those of the finest pyramid level, stored row by row: they are compared
    only in the rows that a box can reach (elsewhere the IoU is 0).
    """

    def __init__(self, priors: np.ndarray, pos_threshold: float, neg_threshold: float,
                 crowd_iou: float) -> None:
        self.priors = np.ascontiguousarray(priors, dtype=np.float32)
        self.pos_threshold = np.float32(pos_threshold)
        self.neg_threshold = np.float32(neg_threshold)
        self.crowd_iou = np.float32(crowd_iou)
        half = self.priors[:, 2:] / np.float32(2)
        corners = np.concatenate([self.priors[:, :2] - half, self.priors[:, :2] + half], axis=1)
        self.x1, self.y1, self.x2, self.y2 = np.ascontiguousarray(corners.T)
        self.area = (self.x2 - self.x1) * (self.y2 - self.y1)
        descents = np.flatnonzero(self.priors[1:, 1] < self.priors[:-1, 1])
        self.split = int(descents[0]) + 1 if len(descents) else len(self.priors)
        self.row_top = np.ascontiguousarray(self.priors[:self.split, 1])
        self.reach = half[:self.split, 1].max() * np.float32(1.01) if self.split else np.float32(0)

    def __call__(self, gt_boxes: np.ndarray, gt_labels: np.ndarray,
                 crowd_boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return class_targets int32 `[P]`, gt_index int32 `[P]`, box_targets float32 `[P, 4]`."""
        gt_boxes = np.asarray(gt_boxes, dtype=np.float32).reshape(-1, 4)
        crowd_boxes = np.asarray(crowd_boxes, dtype=np.float32).reshape(-1, 4)
        overlap, gt_index = self._best_objects(gt_boxes)
        class_targets = np.zeros(len(self.priors), np.int32)
        box_targets = np.zeros((len(self.priors), 4), np.float32)
        near = np.flatnonzero(overlap >= min(self.neg_threshold, self.pos_threshold))
        class_targets[near[overlap[near] < self.pos_threshold]] = -1
        positive = near[overlap[near] >= self.pos_threshold]
        if len(positive):
            owners = gt_index[positive]
            class_targets[positive] = np.asarray(gt_labels)[owners]
            box_targets[positive] = _encode(gt_boxes[owners], self.priors[positive])
        for box in crowd_boxes:
            covered = self._intersection(box, slice(None)) / self.area > self.crowd_iou
            class_targets[covered & (class_targets == 0)] = -1
        return class_targets, gt_index, box_targets

    def _best_objects(self, gt_boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Largest IoU and its object for each prior; 2 where an object claims its best prior."""
        overlap = np.zeros(len(self.priors), np.float32)
        gt_index = np.zeros(len(self.priors), np.int32)
        best = np.zeros(len(gt_boxes), np.float32)
        best_prior = np.zeros(len(gt_boxes), np.int64)
        for j, box in enumerate(gt_boxes):
            for part in self._parts(box):
                iou = self._iou(box, part)
                if not len(iou):
                    continue
                peak = int(iou.argmax())
                if iou[peak] > best[j]:
                    best[j], best_prior[j] = iou[peak], part.start + peak
                better = iou > overlap[part]
                np.copyto(overlap[part], iou, where=better)
                np.copyto(gt_index[part], np.int32(j), where=better)
        self._claim(gt_boxes, best, best_prior, overlap, gt_index)
        return overlap, gt_index

    def _claim(self, gt_boxes: np.ndarray, best: np.ndarray, best_prior: np.ndarray,
               overlap: np.ndarray, gt_index: np.ndarray) -> None:
        """Give every object its best prior, the object with the largest IoU first, in place.

        Of equal IoUs the lower index goes first. A prior is given away once; whoever comes later
        takes the best of the others.
        """
        rows: Dict[int, np.ndarray] = {}
        taken: List[int] = []
        for _ in range(len(gt_boxes)):
            j = int(best.argmax())
            prior = int(best_prior[j])
            overlap[prior], gt_index[prior] = _TAKEN, j
            best[j] = _NEVER
            taken.append(prior)
            for other in np.flatnonzero((best > _NEVER) & (best_prior == prior)).tolist():
                if other not in rows:
                    rows[other] = self._iou(gt_boxes[other], slice(0, len(self.priors)))
                row = rows[other]
                row[taken] = _NEVER
                best_prior[other] = row.argmax()
                best[other] = row[best_prior[other]]

    def _parts(self, box: np.ndarray) -> Tuple[slice, slice]:
        """Stretches of priors that hold every prior whose IoU with `box` is above 0."""
        first, last = np.searchsorted(self.row_top, [box[1] - self.reach, box[3] + self.reach])
        return slice(int(first), int(last)), slice(self.split, len(self.priors))

    def _intersection(self, box: np.ndarray, part: slice) -> np.ndarray:
        x1, y1, x2, y2 = box
        width = np.minimum(self.x2[part], x2)
        width -= np.maximum(self.x1[part], x1)
        np.maximum(width, np.float32(0), out=width)
        height = np.minimum(self.y2[part], y2)
        height -= np.maximum(self.y1[part], y1)
        np.maximum(height, np.float32(0), out=height)
        width *= height
        return width

    def _iou(self, box: np.ndarray, part: slice) -> np.ndarray:
        area = (box[2] - box[0]) * (box[3] - box[1])
        intersection = self._intersection(box, part)
        union = self.area[part] + area
        union -= intersection
        intersection /= union
        return intersection


def _encode(boxes: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """SSD's box encoding: `[n, 4]` corners against `[n, 4]` cxcywh priors."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / np.float32(2) - priors[:, :2]
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], _SMALLEST_SIDE) / priors[:, 2:]
    return np.concatenate([centres / (CENTRE_VARIANCE * priors[:, 2:]),
                           np.log(sides) / SIZE_VARIANCE], axis=1)
