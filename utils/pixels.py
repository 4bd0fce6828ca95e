"""Decoded pixels of any type and range, as 8 bits a colour. Needs NumPy alone: exports hold it."""

from __future__ import annotations

import numpy as np

MOST_PIXELS = 178956970
"""What Pillow refuses to go beyond; OpenCV's limit is that of 3 GiB."""
_OVERSHOOT = 0.5
"""Floats further outside 0..1 were meant as another range, such as 0..255 or -1..1."""


def image_from_array(array: np.ndarray, rgb: bool = False) -> np.ndarray:
    """Bring an array into the form that networks here take: uint8 `[h, w, 3]`, BGR.

    Args:
        array: `[h, w]` grey, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]` (alpha last, left out); uint8,
            bool, uint16 or float in 0..1.
        rgb: the order of the colours is red, green, blue; otherwise blue, green, red, as OpenCV
            has it.

    Raises:
        ValueError: another shape, type or range, or no pixels.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"the image is {list(array.shape)}, expected [h, w], [h, w, 1], [h, w, 3] "
                         "or [h, w, 4]")
    array = _to_uint8(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    array = array[:, :, :3]
    return np.ascontiguousarray(array[:, :, ::-1] if rgb else array)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        if 0 < array.max() < 256:
            raise ValueError(f"the image is uint16 up to {array.max()}, expected values up to "
                             "65535, of which the upper 8 bits are read; convert to uint8")
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        outside = (array < -_OVERSHOOT) | (array > 1 + _OVERSHOOT)
        if outside.any() or np.isnan(array).all():
            lowest, highest = np.fmin.reduce(array, None), np.fmax.reduce(array, None)
            raise ValueError(f"the image is {array.dtype} from {lowest:g} to {highest:g}, expected "
                             "floats in 0..1; scale it, or convert to uint8")
        # Not a number becomes black.
        return np.nan_to_num(np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    raise ValueError(f"the image is {array.dtype} from {array.min()} to {array.max()}, expected "
                     "uint8, bool, uint16 or float in 0..1")
