"""Read an image: any format, whole or not at all, turned as it was annotated or is looked at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

import cv2
import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
import struct
import warnings
from typing import Any, NamedTuple, Tuple

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
        raise UserError(f"picture not found: {Path(path).absolute()}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not data:
        raise UserError(f"{path} is an empty file, expected a picture")
    if is_truncated(data):
        raise UserError(f"{path} is truncated ({len(data)} bytes, the end of the picture is "
                        "missing); copy or download it again")
    try:
        image = decode_picture(data)
    except ValueError as problem:
        raise UserError(f"{path} {problem}") from None
    if image is None:
        raise UserError(f"{path} is not a picture that OpenCV or Pillow can read ({len(data)} "
                        "bytes)")
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
        raise ValueError(f"is too large: {error}") from None
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
        raise ValueError(f"picture is {list(array.shape)}, expected [h, w], [h, w, 1], [h, w, 3] "
                         "or [h, w, 4]")
    if array.dtype.kind == "f" and (array > _BRIGHTEST).any():
        raise ValueError(f"picture is {array.dtype} up to {np.nanmax(array):g}, expected floats in "
                         "0..1; divide by 255 or convert to uint8")
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
    raise ValueError(f"picture is {array.dtype}, expected uint8, bool, uint16 or float in 0..1")


Size = Tuple[int, int]
"""Width and height in pixels."""

_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 274, 256, 257  # EXIF and TIFF tags
_TURNS, _QUARTER_TURNS = range(2, 9), range(5, 9)  # orientations; 1 is upright


class Header(NamedTuple):
    """What the header of an image file says."""

    stored: Size
    """Of the pixels as stored."""
    shown: Size
    """Of the picture as viewers show it."""
    turned: bool
    """There is an EXIF orientation that turns or mirrors the picture."""

    def annotated(self, size: Optional[Size]) -> Size:
        """The one of both sizes that annotations made for a picture of `size` refer to."""
        return self.stored if size == self.stored else self.shown


def read_image(path: Union[str, Path], name: str = "image",
               size: Optional[Size] = None) -> np.ndarray:
    """Decode `path` to uint8 `[h, w, 3]`, BGR, turned as its EXIF orientation says.

    Args:
        path: JPEG, PNG or another format that OpenCV or Pillow reads.
        name: what the file is to the user, for the error: for example `image 42`.
        size: width and height that annotations give; pixels stay as stored where only so they have
            this size.

    Raises:
        UserError: the file is missing, empty, truncated or not an image.
    """
    try:
        with open(str(path), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"{name}: file not found: {Path(path).absolute()}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{name}: cannot read {str(path)!r}: {error}") from None
    if not data:
        raise UserError(f"{name}: {path} is an empty file, expected an image")
    if is_truncated(data):
        raise UserError(f"{name}: {path} is truncated ({len(data)} bytes, the end of the image is "
                        "missing); copy or download it again")
    try:
        image = decode_picture(data)
        if image is not None and size is not None and image.shape[1::-1] != size:
            stored = decode_picture(data, as_stored=True)
            if stored is not None and stored.shape[1::-1] == size:
                return stored
    except ValueError as problem:
        raise UserError(f"{name}: {path} {problem}") from None
    if image is None:
        raise UserError(f"{name}: {path} is not an image that OpenCV or Pillow can read "
                        f"({len(data)} bytes)")
    return image


def read_header(path: Union[str, Path]) -> Header:
    """Sizes and orientation of an image file without its pixels.

    Raises:
        OSError, ValueError: the file is missing (FileNotFoundError) or not an image.
    """
    from PIL import Image  # needed for headers alone

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(str(path))
    except Image.DecompressionBombError:
        return _decoded_header(path)
    with image:
        stored = int(image.size[0]), int(image.size[1])
        if image.format == "TIFF":  # some versions of Pillow give the size as shown
            tags = image.tag_v2  # type: ignore[attr-defined]
            stored = int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
        orientation = _orientation(image)
    shown = stored[::-1] if orientation in _QUARTER_TURNS else stored
    return Header(stored, shown, orientation in _TURNS)


def _decoded_header(path: Union[str, Path]) -> Header:
    """The same for a picture of more pixels than Pillow opens; OpenCV reads some of them."""
    data = Path(path).read_bytes()
    sizes = []
    for as_stored in (True, False):
        image = decode_picture(data, as_stored)
        if image is None:
            raise ValueError("not an image")
        sizes.append((int(image.shape[1]), int(image.shape[0])))
    return Header(sizes[0], sizes[1], sizes[0] != sizes[1])


def _orientation(image: Any) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):
        return 1  # damaged EXIF data: viewers show the picture as stored


def image_size(path: Union[str, Path], name: str = "image") -> Size:
    """Width and height in pixels of the picture as viewers show it, from the header alone.

    Raises:
        UserError: the file is missing or not an image.
    """
    try:
        return read_header(path).shown
    except FileNotFoundError:
        raise UserError(f"{name}: file not found: {Path(path).absolute()}") from None
    except (OSError, ValueError):
        raise UserError(f"{name}: {str(path)!r} is not an image; its width and height are needed "
                        "because the annotation file does not give them") from None
