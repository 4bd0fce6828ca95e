"""Instance masks from prototypes and coefficients, as pixels or directly as COCO run lengths.

A mask is sigmoid(prototypes . coefficients), cropped to its box at prototype size, resized to the
image (bilinear, half-pixel centres) and thresholded at 0.5 (YOLACT, section 3.1; original
`postprocess`). `assemble_masks` does that step by step. `encode_masks` gives the same pixels as run
lengths without ever forming them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Sequence

import numpy as np
import pycocotools.mask
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.box_ops import crop as crop_masks
from layers.box_ops import sanitize_coordinates

if TYPE_CHECKING:
    from layers.detection import Detections

Rle = Dict[str, Any]
"""`{"size": [h, w], "counts": str}`, compressed run lengths in COCO's format."""

THRESHOLD = 0.5
_CROP_PADDING = 1
_CROSSINGS_AT_ONCE = 1 << 15
"""Of several objects, so that NumPy is called seldom, and few enough to stay in the cache."""


@torch.no_grad()
def assemble_masks(proto: Tensor, coefficients: Tensor, boxes: Tensor, height: int, width: int,
                   crop: bool = True) -> Tensor:
    """Bool masks `[n, height, width]` of the n detections of an image.

    Args:
        proto: `[h, w, k]` prototypes of the image.
        coefficients: `[n, k]`; n may be 0.
        boxes: `[n, 4]` x1 y1 x2 y2 relative to the image.
        height: of the masks in pixels, usually the image's own; so is `width`.
        width: see `height`.
        crop: zero each mask outside its box, widened by one prototype pixel.
    """
    if len(coefficients) == 0:
        return torch.zeros((0, height, width), dtype=torch.bool, device=proto.device)
    masks = torch.sigmoid(torch.matmul(proto, coefficients.t()))  # [h, w, n]
    if crop:
        masks = crop_masks(masks, boxes, _CROP_PADDING)
    masks = masks.permute(2, 0, 1).unsqueeze(0).contiguous()
    masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)
    return masks.squeeze(0) > THRESHOLD


def mask_logits(coefficients: Tensor, proto: Tensor) -> Tensor:
    """Combine prototypes `[B, h, w, k]` by coefficients `[B, K, k]`: `[B, K, h, w]`."""
    batch, height, width, _ = proto.shape
    logits = coefficients.bmm(proto.flatten(1, 2).transpose(1, 2))
    return logits.reshape(batch, coefficients.shape[1], height, width)


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


