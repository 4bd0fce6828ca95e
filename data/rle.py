"""Check COCO run lengths before pycocotools decodes them.

pycocotools trusts its input: counts that do not add up to the mask's size read or write beyond it
in older versions. The compressed form is decoded here for all masks at once, in NumPy.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np

_CHUNK = 4096
_LONGEST_NUMBER = 7  # characters of 5 bits; 2^32 needs 7


def run_length_sums(data: np.ndarray, lengths: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Add up the runs of compressed RLEs.

    Args:
        data: uint8, compressed counts of all masks one after the other.
        lengths: int64 `[r]`, bytes of each mask.

    Returns:
        int64 `[r]` pixels in the mask's image and int64 `[r]` pixels of the object; -1 in the first
        where the counts are malformed.
    """
    totals = np.zeros(len(lengths), np.int64)
    areas = np.zeros(len(lengths), np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for first in range(0, len(lengths), _CHUNK):
        last = min(first + _CHUNK, len(lengths))
        part = data[bounds[first]:bounds[last]]
        totals[first:last], areas[first:last] = _sums(part, lengths[first:last])
    return totals, areas


def _sums(data: np.ndarray, lengths: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    malformed = lengths == 0
    totals = np.zeros(len(lengths), np.int64)
    areas = np.zeros(len(lengths), np.int64)
    if data.size == 0:
        return np.where(malformed, -1, totals), areas
    owner = np.repeat(np.arange(len(lengths)), lengths)
    codes = data.astype(np.int64) - 48
    malformed[owner[(codes < 0) | (codes > 63)]] = True

    # A character holds 5 bits, low ones first; bit 0x20 says that the number goes on.
    ends = (codes & 0x20) == 0
    last_byte = np.flatnonzero(np.append(owner[1:] != owner[:-1], True))
    malformed[owner[last_byte]] |= ~ends[last_byte]
    ends[last_byte] = True
    stops = np.flatnonzero(ends)
    starts = np.concatenate([[0], stops[:-1] + 1])
    digits = stops - starts + 1
    number_owner = owner[starts]
    malformed[number_owner[digits > _LONGEST_NUMBER]] = True
    place = np.minimum(np.arange(len(codes)) - np.repeat(starts, digits), _LONGEST_NUMBER)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[stops] & 0x10) != 0
    values -= np.where(negative, 1 << (5 * np.minimum(digits, _LONGEST_NUMBER)), 0)

    # From the fourth run on, a number is the difference to the run two before it.
    change = np.concatenate([[0], np.flatnonzero(number_owner[1:] != number_owner[:-1]) + 1])
    counts = np.diff(np.append(change, len(values)))
    index = np.arange(len(values)) - np.repeat(change, counts)
    odd = (index & 1) == 1
    for chain in (odd, ~odd & (index > 0)):
        values[chain] = _segmented_cumsum(values[chain], number_owner[chain])
    malformed[number_owner[values < 0]] = True
    present = number_owner[change]
    totals[present] = np.add.reduceat(values, change)
    areas[present] = np.add.reduceat(np.where(odd, values, 0), change)
    return np.where(malformed, -1, totals), areas


def _segmented_cumsum(values: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Cumulative sum that starts anew wherever `segment` (sorted) changes."""
    if len(values) == 0:
        return values
    sums = np.cumsum(values)
    first = np.concatenate([[True], segment[1:] != segment[:-1]])
    offset = (sums - values)[first]
    return sums - offset[np.cumsum(first) - 1]
