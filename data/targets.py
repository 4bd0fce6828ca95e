"""Target assignment on the host: everything of the loss that depends on the ground truth alone.

Letters: G ground-truth slots, K mask samples, P priors, C classes with background, S input side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.augment import AugmentedSample
from data.masks import MaskShrinker
from layers.box_ops import encode_parts

SLOT_STEP = 8
"""Ground-truth slots are a multiple of this."""

_SMALLEST_SIDE = np.float32(1e-6)
_ZERO, _NEVER, _TAKEN = np.float32(0), np.float32(-1), np.float32(2)


def match(gt_boxes: np.ndarray, gt_labels: np.ndarray, crowd_boxes: np.ndarray, priors: np.ndarray,
          pos_threshold: float, neg_threshold: float,
          crowd_iou: float = 0.7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign ground truth to priors, as the original does (SSD's matching, greedy for best priors).

    Args:
        gt_boxes: `[n, 4]`, x1 y1 x2 y2 relative; n may be 0.
        gt_labels: `[n]`, 1..C-1.
        crowd_boxes: `[m, 4]`, as `gt_boxes`; background priors they cover become neutral.
        priors: `[P, 4]`, cx cy w h relative.
        pos_threshold: IoU from which a prior is positive.
        neg_threshold: IoU below which a prior is background; neutral in between.
        crowd_iou: share of a prior inside a crowd above which background becomes neutral.

    Returns:
        class_targets int32 `[P]`: the label, 0 background, -1 neutral; gt_index int32 `[P]`: the
        object with the largest IoU; box_targets float32 `[P, 4]`: encoded boxes at positives,
        0 elsewhere. Always finite.
    """
    return Matcher(priors, pos_threshold, neg_threshold, crowd_iou)(
        gt_boxes, gt_labels, crowd_boxes)


