"""From the network's raw predictions to a fixed number of scored, non-overlapping detections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from layers.box_ops import decode
from layers.nms import EXCLUDED, Kept, cross_class_nms, fast_nms, traditional_nms

if TYPE_CHECKING:
    from data.config import Config

NMS_KINDS = ("fast", "cross_class", "traditional")

_LARGEST_COORDINATE = 1e4
"""In image sides; a predicted box that reaches farther (or is not finite) is no candidate."""


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
    def __call__(self, predictions: Dict[str, Tensor]) -> Detections:
        """`predictions` as `Yolact.forward` returns them: loc, conf (logits), mask, priors."""
        conf = predictions["conf"]
        if conf.shape[2] != self.num_classes:
            raise ValueError(f"predictions have {conf.shape[2]} classes, Detect was built for "
                             f"{self.num_classes}")
        priors = predictions["priors"].float()
        boxes = decode(predictions["loc"].float(), priors)
        scores = F.softmax(conf.float(), dim=2)[:, :, 1:]
        # Comparisons with NaN are false, so a prior with a NaN score or corner is left out as well.
        within = (boxes.abs() < _LARGEST_COORDINATE).all(dim=2)
        candidate = (scores.max(dim=2)[0] > self.conf_thresh) & within
        coefficients = predictions["mask"].float()
        if self.compact and boxes.device.type == "cpu":
            boxes, scores, coefficients, candidate = _only_candidates(
                candidate, boxes, scores, coefficients)
        boxes = torch.where(candidate.unsqueeze(2), boxes, torch.zeros_like(boxes))
        scores = scores.transpose(1, 2).masked_fill(~candidate.unsqueeze(1), EXCLUDED)
        return self._gather(boxes, coefficients, self._suppress(boxes, scores))

    def _suppress(self, boxes: Tensor, scores: Tensor) -> Kept:
        if self.nms == "fast":
            return fast_nms(boxes, scores, self.nms_thresh, self.top_k, self.max_detections)
        if self.nms == "cross_class":
            return cross_class_nms(boxes, scores, self.nms_thresh, self.top_k)
        return self._suppress_on_host(boxes, scores)

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


def _only_candidates(candidate: Tensor, boxes: Tensor, scores: Tensor,
                     coefficients: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop the priors `[B, P]` that are candidates in no image; at least one stays.

    The number that stays depends on the data: for the host only, where reading it costs nothing.
    """
    used = candidate.any(dim=0)
    used[0] = True
    index = used.nonzero().squeeze(1)
    return (boxes.index_select(1, index), scores.index_select(1, index),
            coefficients.index_select(1, index), candidate.index_select(1, index))
