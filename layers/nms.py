"""Non-maximum suppression: Fast NMS per class and across classes (static shapes), and greedy NMS.

Fast NMS (YOLACT, Bolya et al. 2019, section 3.3) removes every box that overlaps a better one too
much, even if that one is itself removed; so it is a few batched matrix operations. `fast_nms` and
`cross_class_nms` run on the device, batched over images, without reading a value back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

import numpy as np
import torch
from torch import Tensor

EXCLUDED = -1.0
"""Score of a pair that takes no part; real scores are in [0, 1]."""

_GROUPS_IN_CACHE = 16


@dataclass(frozen=True)
class Kept:
    """What a suppression left over, best score first; rows after `count` are zero."""

    index: Tensor
    """int64 `[B, R]`, prior of each detection."""
    classes: Tensor
    """int64 `[B, R]`, 0-based foreground class."""
    scores: Tensor
    """float `[B, R]`, in [0, 1]."""
    count: Tensor
    """int64 `[B]`, rows in use."""


def fast_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int,
             max_detections: int, min_score: float = EXCLUDED) -> Kept:
    """Fast NMS within each class.

    Args:
        boxes: `[B, P, 4]` x1 y1 x2 y2, finite.
        scores: `[B, C-1, P]` foreground scores in [0, 1], `EXCLUDED` for priors to leave out.
        iou_threshold: a box that overlaps a better one of its class by more than this goes.
        top_k: candidates per class, the best ones.
        max_detections: rows kept over all classes, the best ones.
        min_score: scores up to this are left out of the result (the original's
            `second_threshold`; by default only `EXCLUDED` ones are).

    Returns:
        `Kept` with R = min(max_detections, (C-1) * min(top_k, P)).
    """
    batch, num_classes, num_priors = scores.shape
    k = min(top_k, num_priors)
    scores, index = scores.topk(k, dim=2)  # [B, C-1, k] each
    index = index.reshape(batch, num_classes * k)  # [B, (C-1)*k]
    candidates = _take(boxes, index).reshape(batch * num_classes, k, 4)  # [B*(C-1), k, 4]
    keep = _largest_iou_with_better(candidates) <= iou_threshold  # [B*(C-1), k]
    keep = keep.reshape(batch, num_classes, k) & (scores > min_score)  # [B, C-1, k]
    scores = scores.masked_fill(~keep, EXCLUDED).reshape(batch, num_classes * k)  # [B, (C-1)*k]
    classes = torch.arange(num_classes, device=boxes.device).reshape(1, num_classes, 1)
    classes = classes.expand(batch, num_classes, k).reshape(batch, num_classes * k)  # [B, (C-1)*k]
    return _best(scores, index, classes, rows=min(max_detections, num_classes * k))


def cross_class_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int) -> Kept:
    """Fast NMS over each prior's best class, all classes together.

    Arguments as for `fast_nms`; every survivor of the `top_k` candidates is kept:
    R = min(top_k, P).
    """
    best, classes = scores.max(dim=1)  # [B, P] each
    best, index = best.topk(min(top_k, best.shape[1]), dim=1)  # [B, R] each
    keep = _largest_iou_with_better(_take(boxes, index)) <= iou_threshold  # [B, R]
    best = best.masked_fill(~keep, EXCLUDED)
    return _best(best, index, classes.gather(1, index), best.shape[1])


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    """Rows `index [B, n]` of `boxes [B, P, 4]`: `[B, n, 4]`."""
    return boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4))


def _largest_iou_with_better(boxes: Tensor) -> Tensor:
    """For boxes `[m, k, 4]` sorted by score: largest IoU with a box before it, `[m, k]`.

    Boxes without area overlap nothing.
    """
    if boxes.device.type != "cpu" or torch.onnx.is_in_onnx_export():
        return _largest_iou_in_group(boxes)
    # On a CPU, chunks that stay in its cache take a third of the time.
    return torch.cat([_largest_iou_in_group(chunk) for chunk in boxes.split(_GROUPS_IN_CACHE)])


def _largest_iou_in_group(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = (boxes[:, :, i] for i in range(4))  # [m, k] each
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)  # [m, k]
    intersection = _overlap(x1, x2).mul_(_overlap(y1, y2))  # [m, k, k]
    union = (area.unsqueeze(2) + area.unsqueeze(1)).sub_(intersection)  # [m, k, k]
    iou = intersection.div_(union.clamp_(min=1e-20))  # [m, k, k]
    if torch.onnx.is_in_onnx_export():  # ONNX has triangles from opset 14 on only
        order = torch.arange(iou.shape[1])
        return iou.masked_fill(order.unsqueeze(1) >= order, 0.0).max(dim=1)[0]
    return iou.triu_(diagonal=1).max(dim=1)[0]  # row: the better box


def _overlap(low: Tensor, high: Tensor) -> Tensor:
    """Length shared by each two of the intervals `[m, k]`: `[m, k, k]`."""
    start = torch.max(low.unsqueeze(2), low.unsqueeze(1))
    return torch.min(high.unsqueeze(2), high.unsqueeze(1)).sub_(start).clamp_(min=0)


def _best(scores: Tensor, index: Tensor, classes: Tensor, rows: int) -> Kept:
    """The `rows` best of `[B, n]` that are not excluded."""
    scores, order = scores.topk(rows, dim=1)
    used = scores > EXCLUDED
    one = used.int()  # fills and sums of 64 bits run on the auxiliary CPU of an Ascend card
    return Kept(index.gather(1, order) * one, classes.gather(1, order) * one,
                scores.masked_fill(~used, 0.0), one.sum(dim=1, dtype=torch.int32).long())


def greedy_nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Classic NMS on the host: indices `[n]` of the boxes that stay, best score first.

    `boxes [n, 4]` are in pixels with both ends inside, so a side is x2 - x1 + 1, and a box goes
    where its IoU with one that stays is *at least* `iou_threshold`, as in the original.
    """
    x1, y1, x2, y2 = boxes.astype(np.float32).T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    order = np.argsort(-scores, kind="stable")
    keep: List[int] = []
    while order.size:
        first, rest = order[0], order[1:]
        keep.append(int(first))
        width = np.minimum(x2[first], x2[rest]) - np.maximum(x1[first], x1[rest]) + 1
        height = np.minimum(y2[first], y2[rest]) - np.maximum(y1[first], y1[rest]) + 1
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        union = area[first] + area[rest] - intersection
        order = rest[intersection < iou_threshold * union]
    return np.asarray(keep, dtype=np.int64)


def traditional_nms(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float,
                    conf_threshold: float, max_detections: int,
                    pixels: int) -> Tuple[np.ndarray, np.ndarray]:
    """Greedy NMS per class for one image, on the host.

    Args:
        boxes: float32 `[P, 4]` relative.
        scores: float32 `[C-1, P]`.
        iou_threshold: as for `greedy_nms`.
        conf_threshold: scores up to this take no part.
        max_detections: the best this many stay.
        pixels: side of the network's input; `greedy_nms` works in its pixels.

    Returns:
        `(index, classes)`: int64 `[n]` each, best score first.
    """
    scaled = boxes * np.float32(pixels)
    indices, classes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for class_index, class_scores in enumerate(scores):
        candidates = np.flatnonzero(class_scores > conf_threshold)
        kept = candidates[greedy_nms(scaled[candidates], class_scores[candidates], iou_threshold)]
        indices.append(kept)
        classes.append(np.full(len(kept), class_index, dtype=np.int64))
    index, kept_classes = np.concatenate(indices), np.concatenate(classes)
    order = np.argsort(-scores[kept_classes, index], kind="stable")[:max_detections]
    return index[order], kept_classes[order]
