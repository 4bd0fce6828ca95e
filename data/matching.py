"""Matching of ground truth to priors in NumPy: equal to the original's, bit for bit, and fast."""

from __future__ import annotations

from typing import List, NamedTuple, Tuple

import numpy as np

from utils.box_coding import encode_parts

_SMALLEST_SIDE = np.float32(1e-6)
_ZERO, _NEVER, _TAKEN = np.float32(0), np.float32(-1), np.float32(2)


class _Level(NamedTuple):
    """Priors of one pyramid level, `[A, rows, columns]` as the matcher orders them."""

    start: int
    stop: int
    x1: np.ndarray
    """`[A, 1, columns]`; all rows are alike."""
    x2: np.ndarray
    y1: np.ndarray
    """`[A, rows, 1]`; all columns are alike."""
    y2: np.ndarray


class Matcher:
    """Match with fixed priors; see `data.targets.match` for thresholds and results.

    All arithmetic is float32 in the original's order, so that ties and thresholds fall as they do
    there. Priors of a pyramid level lie on a grid: the width that a box shares with a prior depends
    on the column alone and the height on the row alone. Inside, priors are sorted by level, anchor,
    row, column; `order` leads back to the network's order.
    """

    def __init__(self, priors: np.ndarray, pos_threshold: float, neg_threshold: float,
                 crowd_iou: float) -> None:
        self.priors = np.ascontiguousarray(priors, dtype=np.float32)
        self.pos_threshold = np.float32(pos_threshold)
        self.neg_threshold = np.float32(neg_threshold)
        self.crowd_iou = np.float32(crowd_iou)
        half = self.priors[:, 2:] / np.float32(2)
        corners = np.concatenate([self.priors[:, :2] - half, self.priors[:, :2] + half], axis=1)
        self.order, self.levels = _find_levels(self.priors, corners)
        self.place = np.argsort(self.order)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        self.area = area[self.order]
        self._scratch = np.empty((2, 0, len(self.priors)), np.float32)

    def __call__(self, gt_boxes: np.ndarray, gt_labels: np.ndarray,
                 crowd_boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return class_targets int32 `[P]`, gt_index int32 `[P]`, box_targets float32 `[P, 4]`."""
        gt_boxes = np.asarray(gt_boxes, dtype=np.float32).reshape(-1, 4)
        crowd_boxes = np.asarray(crowd_boxes, dtype=np.float32).reshape(-1, 4)
        class_targets = np.zeros(len(self.priors), np.int32)
        gt_index = np.zeros(len(self.priors), np.int32)
        box_targets = np.zeros((len(self.priors), 4), np.float32)
        if len(gt_boxes):
            overlap, gt_index = self._best_objects(gt_boxes)
            near = np.flatnonzero(overlap >= min(self.neg_threshold, self.pos_threshold))
            class_targets[near[overlap[near] >= self.neg_threshold]] = -1
            positive = near[overlap[near] >= self.pos_threshold]
            owners = gt_index[positive]
            class_targets[positive] = np.asarray(gt_labels)[owners]
            box_targets[positive] = _encode(gt_boxes[owners], self.priors[positive])
        if len(crowd_boxes):
            shared, share = self._room(len(crowd_boxes))
            self._intersections(crowd_boxes, out=shared)
            np.divide(shared, self.area, out=share)
            covered = share.max(axis=0) > self.crowd_iou
            class_targets[covered[self.place] & (class_targets == 0)] = -1
        return class_targets, gt_index, box_targets

    def _best_objects(self, gt_boxes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Largest IoU and its object for each prior; 2 where an object claims its best prior."""
        iou, union = self._room(len(gt_boxes))
        self._intersections(gt_boxes, out=iou)
        area = (gt_boxes[:, 2] - gt_boxes[:, 0]) * (gt_boxes[:, 3] - gt_boxes[:, 1])
        np.add(self.area, area[:, None], out=union)
        union -= iou
        iou /= union
        overlap = iou.max(axis=0)
        gt_index = np.zeros(len(self.priors), np.int32)
        for j in range(len(gt_boxes) - 1, 0, -1):
            np.copyto(gt_index, np.int32(j), where=iou[j] == overlap)
        # Object 0 comes first among equals, also where no object overlaps.
        np.copyto(gt_index, np.int32(0), where=iou[0] == overlap)
        overlap, gt_index = overlap[self.place], gt_index[self.place]
        self._claim(iou, overlap, gt_index)
        return overlap, gt_index

    def _claim(self, iou: np.ndarray, overlap: np.ndarray, gt_index: np.ndarray) -> None:
        """Give every object its best prior, the object with the largest IoU first, in place.

        Of equal IoUs the lower index goes first. A prior is given away once; whoever comes later
        takes the best of the others, or none where there are more objects than priors.
        """
        best = iou.max(axis=1)
        best_prior = [self._first_prior(row, peak) for row, peak in zip(iou, best)]
        taken: List[int] = []
        waiting = set(range(len(iou)))
        while waiting and len(taken) < len(self.priors):
            j = int(best.argmax())
            prior = best_prior[j]
            overlap[prior], gt_index[prior] = _TAKEN, j
            best[j] = _NEVER
            waiting.remove(j)
            taken.append(self.place[prior])
            for other in [k for k in waiting if best_prior[k] == prior]:
                iou[other, taken] = _NEVER
                best[other] = iou[other].max()
                best_prior[other] = self._first_prior(iou[other], best[other])

    def _first_prior(self, row: np.ndarray, value: np.float32) -> int:
        return int(self.order[np.flatnonzero(row == value)].min())

    def _room(self, count: int) -> np.ndarray:
        """Two arrays `[count, P]`, kept from call to call: fresh pages cost more than the sums."""
        if self._scratch.shape[1] < count:
            self._scratch = np.empty((2, count, len(self.priors)), np.float32)
        return self._scratch[:, :count]

    def _intersections(self, boxes: np.ndarray, out: np.ndarray) -> None:
        """Area that each box `[n, 4]` shares with each prior, in inner order, to `out` `[n, P]`."""
        x1, y1, x2, y2 = boxes.T[:, :, None, None, None]
        for level in self.levels:
            width = np.maximum(np.minimum(level.x2, x2) - np.maximum(level.x1, x1), _ZERO)
            height = np.maximum(np.minimum(level.y2, y2) - np.maximum(level.y1, y1), _ZERO)
            shape = (len(boxes), len(level.x1), level.y1.shape[1], level.x1.shape[2])
            np.multiply(width, height, out=out[:, level.start:level.stop].reshape(shape))


def _find_levels(priors: np.ndarray, corners: np.ndarray) -> Tuple[np.ndarray, List[_Level]]:
    """Inner order `[P]` of the priors, and the grids they lie on.

    A level ends where a prior lies higher than the one before. Priors that lie on no grid are one
    level of a single row and column.
    """
    ends = np.flatnonzero(priors[1:, 1] < priors[:-1, 1]) + 1
    bounds = [0] + ends.tolist() + [len(priors)]
    order, levels = [], []
    for start, stop in zip(bounds[:-1], bounds[1:]):
        rows, columns = _grid_shape(priors[start:stop], corners[start:stop])
        indices = np.arange(start, stop).reshape(rows, columns, -1).transpose(2, 0, 1)
        order.append(indices.ravel())
        x1, y1, x2, y2 = corners.T[:, indices]
        levels.append(_Level(start, stop, x1[:, :1], x2[:, :1], y1[:, :, :1], y2[:, :, :1]))
    return np.concatenate(order), levels


def _grid_shape(priors: np.ndarray, corners: np.ndarray) -> Tuple[int, int]:
    """Rows and columns of cells, if the priors are stored row by row, cell by cell; else 1, 1."""
    rows = 1 + int(np.count_nonzero(np.diff(priors[:, 1])))
    if len(priors) % rows:
        return 1, 1
    columns = 1 + int(np.count_nonzero(np.diff(priors[:len(priors) // rows, 0])))
    if len(priors) // rows % columns:
        return 1, 1
    grid = corners.reshape(rows, columns, -1, 4)
    alike_x = (grid[..., ::2] == grid[:1, ..., ::2]).all()
    alike_y = (grid[..., 1::2] == grid[:, :1, ..., 1::2]).all()
    return (rows, columns) if alike_x and alike_y else (1, 1)


def _encode(boxes: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """SSD's box encoding: `[n, 4]` corners against `[n, 4]` cxcywh priors."""
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = np.maximum(high - low, _SMALLEST_SIDE)
    return np.concatenate(encode_parts((low + high) / np.float32(2), sides, priors, np.log), axis=1)
