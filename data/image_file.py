"""Read one image file, whole or not at all.

OpenCV decodes a truncated JPEG into a partly grey picture and only prints a warning, so the end of
the file is checked first, on the bytes that are decoded afterwards: nothing is read twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Tuple, Union

import cv2
import numpy as np

from utils.errors import UserError

# COCO's coordinates refer to the pixels as stored: an EXIF rotation must not be applied.
_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk with its checksum
_JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA


def read_image(path: Union[str, Path], name: str = "image") -> np.ndarray:
    """Decode `path` to uint8 `[h, w, 3]`, BGR, in the order its pixels are stored (EXIF ignored).

    Args:
        path: JPEG, PNG or another format that OpenCV reads.
        name: what the file is to the user, for the error: for example `image 42`.

    Raises:
        UserError: the file is missing, empty, truncated or not an image.
    """
    try:
        with open(str(path), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError("{}: file not found: {}".format(name, Path(path).absolute())) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError("{}: cannot read {!r}: {}".format(name, str(path), error)) from None
    if not data:
        raise UserError("{}: {} is an empty file, expected an image".format(name, path))
    if is_truncated(data):
        raise UserError("{}: {} is truncated ({} bytes, the end of the image is missing); copy or "
                        "download it again".format(name, path, len(data)))
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _FLAGS)
    except cv2.error:
        image = None
    if image is None:
        raise UserError("{}: {} is not an image that OpenCV can read ({} bytes)".format(
            name, path, len(data)))
    return image


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


def image_size(path: Union[str, Path], name: str = "image") -> Tuple[int, int]:
    """Width and height in pixels as stored, from the file's header alone.

    Raises:
        UserError: the file is missing or not an image.
    """
    from PIL import Image  # needed only for annotation files that leave the sizes out

    try:
        with Image.open(str(path)) as image:
            return int(image.size[0]), int(image.size[1])
    except FileNotFoundError:
        raise UserError("{}: file not found: {}".format(name, Path(path).absolute())) from None
    except (OSError, ValueError):
        raise UserError("{}: {!r} is not an image; its width and height are needed because the "
                        "annotation file does not give them".format(name, str(path))) from None
