"""Decode COCO's compressed run lengths where something is set, not over the whole picture."""

from __future__ import annotations

from typing import Any, Dict

import numpy as np

from utils.drawing import MaskWindow

Rle = Dict[str, Any]
"""`{"size": [h, w], "counts": str}`, compressed run lengths in COCO's format."""


def run_lengths(counts: str) -> np.ndarray:
    """Read the compressed form: int64 lengths of the runs out, in, out, ... of the mask.

    A character holds 5 bits of a number, low ones first, and bit 0x20 says that the number goes on;
    from the fourth run on the numbers are differences to the run before the last.
    """
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    stops = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate(([0], stops[:-1] + 1))
    lengths = stops - starts + 1
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    values = np.where(codes[stops] & 0x10, values - (1 << (5 * lengths)), values)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def decode_window(rle: Rle) -> MaskWindow:
    """Pixels of a mask within the rectangle around them; without any if the mask is empty."""
    height = int(rle["size"][0])
    ends = np.cumsum(run_lengths(rle["counts"]))
    begin, end = ends[0::2][:len(ends) // 2], ends[1::2]
    used = end > begin
    if not used.any():
        return MaskWindow(0, 0, np.zeros((0, 0), bool))
    begin, end = begin[used], end[used]
    left, right = int(begin[0]) // height, (int(end[-1]) - 1) // height + 1
    edges = np.stack((begin, end), 1).reshape(-1)
    edges = np.concatenate(([left * height], edges, [right * height]))
    inside = np.arange(len(edges) - 1) % 2 == 1
    columns = np.repeat(inside, np.diff(edges)).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return MaskWindow(left, top, np.ascontiguousarray(columns[:, top:bottom].T))
