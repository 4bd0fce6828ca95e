"""From the network's raw predictions to a fixed number of scored, non-overlapping detections.

Fast NMS (YOLACT, Bolya et al. 2019, section 3.3) removes every box that overlaps a better one too
much, even if that one is itself removed; so it is a few batched matrix operations. `fast_nms` and
`cross_class_nms` run on the device, batched over images, without reading a value back; greedy NMS
runs on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.box_ops import decode

if TYPE_CHECKING:
    from data.config import Config

NMS_KINDS = ("fast", "cross_class", "traditional")

_LARGEST_COORDINATE = 1e4
"""In image sides; a predicted box that reaches farther (or is not finite) is no candidate."""

EXCLUDED = -1.0
"""Score of a pair that takes no part; real scores are in [0, 1]."""

_MOST_PAIRS = 4096
"""That `fast_nms_on_host` compares with each other."""


class ImageDetections(NamedTuple):
    """The n detections of one image, best score first; fields as in `Detections`."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class Detections:
    """Detections of a batch, best score first; rows after `count` are zero. N = top_k."""

    boxes: Tensor
    """float `[B, N, 4]`, x1 y1 x2 y2 relative to the image, not clipped to it."""
    scores: Tensor
    """float `[B, N]`, in [0, 1]."""
    classes: Tensor
    """int64 `[B, N]`, 0-based foreground class."""
    coefficients: Tensor
    """float `[B, N, k]`, mask coefficients."""
    count: Tensor
    """int64 `[B]`, rows in use."""

    def to(self, device: torch.device) -> Detections:
        return Detections(*(field.to(device) for field in vars(self).values()))

    def of_image(self, n: int, score_threshold: float = 0.0) -> ImageDetections:
        """Rows of image n in use, with scores above the threshold (0: all). For the host."""
        count = int(self.count[n])
        if score_threshold > 0:
            count = int((self.scores[n, :count] > score_threshold).sum())
        return ImageDetections(self.boxes[n, :count], self.scores[n, :count],
                               self.classes[n, :count], self.coefficients[n, :count])


