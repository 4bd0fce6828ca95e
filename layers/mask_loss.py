"""Mask loss: prototypes times coefficients against the ground-truth masks, K samples an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_AREA = 1e-9
"""Keeps padded slots (area 0) out of a division by zero; far below one pixel of any input."""


def inside_box(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Which pixels along one axis a box covers, grown by one pixel at either end.

    Args:
        low: float `[..]`, the box's lower side relative to the image.
        high: float `[..]`, its upper side.
        size: number of pixels along the axis.

    Returns:
        bool `[.., size]`, True for pixel i with `low * size - 1 <= i < high * size + 1`.
    """
    pixels = torch.arange(size, dtype=low.dtype, device=low.device)
    begin = (low * size - 1).unsqueeze(-1)
    end = (high * size + 1).unsqueeze(-1)
    return (pixels >= begin) & (pixels < end)


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


def mask_logits(coefficients: Tensor, proto: Tensor) -> Tensor:
    """Combine prototypes `[B, h, w, k]` by coefficients `[B, K, k]`: `[B, K, h, w]`."""
    batch, height, width, _ = proto.shape
    logits = coefficients.bmm(proto.flatten(1, 2).transpose(1, 2))
    return logits.reshape(batch, coefficients.shape[1], height, width)


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
