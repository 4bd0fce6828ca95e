"""The training loss of YOLACT: box, confidence, mask, semantic and mask-IoU terms, all static."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.masks import crop_to_boxes, inside_box, mask_logits

SMALLEST_AREA = 1e-9
"""Keeps padded slots (area 0) out of a division by zero; far below one pixel of any input."""

WEIGHTS = {"B": 1.5, "C": 1.0, "M": 6.125, "S": 1.0, "I": 25.0}
"""Of each term, in the original's recipes."""

RowLosses = Callable[[Tensor, Tensor], Tensor]
"""`cross_entropy`, or a kernel in its place."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy `[N]` of rows of logits `[N, C]` and labels int64 `[N]`, in plain PyTorch."""
    return F.cross_entropy(logits, labels, reduction="none")


class MultiBoxLoss(nn.Module):
    """B (boxes), C (confidence), M (masks) and S (semantic segmentation), weighted and normalised.

    With YOLACT++'s mask re-scoring there is a fifth, I (the masks' IoU). It trains a part of the
    network that only runs here, which is why the loss is given that part. Under
    DistributedDataParallel its gradients are averaged like all others, since every step, also one
    without positives, makes them; only `find_unused_parameters` must stay off.

    Everything that depends on the ground truth alone arrives ready-made in the batch, so that no
    shape here depends on a value and nothing is read back to the host. All terms are computed in
    float32, whatever the predictions' type; under autocast, call it outside of the context.

    Args:
        num_classes: C, classes with background.
        weights: of each term, by its letter.
        ohem_negpos_ratio: hard negatives mined for each positive.
        mask_iou_net: the network's `layers.heads.MaskIouNet`; None leaves I out.
        discard_mask_area: ground-truth masks of up to this many prototype pixels do not count in I.
        class_factors: `[C]`, on the confidence loss of each class's positives; the first, of the
            background, is 1. None leaves the factors out.
        row_losses: cross entropy of rows, see `ohem_cross_entropy`.
    """

    class_factors: Tensor | None

    def __init__(self, num_classes: int, weights: Mapping[str, float] = WEIGHTS,
                 ohem_negpos_ratio: float = 3.0, mask_iou_net: nn.Module | None = None,
                 discard_mask_area: float = 25, class_factors: Sequence[float] | None = None,
                 row_losses: RowLosses = cross_entropy) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = weights
        self.ohem_negpos_ratio = ohem_negpos_ratio
        self.mask_iou_net = mask_iou_net
        self.discard_mask_area = discard_mask_area
        self.row_losses = row_losses
        self.register_buffer("class_factors", None if class_factors is None else
                             torch.tensor(class_factors, dtype=torch.float32))

    @classmethod
    def from_config(cls, config: Any, mask_iou_net: nn.Module | None = None,
                    class_factors: Sequence[float] | None = None,
                    row_losses: RowLosses = cross_entropy) -> MultiBoxLoss:
        """Build the loss of a `data.config.Config`, with the `maskiou_net` of its network.

        Raises:
            ValueError: the recipe re-scores masks and there is no network for it, or the reverse.
        """
        if config.use_maskiou != (mask_iou_net is not None):
            need = "needs" if config.use_maskiou else "must not be given"
            raise ValueError(f"configuration '{config.name}' has use_maskiou={config.use_maskiou}, "
                             f"so the loss {need} the network's maskiou_net")
        weights = {"B": config.bbox_alpha, "C": config.conf_alpha, "M": config.mask_alpha,
                   "S": config.semantic_alpha, "I": config.maskiou_alpha}
        return cls(config.num_classes, weights, config.ohem_negpos_ratio, mask_iou_net,
                   config.discard_mask_area, class_factors, row_losses)

    def forward(self, predictions: dict[str, Tensor], batch: Any,
                num_positives: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            predictions: "loc" `[B,P,4]`, "conf" `[B,P,C]` logits, "mask" `[B,P,k]`,
                "proto" `[B,h,w,k]`, "segm" `[B,C-1,hs,ws]` logits.
            batch: a `data.batch.Batch` or anything with its fields.
            num_positives: 0-d tensor that B, C, M and I are divided by instead of the batch's own
                number of positives. With W cards whose gradients are averaged, the sum over all
                cards divided by W gives the gradient of the undivided batch.

        Returns:
            "B", "C", "M", "S" and with a `mask_iou_net` "I": 0-d float32 tensors. Finite for every
            legal batch; all but S are 0 where there are no positives.

        Raises:
            ValueError: the predictions' number of classes is not `num_classes`.
        """
        conf = predictions["conf"].float()
        if conf.shape[2] != self.num_classes:
            raise ValueError(f"predictions have {conf.shape[2]} classes, the loss was built for "
                             f"{self.num_classes}")
        if num_positives is None:
            num_positives = batch.num_positives.float().sum().clamp(min=1)  # 64 bits are slow
        normaliser = num_positives.float()
        targets = batch.class_targets.int()  # comparisons of smaller integers are slow on NPU
        conf_sum, _ = ohem_cross_entropy(conf, targets, batch.num_positives,
                                         self.ohem_negpos_ratio, self.class_factors,
                                         self.row_losses)
        box_losses = F.smooth_l1_loss(predictions["loc"].float(), batch.box_targets,
                                      reduction="none")
        box_sum = (box_losses * (targets > 0).unsqueeze(-1)).sum()
        mask_sums = self._mask_sums(predictions, batch)
        segm = predictions["segm"].float()
        semantic_sum = F.binary_cross_entropy_with_logits(segm, batch.semantic.float(),
                                                          reduction="sum")
        semantic_cells = segm.shape[0] * segm.shape[2] * segm.shape[3]
        losses = {
            "B": box_sum * self.weights["B"] / normaliser,
            "C": conf_sum * self.weights["C"] / normaliser,
            "M": mask_sums[0] * self.weights["M"] / normaliser,
            "S": semantic_sum * (self.weights["S"] / semantic_cells),
        }
        if len(mask_sums) > 1:
            losses["I"] = mask_sums[1] * self.weights["I"] / normaliser
        return losses

    def _mask_sums(self, predictions: dict[str, Tensor], batch: Any) -> list[Tensor]:
        """M and I, or M alone, before their weights."""
        coefficients = predictions["mask"]
        priors = flat_index(batch.mask_index, coefficients.shape[1])
        slots = flat_index(batch.mask_gt, batch.gt_boxes.shape[1])
        logits = mask_logits(select_rows(coefficients, priors).float(),
                             predictions["proto"].float())
        boxes = select_rows(batch.gt_boxes, slots)
        masks = select_rows(batch.gt_masks, slots)
        weights = batch.mask_valid * batch.mask_scale.unsqueeze(1)
        sums = [mask_loss(logits, boxes, masks, weights)]
        if self.mask_iou_net is not None:
            labels = select_rows(batch.gt_labels, slots)
            sums.append(mask_iou_loss(self.mask_iou_net, logits, boxes, masks, labels,
                                      batch.mask_valid, self.discard_mask_area))
        return sums


def ohem_cross_entropy(conf: Tensor, class_targets: Tensor, num_positives: Tensor,
                       negpos_ratio: float, class_factors: Tensor | None = None,
                       row_losses: RowLosses = cross_entropy) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over all positives and the hardest negatives of each image.

    A negative's hardness is its log-sum-exp minus its background logit (YOLACT, Liu et al.'s SSD),
    which is the cross entropy itself. The log-sum-exp is taken by rows; the original subtracts
    the largest logit of the whole batch, so that rows 100 below it are never mined.

    Args:
        conf: float `[B, P, C]` logits.
        class_targets: integer `[B, P]`, class 1..C-1, 0 background, -1 neutral.
        num_positives: integer `[B]`, number of priors with a class above 0.
        negpos_ratio: negatives mined for each positive.
        class_factors: float `[C]`, what the loss of each class's positives is multiplied by; that
            of the background has to be 1. Mining does not see them. None is 1 for all.
        row_losses: never gets a label out of range.

    Returns:
        0-d float, the sum over the batch; bool `[B, P]`, the mined negatives.
    """
    batch, priors, classes = conf.shape
    # Class -1 is out of range for the kernels (undefined on NPU); neutral rows are masked below.
    labels = class_targets.clamp(min=0).long()
    losses = row_losses(conf.reshape(-1, classes), labels.reshape(-1)).reshape(batch, priors)
    background = class_targets == 0
    count = (num_positives * negpos_ratio).clamp(max=priors - 1).unsqueeze(1)
    mined = hardest_negatives(losses.detach() * background, count) & background
    if class_factors is not None:
        losses = losses * class_factors.index_select(0, labels.reshape(-1)).view_as(losses)
    return (losses * (mined | (class_targets > 0))).sum(), mined


def hardest_negatives(scores: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` highest scores of each row.

    Args:
        scores: float `[B, P]`, at least 0; 0 where a prior must not be mined.
        count: integer `[B, 1]`, how many to mark in each row.

    Returns:
        bool `[B, P]`. Exactly `count` per row are marked, also among equal scores.
    """
    order = scores.sort(dim=1, descending=True)[1]
    position = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    # The rank of a prior is the inverse permutation of the order: one scatter, no second sort. Of
    # 32 bits: the cores of an Ascend card scatter none of 64.
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, position.expand_as(order))
    return rank < count


def mask_loss(logits: Tensor, boxes: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Weighted binary cross entropy inside each sample's box, divided by the box's area.

    Follows lincomb_mask_loss of YOLACT: the predicted mask is cropped to the ground-truth box
    grown by a pixel, and each object counts by the mean over its box. Two differences, neither in
    reach of ordinary logits: the loss is taken from the logits, so it keeps a gradient where the
    original's float32 sigmoid has saturated (above about 17 or below -100), and mask pixels that
    lie outside their own box add nothing (the original adds a constant 100 without gradient).

    Args:
        logits: float `[B, K, h, w]`, `mask_logits` of the sampled priors.
        boxes: float `[B, K, 4]`, ground-truth x1 y1 x2 y2 of each sample, relative.
        masks: `[B, K, h, w]` in {0, 1}, ground truth of each sample.
        weights: float `[B, K]`, 0 for slots that hold no sample.

    Returns:
        0-d float, the sum over all samples of weight * (BCE summed over pixels) / relative area
        / (h * w).
    """
    height, width = logits.shape[2:]
    x1, y1, x2, y2 = boxes.unbind(-1)
    area = ((x2 - x1) * (y2 - y1)).clamp(min=SMALLEST_AREA)
    object_weight = (weights / (area * (height * width)))[:, :, None, None]
    rows = inside_box(y1, y2, height).unsqueeze(-1) * object_weight
    pixel_weight = inside_box(x1, x2, width).unsqueeze(-2) * rows
    return F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), weight=pixel_weight,
                                              reduction="sum")


def mask_iou_loss(network: nn.Module, logits: Tensor, boxes: Tensor, masks: Tensor,
                  labels: Tensor, valid: Tensor, smallest_area: float) -> Tensor:
    """Smooth L1 between predicted and true IoU, summed over the samples.

    The true IoU is that of the predicted mask above 0.5, cropped to the true box, with the
    ground truth. Gradients reach the network and, through its input, the masks. All K slots run
    through the network; what does not count has weight 0.

    Args:
        network: a `MaskIouNet`.
        logits: float `[B, K, h, w]`, see `layers.masks.mask_logits`.
        boxes: float `[B, K, 4]`, ground-truth x1 y1 x2 y2 of each sample, relative.
        masks: `[B, K, h, w]` in {0, 1}, ground truth of each sample.
        labels: integer `[B, K]`, 1..C-1; anything in slots that hold no sample.
        valid: bool `[B, K]`, slots that hold a sample.
        smallest_area: ground-truth masks of up to this many pixels do not count.

    Returns:
        0-d float.
    """
    soft = crop_to_boxes(torch.sigmoid(logits), boxes)
    predicted = network(soft.flatten(0, 1).unsqueeze(1))
    label = (labels.long() - 1).clamp(min=0).reshape(-1, 1)
    predicted = predicted.gather(1, label).reshape(valid.shape)

    truth = masks.to(logits.dtype)
    found = (soft.detach() > 0.5).to(logits.dtype)
    area = truth.sum((2, 3))
    overlap = (truth * found).sum((2, 3))
    iou = overlap / (area + found.sum((2, 3)) - overlap).clamp(min=1)
    losses = F.smooth_l1_loss(predicted, iou, reduction="none")
    return (losses * (valid & (area > smallest_area))).sum()


def flat_index(index: Tensor, rows: int) -> Tensor:
    """Turn rows `[B, K]` of each image's table of `rows` rows into rows `[B * K]` of all tables."""
    offset = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * rows
    return (index + offset).reshape(-1)


def select_rows(tables: Tensor, index: Tensor) -> Tensor:
    """Rows of `tables` `[B, N, ..]` by a `flat_index` of B * K entries, as `[B, K, ..]`.

    An index_select of whole rows: a gather would need an index as large as its result.
    """
    batch = tables.shape[0]
    picked = tables.flatten(0, 1).index_select(0, index)
    return picked.reshape((batch, index.shape[0] // batch) + tables.shape[2:])
