"""Pictures as people have them: any format, turned the way it is looked at.

A picture may be stored turned, with an EXIF orientation, and may be grey, 16 bit, CMYK, with alpha,
or in a format that only Pillow knows. The result is always uint8 `[h, w, 3]`, BGR. Training decodes
its images here as well (`data.image_file`): what is learned from is what is predicted on.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

import cv2
import numpy as np

from data.image_bytes import is_truncated
from utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff",
            ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".ico", ".pcx", ".avif",
            ".heic", ".heif", ".psd", ".sgi", ".hdr", ".exr")
"""Endings, in lower case, of files that are taken for pictures."""

_BRIGHTEST = 2.0
"""Floats above this are no overshoot of 0..1; they were meant as 0..255."""

_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH


def read_picture(path: Union[str, Path]) -> np.ndarray:
    """Decode a picture file to uint8 `[h, w, 3]`, BGR, turned as its EXIF orientation says.

    Of 16 bits the upper 8 stay; floats are taken as 0..1. Alpha is left out, as in training; of an
    animation the first picture is taken.

    Raises:
        UserError: the file is missing, empty, truncated or not a picture; names the file.
    """
    try:
        with open(str(path), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError("picture not found: {}".format(Path(path).absolute())) from None
    except (OSError, ValueError) as error:
        raise UserError("cannot read {}: {}".format(path, error)) from None
    if not data:
        raise UserError("{} is an empty file, expected a picture".format(path))
    if is_truncated(data):
        raise UserError("{} is truncated ({} bytes, the end of the picture is missing); copy or "
                        "download it again".format(path, len(data)))
    try:
        image = decode_picture(data)
    except ValueError as problem:
        raise UserError("{} {}".format(path, problem)) from None
    if image is None:
        raise UserError("{} is not a picture that OpenCV or Pillow can read ({} bytes)".format(
            path, len(data)))
    return image


def decode_picture(data: bytes, as_stored: bool = False) -> Optional[np.ndarray]:
    """Decode a picture file's bytes to uint8 `[h, w, 3]`, BGR; None if it is not a picture.

    Args:
        data: the whole file.
        as_stored: leave the EXIF orientation out. TIFF files are turned all the same: their
            decoders know no other way.

    Raises:
        ValueError: the picture has too many pixels.
    """
    # OpenCV leaves the orientation of WebP files alone in some versions and not in others.
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    image = None if is_webp else _decode_by_opencv(data, as_stored)
    return _decode_by_pillow(data, as_stored) if image is None else image


def _decode_by_opencv(data: bytes, as_stored: bool) -> Optional[np.ndarray]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8),
                             _FLAGS | cv2.IMREAD_IGNORE_ORIENTATION if as_stored else _FLAGS)
    except cv2.error:
        return None
    return None if image is None else _to_uint8(image)


def _decode_by_pillow(data: bytes, as_stored: bool) -> Optional[np.ndarray]:
    from PIL import Image  # needed for rare formats only

    try:
        with Image.open(io.BytesIO(data)) as image:
            return picture_from_pil(image, as_stored)
    except Image.DecompressionBombError as error:
        raise ValueError("is too large: {}".format(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError, KeyError):
        return None


def picture_from_pil(image: Image.Image, as_stored: bool = False) -> np.ndarray:
    """Convert a PIL image of any mode to uint8 `[h, w, 3]`, BGR, turned as its EXIF says.

    Args:
        image: is loaded.
        as_stored: leave the EXIF orientation out.
    """
    from PIL import ImageOps

    image.load()
    # Loading turns TIFF files, and some versions of Pillow would do it again.
    kept = as_stored or image.format == "TIFF"
    turned = image if kept else ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):  # 16 and 32 bit, grey
        values = np.asarray(turned)
        if values.dtype.kind == "i":
            values = np.clip(values, 0, 65535).astype(np.uint16)
        return picture_from_array(_to_uint8(values))
    return picture_from_array(np.asarray(turned.convert("RGB")), rgb=True)


def picture_from_array(array: np.ndarray, rgb: bool = False) -> np.ndarray:
    """Bring an array into the form of `read_picture`.

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
        raise ValueError("picture is {}, expected [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]".format(
            list(array.shape)))
    if array.dtype.kind == "f" and (array > _BRIGHTEST).any():
        raise ValueError("picture is {} up to {:g}, expected floats in 0..1; divide by 255 or "
                         "convert to uint8".format(array.dtype, np.nanmax(array)))
    array = _to_uint8(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    array = array[:, :, :3]
    return np.ascontiguousarray(array[:, :, ::-1] if rgb else array)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        # Not a number becomes black.
        return np.nan_to_num(np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)
    raise ValueError("picture is {}, expected uint8, bool, uint16 or float in 0..1".format(
        array.dtype))
