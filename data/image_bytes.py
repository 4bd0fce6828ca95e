"""Tell from the bytes of an image file whether its end is missing.

OpenCV decodes a truncated JPEG into a partly grey picture and only prints a warning, so the end of
the file is checked first, on the bytes that are decoded afterwards: nothing is read twice.
"""

from __future__ import annotations

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk with its checksum
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA


def is_truncated(data: bytes) -> bool:
    """Tell whether a JPEG or PNG lacks its end marker; False for other formats."""
    if data.startswith(_JPEG_START):
        if data.endswith(_JPEG_END):
            return False
        # Cameras append data after the end, and a thumbnail inside the header has an end of its
        # own: the marker that counts comes after the start of the scan.
        scan = _scan_start(data)
        return scan < 0 or data.find(_JPEG_END, scan) < 0
    if data.startswith(_PNG_START):
        return data.rfind(_PNG_END) < 0
    return False


def _scan_start(data: bytes) -> int:
    """Offset of the first pixel data of a JPEG, or -1 where the header ends before it."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2:position + 4], "big")
        position += 2 + length
        if marker == _START_OF_SCAN:
            return position if position <= len(data) else -1
    return -1
