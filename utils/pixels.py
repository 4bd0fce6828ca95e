"""What is taken for an image: a file that is whole and not too large by its markers, and pixels of
any type and range as 8 bits a colour. Needs NumPy alone, for exports hold it, too.
"""

from __future__ import annotations

import struct
from typing import Iterator

import numpy as np

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk with its checksum
JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_START_OF_FRAME = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
MOST_PIXELS = 178956970
"""What Pillow refuses to go beyond; OpenCV's limit is that of 3 GiB."""
_OVERSHOOT = 0.5
"""Floats further outside 0..1 were meant as another range, such as 0..255 or -1..1."""


def is_truncated(data: bytes) -> bool:
    """Tell whether a JPEG or PNG lacks its end marker; False for other formats."""
    if data.startswith(JPEG_START):
        if data.endswith(_JPEG_END):
            return False
        # Cameras append data after the end, and a thumbnail inside the header has an end of its
        # own: the marker that counts comes after the start of the scan.
        scans = [end for marker, _, end in jpeg_segments(data) if marker == _START_OF_SCAN]
        return not scans or data.find(_JPEG_END, scans[0]) < 0
    return data.startswith(PNG_START) and data.rfind(_PNG_END) < 0


def promised_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a JPEG or PNG; zeros where there are none."""
    if data.startswith(PNG_START):
        return struct.unpack(">II", data[16:24].ljust(8, b"\0"))  # type: ignore[return-value]
    if not data.startswith(JPEG_START):
        return 0, 0
    height, width = next((struct.unpack(">HH", data[start + 3:start + 7].ljust(4, b"\0"))
                          for marker, start, _ in jpeg_segments(data)
                          if marker in _START_OF_FRAME), (0, 0))
    return width, height


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each part of a JPEG's header, the start of the scan last."""
    position, marker = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF and marker != _START_OF_SCAN:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        start = position + 2
        position = start + int.from_bytes(data[start:start + 2], "big")
        yield marker, start, position


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
