"""The training loss of YOLACT: box, confidence, mask and semantic terms from static tensors."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from layers.mask_loss import flat_index, mask_loss, select_rows
from layers.ohem import ohem_cross_entropy


class MultiBoxLoss(nn.Module):
    """B (boxes), C (confidence), M (masks) and S (semantic segmentation), weighted and normalised.

    Everything that depends on the ground truth alone arrives ready-made in the batch, so that no
    shape here depends on a value and nothing is read back to the host. All terms are computed in
    float32, whatever the predictions' type; under autocast, call it outside of the context.

    Args:
        num_classes: C, classes with background.
        bbox_alpha, conf_alpha, mask_alpha, semantic_alpha: weights of the four terms.
        ohem_negpos_ratio: hard negatives mined for each positive.
    """

    def __init__(self, num_classes: int, bbox_alpha: float = 1.5, conf_alpha: float = 1.0,
                 mask_alpha: float = 6.125, semantic_alpha: float = 1.0,
                 ohem_negpos_ratio: float = 3.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.bbox_alpha = bbox_alpha
        self.conf_alpha = conf_alpha
        self.mask_alpha = mask_alpha
        self.semantic_alpha = semantic_alpha
        self.ohem_negpos_ratio = ohem_negpos_ratio

    @classmethod
    def from_config(cls, config: Any) -> MultiBoxLoss:
        """Build the loss of a `data.config.Config`."""
        return cls(config.num_classes, bbox_alpha=config.bbox_alpha, conf_alpha=config.conf_alpha,
                   mask_alpha=config.mask_alpha, semantic_alpha=config.semantic_alpha,
                   ohem_negpos_ratio=config.ohem_negpos_ratio)

    def forward(self, predictions: Dict[str, Tensor], batch: Any,
                num_positives: Optional[Tensor] = None) -> Dict[str, Tensor]:
        """Compute the four losses.

        Args:
            predictions: "loc" `[B,P,4]`, "conf" `[B,P,C]` logits, "mask" `[B,P,k]`,
                "proto" `[B,h,w,k]`, "segm" `[B,C-1,hs,ws]` logits.
            batch: a `data.batch.Batch` or anything with its fields.
            num_positives: 0-d tensor above 0 that B, C and M are divided by instead of the batch's
                own number of positives. With W cards whose gradients are averaged, the sum over all
                cards divided by W gives the gradient of the undivided batch.

        Returns:
            "B", "C", "M", "S": 0-d float32 tensors. Finite for every legal batch; B, C and M are
            0 where there are no positives.

        Raises:
            ValueError: the predictions' number of classes is not `num_classes`.
        """
        conf = predictions["conf"].float()
        if conf.shape[2] != self.num_classes:
            raise ValueError("predictions have {} classes, the loss was built for {}".format(
                conf.shape[2], self.num_classes))
        if num_positives is None:
            num_positives = batch.num_positives.sum().clamp(min=1)
        normaliser = num_positives.float()
        targets = batch.class_targets.int()  # comparisons of smaller integers are slow on NPU
        conf_sum, _ = ohem_cross_entropy(conf, targets, batch.num_positives,
                                         self.ohem_negpos_ratio)
        box_sum = _box_sum(predictions["loc"].float(), batch.box_targets, targets > 0)
        return {
            "B": box_sum * self.bbox_alpha / normaliser,
            "C": conf_sum * self.conf_alpha / normaliser,
            "M": _mask_sum(predictions, batch) * self.mask_alpha / normaliser,
            "S": self._semantic(predictions["segm"].float(), batch.semantic),
        }

    def _semantic(self, logits: Tensor, targets: Tensor) -> Tensor:
        batch, _, height, width = logits.shape
        total = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
        return total * (self.semantic_alpha / (height * width * batch))


def _box_sum(loc: Tensor, box_targets: Tensor, positive: Tensor) -> Tensor:
    losses = F.smooth_l1_loss(loc, box_targets, reduction="none")
    return (losses * positive.unsqueeze(-1)).sum()


def _mask_sum(predictions: Dict[str, Tensor], batch: Any) -> Tensor:
    coefficients = predictions["mask"]
    priors = flat_index(batch.mask_index, coefficients.shape[1])
    slots = flat_index(batch.mask_gt, batch.gt_boxes.shape[1])
    return mask_loss(
        coefficients=select_rows(coefficients, priors).float(),
        proto=predictions["proto"].float(),
        boxes=select_rows(batch.gt_boxes, slots),
        masks=select_rows(batch.gt_masks, slots),
        weights=batch.mask_valid * batch.mask_scale.unsqueeze(1))