@dataclass
class Detect:
    """Softmax, box decoding and non-maximum suppression for a batch of images.

    With `nms` "fast" or "cross_class" every shape follows from the configuration and no value is
    read back from an accelerator. "traditional" suppresses on the host, image by image.
    """

    num_classes: int
    """C, with background."""
    conf_thresh: float
    """A prior takes part if its best foreground score is above this."""
    nms_thresh: float
    """Largest IoU of two detections that both stay."""
    top_k: int
    """Candidates that enter the suppression (per class with "fast"); also N."""
    max_detections: int
    """Detections kept per image over all classes, at most `top_k`; "cross_class" keeps all."""
    nms: str = "fast"
    """One of `NMS_KINDS`."""
    max_size: int = 550
    """S, the network's input side; only "traditional" works in its pixels."""
    compact: bool = True
    """On a CPU, leave out what is no candidate first; the result is the same, only sooner."""

    @classmethod
    def from_config(cls, config: Config, nms: str = "fast") -> Detect:
        return cls(config.num_classes, config.nms_conf_thresh, config.nms_thresh,
                   config.nms_top_k, config.max_num_detections, nms, config.max_size)

    @torch.no_grad()
    def __call__(self, predictions: dict[str, Tensor]) -> Detections:
        """`predictions` as `Yolact.forward` returns them: loc, conf (logits), mask, priors."""
        loc, conf, coefficients = (predictions[name] for name in ("loc", "conf", "mask"))
        priors = predictions["priors"].float()
        if conf.shape[2] != self.num_classes:
            raise ValueError(f"predictions have {conf.shape[2]} classes, Detect was built for "
                             f"{self.num_classes}")
        if not self._on_host(conf):
            return self._detect(loc, conf, coefficients, priors)
        found = []
        for image in zip(loc, conf, coefficients):
            likely = _likely(image[1], self.conf_thresh)
            own_loc, own_conf, own_mask = (values[likely].unsqueeze(0) for values in image)
            found.append(vars(self._detect(own_loc, own_conf, own_mask, priors[likely])))
        return Detections(**{name: torch.cat([fields[name] for fields in found])
                             for name in found[0]})

    def _detect(self, loc: Tensor, conf: Tensor, coefficients: Tensor, priors: Tensor
                ) -> Detections:
        boxes, coefficients = decode(loc.float(), priors), coefficients.float()
        scores = F.softmax(conf.float(), dim=2)[:, :, 1:]
        # Comparisons with NaN are false, so a prior with a NaN score or corner is left out as well.
        within = (boxes.abs() < _LARGEST_COORDINATE).all(dim=2)
        candidate = (scores.max(dim=2)[0] > self.conf_thresh) & within
        boxes = torch.where(candidate.unsqueeze(2), boxes, torch.zeros_like(boxes))
        scores = scores.transpose(1, 2).masked_fill(~candidate.unsqueeze(1), EXCLUDED)
        if self.nms == "fast":
            suppress = fast_nms_on_host if self._on_host(boxes) else fast_nms
            kept = suppress(boxes, scores, self.nms_thresh, self.top_k, self.max_detections)
        elif self.nms == "cross_class":
            kept = cross_class_nms(boxes, scores, self.nms_thresh, self.top_k)
        else:
            kept = self._suppress_on_host(boxes, scores)
        return self._gather(boxes, coefficients, kept)

    def _on_host(self, values: Tensor) -> bool:
        return self.compact and values.device.type == "cpu"

    def _suppress_on_host(self, boxes: Tensor, scores: Tensor) -> Kept:
        batch, device = len(boxes), boxes.device
        index = np.zeros((batch, self.max_detections), np.int64)
        classes = np.zeros((batch, self.max_detections), np.int64)
        kept_scores = np.zeros((batch, self.max_detections), np.float32)
        count = np.zeros(batch, np.int64)
        for i, (b, s) in enumerate(zip(boxes.cpu().numpy(), scores.cpu().numpy())):
            found, found_classes = traditional_nms(b, s, self.nms_thresh, self.conf_thresh,
                                                   self.max_detections, self.max_size)
            count[i] = n = len(found)
            index[i, :n], classes[i, :n] = found, found_classes
            kept_scores[i, :n] = s[found_classes, found]
        return Kept(*(torch.from_numpy(a).to(device) for a in (index, classes, kept_scores, count)))

    def _gather(self, boxes: Tensor, coefficients: Tensor, kept: Kept) -> Detections:
        """Look up what was kept and fill up to N rows; rows not in use are zero."""
        missing = self.top_k - kept.index.shape[1]
        row = torch.arange(kept.index.shape[1], device=boxes.device)
        unused = (row.unsqueeze(0) >= kept.count.unsqueeze(1)).unsqueeze(2)

        def look_up(values: Tensor) -> Tensor:
            index = kept.index.unsqueeze(2).expand(-1, -1, values.shape[2])
            return F.pad(values.gather(1, index).masked_fill(unused, 0.0), (0, 0, 0, missing))

        return Detections(look_up(boxes), F.pad(kept.scores, (0, missing)),
                          F.pad(kept.classes.int(), (0, missing)).long(),  # no padding of 64 bits
                          look_up(coefficients), kept.count)


def _likely(conf: Tensor, threshold: float) -> Tensor:
    """Priors, int64 `[n]`, that may be candidates, from an image's logits `[P, C]`; n >= 1.

    A foreground score is at most 1 / (1 + exp(background - its logit)), which leaves out nearly all
    before any softmax. How many stay depends on the data: for the host only, where reading it costs
    nothing.
    """
    background, foreground = conf.float().split((1, conf.shape[1] - 1), dim=1)
    best = foreground.amax(dim=1) if hasattr(conf, "amax") else foreground.max(dim=1)[0]
    lowest = threshold * (1 - 1e-5)  # a little less: the softmax is rounded
    bound = math.log(lowest / (1 - lowest)) - 1e-3 if lowest > 0 else -math.inf
    likely = best - background.squeeze(1) > bound
    likely[0] = True
    return likely.nonzero().squeeze(1)