def crop_to_boxes(soft: Tensor, boxes: Tensor) -> Tensor:
    """Soft masks `[B, n, h, w]`, zero outside of boxes `[B, n, 4]` that are grown by a pixel."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    rows = inside_box(y1, y2, soft.shape[2]).unsqueeze(-1)
    columns = inside_box(x1, x2, soft.shape[3]).unsqueeze(-2)
    return soft.masked_fill(~(rows & columns), 0.0)


@torch.no_grad()
def mask_scores(network: nn.Module, detections: Detections, proto: Tensor,
                crop: bool = True) -> Tensor:
    """Scores of the masks: the boxes' scores times the predicted IoU for their classes.

    Args:
        network: a `MaskIouNet`.
        detections: boxes of N rows an image.
        proto: float `[B, h, w, k]`.
        crop: whether the masks are cropped to their boxes.

    Returns:
        `[B, N]`, in the order of the rows; zero in rows not in use.
    """
    scores, rows = detections.scores, detections.scores.shape[1]
    if scores.device.type == "cpu":
        rows = max(1, int(detections.count.max()))  # the value is at hand; elsewhere it is not
    soft = torch.sigmoid(mask_logits(detections.coefficients[:, :rows].float(), proto.float()))
    if crop:
        soft = crop_to_boxes(soft, detections.boxes[:, :rows])
    predicted = network(soft.flatten(0, 1).unsqueeze(1)).reshape(soft.shape[:2] + (-1,))
    iou = predicted.gather(2, detections.classes[:, :rows].unsqueeze(2)).squeeze(2)
    return F.pad(scores[:, :rows] * iou, [0, scores.shape[1] - rows])


def boxes_to_pixels(boxes: Tensor, height: int, width: int, padding: int = 0) -> Tensor:
    """Relative corners `[n, 4]` -> pixels, ordered, widened by `padding` and clipped to the image,
    not rounded.
    """
    x1, x2 = sanitize_coordinates(boxes[:, 0], boxes[:, 2], width, padding, cast=False)
    y1, y2 = sanitize_coordinates(boxes[:, 1], boxes[:, 3], height, padding, cast=False)
    return torch.stack((x1.clamp(max=width), y1.clamp(max=height),
                        x2.clamp(min=0), y2.clamp(min=0)), 1)


@torch.no_grad()
def encode_masks(proto: Tensor, coefficients: Tensor, boxes: Tensor, height: int, width: int,
                 crop_to_box: bool = True, chunk_size: int = 128) -> list[Rle]:
    """Masks of `assemble_masks` as COCO run lengths.

    Runs on the host. Down a column of the image a soft mask is linear between two prototype rows,
    so it crosses the threshold at most once there: the ends of the runs are computed, not searched
    for among pixels. The cost is a value per image column and prototype row of the box, and memory
    does not grow with the image's height.
    """
    proto_height, proto_width = proto.shape[:2]
    rows, columns = _Axis.build(proto_height, height), _Axis.build(proto_width, width)
    # Column-major, as run lengths count; transposed once, while small.
    flat = proto.cpu().float().transpose(0, 1).reshape(proto_width * proto_height, -1).t()
    flat = flat.contiguous()
    coefficients, boxes = coefficients.cpu().float(), boxes.cpu().float()
    runs: list[np.ndarray] = []
    waiting: list[_Crossings] = []
    count = 0
    for start in range(0, len(coefficients), chunk_size):
        chosen = slice(start, start + chunk_size)
        soft = torch.matmul(coefficients[chosen], flat).sigmoid_()
        masks = soft.reshape(-1, proto_width, proto_height).numpy()
        # Cells that `crop` leaves, ends not included.
        cells = boxes_to_pixels(boxes[chosen], proto_height, proto_width, _CROP_PADDING).ceil()
        if not crop_to_box:
            cells[:] = torch.tensor([0, 0, proto_width, proto_height])
        for mask, (x1, y1, x2, y2) in zip(masks, cells.long().tolist()):
            lines, first_column = _resize_columns(mask, x1, x2, y1, y2, columns)
            waiting.append(_Crossings.find(lines, max(y1 - 1, 0), first_column))
            count += len(waiting[-1].piece)
            if count > _CROSSINGS_AT_ONCE:
                runs += _run_lengths(waiting, rows, width)
                waiting, count = [], 0
    runs += _run_lengths(waiting, rows, width)
    encoded = pycocotools.mask.frPyObjects(
        [{"size": [height, width], "counts": lengths} for lengths in runs],
        height, width) if runs else []
    return [{"size": [height, width], "counts": rle["counts"].decode("ascii")} for rle in encoded]


class _Axis(NamedTuple):
    """Bilinear resizing along one axis with half-pixel centres, in float32 as PyTorch does it.

    Pixel i is `source[low[i]] * (1 - weight[i]) + source[high[i]] * weight[i]`.
    """

    scale: float
    """Source cells per pixel."""
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    """int64 `[source + 1]`: the first pixel whose `low` is at least s."""

    @staticmethod
    def build(source: int, size: int) -> _Axis:
        scale, half = np.float32(source) / np.float32(size), np.float32(0.5)
        position = scale * (np.arange(size, dtype=np.float32) + half) - half
        position = np.maximum(position, np.float32(0))
        low = np.minimum(position.astype(np.int64), source - 1)
        first = np.searchsorted(low, np.arange(source + 1)).astype(np.int64)
        return _Axis(float(scale), low, np.minimum(low + 1, source - 1),
                     position - low.astype(np.float32), first)


def _resize_columns(mask: np.ndarray, x1: int, x2: int, y1: int, y2: int,
                    columns: _Axis) -> tuple[np.ndarray, int]:
    """Crop `mask [w, h]` to the cells and resize it along x only.

    Returns:
        `(lines, first)`: `lines [m, 1 + n + 1]` for m image columns from column `first` on, and n
        prototype rows from row max(y1 - 1, 0) on, with a zero before and after them. Image columns
        and prototype rows left out are zero.
    """
    if x1 >= x2 or y1 >= y2:
        return np.zeros((0, 2), np.float32), 0
    left, top = max(x1 - 1, 0), max(y1 - 1, 0)
    # One cell more on each side, zero, where there is one: the resized mask fades out in there.
    right, bottom = min(x2 + 1, mask.shape[0]), min(y2 + 1, mask.shape[1])
    cropped = np.zeros((right - left, 1 + bottom - top + 1), np.float32)
    cropped[x1 - left:x2 - left, 1 + y1 - top:1 + y2 - top] = mask[x1:x2, y1:y2]
    first, last = columns.first[left], columns.first[x2]
    weight = columns.weight[first:last, None]
    lines = cropped.take(columns.low[first:last] - left, axis=0)
    lines *= np.float32(1) - weight
    high = cropped.take(columns.high[first:last] - left, axis=0)
    high *= weight
    lines += high
    return lines, int(first)


class _Crossings(NamedTuple):
    """Where the columns of a mask, or of several, cross the threshold: n times."""

    column: np.ndarray
    """int64 `[n]`, of the image."""
    piece: np.ndarray
    """int64 `[n]`: between prototype rows piece - 1 and piece; 0 and h are at the borders."""
    before: np.ndarray
    """float32 `[n]`: value in row piece - 1; 0 outside."""
    after: np.ndarray
    """float32 `[n]`: value in row piece; 0 outside."""

    @classmethod
    def find(cls, lines: np.ndarray, top: int, first: int) -> _Crossings:
        """Those of `lines [columns, 1 + rows + 1]`, from row `top` and column `first` on."""
        inside = lines > THRESHOLD
        change = np.flatnonzero(inside[:, 1:] != inside[:, :-1])
        column, piece = np.divmod(change, lines.shape[1] - 1)
        before = change + column  # each line has a value more than it has pieces
        return cls(column + first, piece + top, lines.take(before), lines.take(before + 1))


def _run_ends(crossings: _Crossings, rows: _Axis) -> np.ndarray:
    """Pixels where columns, resized along y, change between in and out of the mask.

    Returns:
        int64 `[n]`: column-major pixel numbers, each the first pixel with a new value; ascending
        for each mask. Two equal ones enclose no pixel.
    """
    column, piece, before, after = crossings
    height, border = len(rows.low), len(rows.first) - 1
    opens = after > THRESHOLD  # [n]
    # Pixels of each piece; none before the first prototype row, none after the last.
    low = np.concatenate(([0], rows.first[:border - 1], [height])).take(piece)  # [n]
    high = np.concatenate(([0], rows.first[1:border], [height])).take(piece)  # [n]
    crossing = piece - 1 + (np.float32(THRESHOLD) - before) / (after - before)
    pixel = np.ceil((crossing + 0.5) / rows.scale - 0.5).astype(np.int64)  # [n]
    pixel = np.minimum(np.maximum(pixel, low), high)

    def is_new(pixel: np.ndarray) -> np.ndarray:
        weight = rows.weight.take(np.minimum(pixel, height - 1))
        value = before * (np.float32(1) - weight) + after * weight
        return (value > THRESHOLD) == opens

    # Rounding may have put the crossing a pixel off: the values themselves decide.
    pixel = pixel - ((pixel > low) & is_new(pixel - 1))
    pixel = pixel + ((pixel < high) & ~is_new(pixel))
    return column * height + pixel


def _run_lengths(masks: Sequence[_Crossings], rows: _Axis, width: int) -> list[np.ndarray]:
    """Lengths of the runs out, in, out, ... of each mask."""
    if not masks:
        return []
    total = len(rows.low) * width
    ends = _run_ends(_Crossings(*map(np.concatenate, zip(*masks))), rows)
    mask = np.repeat(np.arange(len(masks)), [len(crossings.piece) for crossings in masks])
    ends += mask * (total + 1)  # ascending over all masks
    first = np.flatnonzero(np.diff(ends, prepend=-1, append=-1))  # of each number
    used = first[:-1][np.diff(first) % 2 == 1]
    used = used[ends[used] - mask[used] * (total + 1) < total]
    ends, mask = ends[used], mask[used]
    # The bounds of each mask's pixels around its ends; between two masks nothing is counted.
    stop = np.cumsum(np.bincount(mask, minlength=len(masks)) + 2)
    bounds = np.empty(stop[-1], np.int64)
    bounds[np.arange(len(ends)) + 2 * mask + 1] = ends
    offset = np.arange(len(masks)) * (total + 1)
    start = np.concatenate(([0], stop[:-1]))
    bounds[start], bounds[stop - 1] = offset, offset + total
    lengths = np.diff(bounds)
    return [lengths[begin:end - 1] for begin, end in zip(start.tolist(), stop.tolist())]