class Matcher:
    """Match with fixed priors, fast; see `match` for thresholds and results.

    All arithmetic is float32 in the original's order, so that ties and thresholds fall as they do
    there. Priors lie on grids: few intervals along x, of which each prior has one, and few along y.
    """

    def __init__(self, priors: np.ndarray, pos_threshold: float, neg_threshold: float,
                 crowd_iou: float) -> None:
        self.priors = np.ascontiguousarray(priors, dtype=np.float32)
        self.pos_threshold = np.float32(pos_threshold)
        self.neg_threshold = np.float32(neg_threshold)
        self.crowd_iou = np.float32(crowd_iou)
        half = self.priors[:, 2:] / np.float32(2)
        corners = np.concatenate([self.priors[:, :2] - half, self.priors[:, :2] + half], axis=1)
        self.columns, self.column_of = _intervals(corners[:, 0::2])
        self.rows, self.row_of = _intervals(corners[:, 1::2])
        self.area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        self._scratch = np.empty((2, 0, len(self.priors)), np.float32)

    def __call__(self, gt_boxes: np.ndarray, gt_labels: np.ndarray,
                 crowd_boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
            class_targets[covered & (class_targets == 0)] = -1
        return class_targets, gt_index, box_targets

    def _best_objects(self, gt_boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Largest IoU and its object for each prior; 2 where an object claims its best prior."""
        iou, union = self._room(len(gt_boxes))
        self._intersections(gt_boxes, out=iou)
        area = (gt_boxes[:, 2] - gt_boxes[:, 0]) * (gt_boxes[:, 3] - gt_boxes[:, 1])
        np.add(self.area, area[:, None], out=union)
        union -= iou
        iou /= union
        overlap = iou.max(axis=0)
        gt_index = np.zeros(len(self.priors), np.int32)
        for j in range(len(gt_boxes) - 1, -1, -1):  # the first one among equals
            np.copyto(gt_index, np.int32(j), where=iou[j] == overlap)
        self._claim(iou, overlap, gt_index)
        return overlap, gt_index

    def _claim(self, iou: np.ndarray, overlap: np.ndarray, gt_index: np.ndarray) -> None:
        """Give every object its best prior, the object with the largest IoU first, in place.

        Of equal IoUs the lower index goes first. A prior is given away once; whoever comes later
        takes the best of the others, or none where there are more objects than priors.
        """
        best = iou.max(axis=1)  # of an object whose prior is gone: no less than it can get
        best_prior = iou.argmax(axis=1)  # the first one of equals
        free = np.ones(len(self.priors), bool)
        left = min(len(iou), len(self.priors))
        while left:
            j = int(best.argmax())
            prior = int(best_prior[j])
            if free[prior]:
                overlap[prior], gt_index[prior] = _TAKEN, j
                best[j] = _NEVER
                free[prior] = False
                left -= 1
            else:
                np.copyto(iou[j], _NEVER, where=~free)
                best[j] = iou[j].max()
                best_prior[j] = iou[j].argmax()

    def _room(self, count: int) -> np.ndarray:
        """Two arrays `[count, P]`, kept from call to call: fresh pages cost more than the sums."""
        if self._scratch.shape[1] < count:
            self._scratch = np.empty((2, count, len(self.priors)), np.float32)
        return self._scratch[:, :count]

    def _intersections(self, boxes: np.ndarray, out: np.ndarray) -> None:
        """Area that each box `[n, 4]` shares with each prior, to `out` `[n, P]`."""
        _shared(boxes[:, 0::2], self.columns).take(self.column_of, axis=1, out=out, mode="clip")
        out *= _shared(boxes[:, 1::2], self.rows).take(self.row_of, axis=1)


def _intervals(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of the intervals `[P, 2]`: `[2, u]`, and which of them each is: `[P]`."""
    different, index = np.unique(ends, axis=0, return_inverse=True)
    return different.T.copy(), index.ravel()


def _shared(ends: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Length that each of `ends` `[n, 2]` shares with each of `intervals` `[2, u]`: `[n, u]`."""
    low = np.maximum(ends[:, :1], intervals[0])
    return np.maximum(np.minimum(ends[:, 1:], intervals[1]) - low, _ZERO)


def _encode(boxes: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Targets of corner boxes `[n, 4]` against `[n, 4]` cxcywh priors; finite for empty boxes."""
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = np.maximum(high - low, _SMALLEST_SIDE)
    return np.concatenate(encode_parts((low + high) / np.float32(2), sides, priors, np.log), axis=1)


def ground_truth_slots(largest: int) -> int:
    """G for a dataset whose fullest image has `largest` objects."""
    return -(-max(largest, 1) // SLOT_STEP) * SLOT_STEP


class TargetMaker:
    """Turn an `AugmentedSample` into the static arrays of a `Batch`.

    Args:
        priors: `[P, 4]`, cx cy w h relative, in the order of the network's output.
        num_classes: C.
        max_objects: G, at least the dataset's largest number of objects in an image.
        masks_to_train: K.
        size: S, side of the augmented images.
        proto_size: h, side of the prototype masks.
        semantic_size: hs, side of the semantic segmentation.
        pos_threshold, neg_threshold, crowd_iou: see `match`.
    """

    def __init__(self, priors: np.ndarray, num_classes: int, max_objects: int, masks_to_train: int,
                 size: int, proto_size: int, semantic_size: int, pos_threshold: float = 0.5,
                 neg_threshold: float = 0.4, crowd_iou: float = 0.7) -> None:
        self.matcher = Matcher(priors, pos_threshold, neg_threshold, crowd_iou)
        self.num_classes = num_classes
        self.max_objects = max_objects
        self.masks_to_train = masks_to_train
        self.shrink = MaskShrinker(size, proto_size)
        self.shrink_semantic = MaskShrinker(size, semantic_size)
        self.proto_size, self.semantic_size = proto_size, semantic_size
        self.label_type = np.int8 if num_classes <= 128 else np.int32

    def __call__(self, sample: AugmentedSample, rng: np.random.Generator) -> dict[str, Any]:
        """Return `image` (BGR, `[S, S, 3]`), `image_ids` and one row of every target of a `Batch`.

        `rng` chooses the mask samples where there are more than K positives.

        Raises:
            ValueError: the image has more objects than G.
        """
        count = len(sample.boxes)
        if count > self.max_objects:
            raise ValueError(f"image {sample.image_id} has {count} objects, more than the "
                             f"{self.max_objects} slots of a batch")
        class_targets, gt_index, box_targets = self.matcher(
            sample.boxes, sample.labels, sample.crowd_boxes)
        return {
            "image": sample.image,
            "image_ids": sample.image_id,
            "class_targets": class_targets.astype(self.label_type),
            "box_targets": box_targets,
            **self._mask_samples(class_targets, gt_index, rng),
            **self._ground_truth(sample),
        }

    def _mask_samples(self, class_targets: np.ndarray, gt_index: np.ndarray,
                      rng: np.random.Generator) -> dict[str, Any]:
        slots = self.masks_to_train
        positives = np.flatnonzero(class_targets > 0)
        sampled = positives
        if len(positives) > slots:
            sampled = np.sort(rng.choice(positives, slots, replace=False))
        mask_index = np.zeros(slots, np.int32)
        mask_gt = np.zeros(slots, np.int32)
        mask_valid = np.zeros(slots, bool)
        mask_index[:len(sampled)] = sampled
        mask_gt[:len(sampled)] = gt_index[sampled]
        mask_valid[:len(sampled)] = True
        return {
            "num_positives": len(positives),
            "mask_index": mask_index,
            "mask_gt": mask_gt,
            "mask_valid": mask_valid,
            "mask_scale": len(positives) / max(len(sampled), 1) if len(sampled) else 1.0,
        }

    def _ground_truth(self, sample: AugmentedSample) -> dict[str, Any]:
        """Padded to G slots; an empty slot has a harmless box, label 0 and no mask."""
        count, slots = len(sample.boxes), self.max_objects
        boxes = np.zeros((slots, 4), np.float32)
        boxes[count:, 2:] = 1
        labels = np.zeros(slots, np.int32)
        masks = np.zeros((slots, self.proto_size, self.proto_size), np.uint8)
        semantic = np.zeros((self.num_classes - 1, self.semantic_size, self.semantic_size),
                            np.uint8)
        boxes[:count] = sample.boxes
        labels[:count] = sample.labels
        for slot, (label, extent) in enumerate(zip(sample.labels.tolist(),
                                                   sample.mask_extents.tolist())):
            self.shrink(sample.masks[slot], extent, out=masks[slot])
            self.shrink_semantic(sample.masks[slot], extent, out=semantic[label - 1])
        return {"gt_boxes": boxes, "gt_labels": labels, "gt_masks": masks, "semantic": semantic}