@dataclass(frozen=True)
class Kept:
    """What a suppression left over in R rows; all but `index` as in `Detections`."""

    index: Tensor
    """int64 `[B, R]`, prior of each detection."""
    classes: Tensor
    scores: Tensor
    count: Tensor


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


def fast_nms_on_host(boxes: Tensor, scores: Tensor, iou_threshold: float, top_k: int,
                     max_detections: int) -> Kept:
    """`fast_nms` of one image (B = 1), in a fraction of the time where shapes may follow the data.

    Only a better box of its class removes a box, so the surest pairs of prior and class are
    compared until `max_detections` of them stay; the rest decides nothing. Of these, equal scores
    are in the order of class and prior, as in ONNX.
    """
    pairs, surest = scores.flatten(), min(8 * max_detections, _MOST_PAIRS)
    bound = float(pairs.topk(surest)[0][-1]) if surest < len(pairs) else EXCLUDED
    chosen = np.flatnonzero(pairs.numpy() > bound)  # [n], by class, then prior
    chosen = chosen[np.argsort(-pairs.numpy()[chosen], kind="stable")]
    classes, index = map(torch.from_numpy, np.divmod(chosen, scores.shape[2]))  # [n] each
    columns = _columns(boxes[:, index])  # [1, n] each
    rows = index[:0]
    step = min(2 * max_detections, _MOST_PAIRS // 8)
    for start in range(0, len(chosen), step):
        end = start + step
        better = (classes[:end].unsqueeze(1) == classes[start:end]).triu_(1 - start)  # [end, m]
        iou = _iou([values[:, :end] for values in columns],
                   [values[:, start:end] for values in columns])[0]  # [end, m]
        stays = (iou.mul_(better).max(dim=0)[0] <= iou_threshold) & (better.sum(dim=0) < top_k)
        rows = torch.cat((rows, start + stays.nonzero().squeeze(1)))[:max_detections]
        if len(rows) == max_detections:
            break
    else:
        if bound > EXCLUDED:
            return fast_nms(boxes, scores, iou_threshold, top_k, max_detections)
    return Kept(index[rows].unsqueeze(0), classes[rows].unsqueeze(0),
                scores[:, classes[rows], index[rows]], torch.tensor([len(rows)]))


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
    columns = _columns(boxes)
    iou = _iou(columns, columns)  # [m, k, k]
    if torch.onnx.is_in_onnx_export():  # ONNX has triangles from opset 14 on only
        order = torch.arange(iou.shape[1])
        return iou.masked_fill(order.unsqueeze(1) >= order, 0.0).max(dim=1)[0]
    return iou.triu_(diagonal=1).max(dim=1)[0]  # row: the better box


def _columns(boxes: Tensor) -> list[Tensor]:
    """x1, y1, x2, y2 and area of boxes `[m, k, 4]`, `[m, k]` each."""
    x1, y1, x2, y2 = (boxes[:, :, i] for i in range(4))
    return [x1, y1, x2, y2, (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)]


def _iou(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """IoU of boxes with boxes, `[m, k, l]`, from their columns `[m, k]` and `[m, l]`."""
    intersection = _overlap(a[0], a[2], b[0], b[2]).mul_(_overlap(a[1], a[3], b[1], b[3]))
    union = (a[4].unsqueeze(2) + b[4].unsqueeze(1)).sub_(intersection)
    return intersection.div_(union.clamp_(min=1e-20))


def _overlap(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Length that intervals `[m, k]` share with others `[m, l]`: `[m, k, l]`."""
    start = torch.max(low.unsqueeze(2), other_low.unsqueeze(1))
    return torch.min(high.unsqueeze(2), other_high.unsqueeze(1)).sub_(start).clamp_(min=0)


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
    keep: list[int] = []
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
                    pixels: int) -> tuple[np.ndarray, np.ndarray]:
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
