"""Operations on boxes, in torch.

Boxes are `[..,4]`: corners x1 y1 x2 y2, or centre and size (cx cy w h) where a name or a docstring
says so; both relative to the image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    Array = TypeVar("Array", np.ndarray, Tensor)

CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2


def point_form(boxes: Tensor) -> Tensor:
    """`[..,4]` cx cy w h -> x1 y1 x2 y2."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((center - half, center + half), -1)


def center_size(boxes: Tensor) -> Tensor:
    """`[..,4]` x1 y1 x2 y2 -> cx cy w h."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def jaccard(boxes_a: Tensor, boxes_b: Tensor, iscrowd: bool = False) -> Tensor:
    """Intersection over union of all pairs: `[..,m,4]`, `[..,n,4]` corners -> `[..,m,n]`.

    With `iscrowd` the intersection is divided by the area of the box from `boxes_a` alone: how
    much of it the crowd region in `boxes_b` covers (COCO's rule).
    """
    boxes_a, boxes_b = boxes_a.unsqueeze(-2), boxes_b.unsqueeze(-3)
    low = torch.max(boxes_a[..., :2], boxes_b[..., :2])
    high = torch.min(boxes_a[..., 2:], boxes_b[..., 2:])
    sides = (high - low).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    if iscrowd:
        return intersection / _area(boxes_a)
    return intersection / (_area(boxes_a) + _area(boxes_b) - intersection)


def _area(boxes: Tensor) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return sides[..., 0] * sides[..., 1]


def encode_parts(center: Array, size: Array, priors_cxcywh: Array,
                 log: Callable[[Array], Array]) -> tuple[Array, Array]:
    """SSD's box coding (Liu et al., 2016), for tensors and for the arrays of `data.targets`.

    Args:
        center: `[.., 2]` cx cy of the boxes.
        size: `[.., 2]` their w h, above 0.
        priors_cxcywh: `[.., 4]`, relative to the image as the boxes are.
        log: `torch.log` or `numpy.log`.

    Returns:
        `[.., 2]` offsets of the centre in sizes of the prior and `[.., 2]` logarithms of the size,
        each divided by its variance.
    """
    prior_center, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    return ((center - prior_center) / (prior_size * CENTER_VARIANCE),
            log(size / prior_size) / SIZE_VARIANCE)


def encode(boxes: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Regression targets of corner boxes `[..,4]` against priors `[..,4]` cx cy w h.

    A box without width or height gives infinite targets: drop such boxes before.
    """
    boxes = center_size(boxes)
    return torch.cat(encode_parts(boxes[..., :2], boxes[..., 2:], priors_cxcywh, torch.log), -1)


def decode(loc: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Corner boxes from regression outputs `[..,4]` and priors `[..,4]` cx cy w h."""
    prior_center, prior_size = priors_cxcywh[..., :2], priors_cxcywh[..., 2:]
    center = prior_center + loc[..., :2] * (prior_size * CENTER_VARIANCE)
    size = prior_size * torch.exp(loc[..., 2:] * SIZE_VARIANCE)
    low = center - size / 2
    # The original's order of rounding: an IoU at a threshold is decided by the last bit.
    return torch.cat((low, low + size), -1)


def sanitize_coordinates(x1: Tensor, x2: Tensor, size: int, padding: int = 0,
                         cast: bool = True) -> tuple[Tensor, Tensor]:
    """Relative coordinates -> ordered, padded pixel coordinates.

    The lower one is held at 0 from below, the upper one at `size` from above, as in the original.

    Args:
        x1: relative coordinates of one axis, any shape.
        x2: the opposite ends, of the same shape; either may be the lower one.
        size: pixels along the axis.
        padding: pixels added at both ends.
        cast: truncate to whole pixels (int64).
    """
    x1, x2 = x1 * size, x2 * size
    if cast:
        x1, x2 = x1.long(), x2.long()
    low, high = torch.min(x1, x2), torch.max(x1, x2)
    return (low - padding).clamp(min=0), (high + padding).clamp(max=size)


def crop(masks: Tensor, boxes: Tensor, padding: int = 1) -> Tensor:
    """Zero each mask outside its box.

    Args:
        masks: `[h,w,n]`.
        boxes: `[n,4]` relative corners.
        padding: pixels by which each box is widened.
    """
    height, width = masks.shape[:2]
    x1, x2 = sanitize_coordinates(boxes[:, 0], boxes[:, 2], width, padding, cast=False)
    y1, y2 = sanitize_coordinates(boxes[:, 1], boxes[:, 3], height, padding, cast=False)
    columns = torch.arange(width, device=masks.device, dtype=boxes.dtype).view(1, -1, 1)
    rows = torch.arange(height, device=masks.device, dtype=boxes.dtype).view(-1, 1, 1)
    inside = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
    return masks * inside.to(masks.dtype)
