"""Whether an image file is whole, and how large, by its markers; nothing is decoded."""

from __future__ import annotations

import struct
from typing import Iterator, Tuple

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk with its checksum
JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_START_OF_FRAME = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


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


def promised_size(data: bytes) -> Tuple[int, int]:
    """Width and height in the header of a JPEG or PNG; zeros where there are none."""
    if data.startswith(PNG_START):
        return struct.unpack(">II", data[16:24].ljust(8, b"\0"))  # type: ignore[return-value]
    if not data.startswith(JPEG_START):
        return 0, 0
    height, width = next((struct.unpack(">HH", data[start + 3:start + 7].ljust(4, b"\0"))
                          for marker, start, _ in jpeg_segments(data)
                          if marker in _START_OF_FRAME), (0, 0))
    return width, height


def jpeg_segments(data: bytes) -> Iterator[Tuple[int, int, int]]:
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
