"""Target assignment on the host: everything of the loss that depends on the ground truth alone.

Letters: G ground-truth slots, K mask samples, P priors, C classes with background, S input side.
"""

from __future__ import annotations

from typing import Any, Dict, Tuple

import numpy as np

from data.augment import AugmentedSample
from data.masks import MaskShrinker
from data.matching import Matcher


def match(gt_boxes: np.ndarray, gt_labels: np.ndarray, crowd_boxes: np.ndarray, priors: np.ndarray,
          pos_threshold: float, neg_threshold: float,
          crowd_iou: float = 0.7) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
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


SLOT_STEP = 8
"""Ground-truth slots are a multiple of this."""


def ground_truth_slots(largest: int) -> int:
    """G for a dataset whose fullest image has `largest` objects."""
    return -(-max(largest, 1) // SLOT_STEP) * SLOT_STEP


def smallest_int(largest: int) -> Any:
    """The smallest type torch and every device know that holds -1 and `largest`."""
    for kind in (np.int8, np.int16, np.int32):
        if largest <= np.iinfo(kind).max:
            return kind
    return np.int64


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
        self.size, self.proto_size, self.semantic_size = size, proto_size, semantic_size
        self.label_type = smallest_int(num_classes - 1)
        self.prior_type = smallest_int(len(priors) - 1)
        self.slot_type = smallest_int(max_objects - 1)

    def __call__(self, sample: AugmentedSample, rng: np.random.Generator) -> Dict[str, Any]:
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
        targets = {
            "image": sample.image,
            "image_ids": sample.image_id,
            "class_targets": class_targets.astype(self.label_type),
            "box_targets": box_targets,
        }
        targets.update(self._mask_samples(class_targets, gt_index, rng))
        targets.update(self._ground_truth(sample))
        return targets

    def _mask_samples(self, class_targets: np.ndarray, gt_index: np.ndarray,
                      rng: np.random.Generator) -> Dict[str, Any]:
        slots = self.masks_to_train
        positives = np.flatnonzero(class_targets > 0)
        sampled = positives
        if len(positives) > slots:
            sampled = np.sort(rng.choice(positives, slots, replace=False))
        mask_index = np.zeros(slots, self.prior_type)
        mask_gt = np.zeros(slots, self.slot_type)
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

    def _ground_truth(self, sample: AugmentedSample) -> Dict[str, Any]:
        """Padded to G slots; an empty slot has a harmless box, label 0 and no mask."""
        count, slots = len(sample.boxes), self.max_objects
        boxes = np.zeros((slots, 4), np.float32)
        boxes[count:, 2:] = 1
        labels = np.zeros(slots, self.label_type)
        masks = np.zeros((slots, self.proto_size, self.proto_size), np.uint8)
        semantic = np.zeros((self.num_classes - 1, self.semantic_size, self.semantic_size),
                            np.uint8)
        boxes[:count] = sample.boxes
        labels[:count] = sample.labels
        extents = sample.mask_extents
        if extents is None:
            extents = np.tile([0, 0, self.size, self.size], (count, 1))
        for slot, (label, extent) in enumerate(zip(sample.labels.tolist(), extents.tolist())):
            self.shrink(sample.masks[slot], extent, out=masks[slot])
            self.shrink_semantic(sample.masks[slot], extent, out=semantic[label - 1])
        return {"gt_boxes": boxes, "gt_labels": labels, "gt_masks": masks, "semantic": semantic}
