"""Read images: any format, whole or not at all, turned as they were annotated or are looked at."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Tuple

import cv2
import numpy as np

from utils.errors import UserError, first_line
from utils.files import read_whole, refuse_endless
from utils.pixels import MOST_PIXELS, image_from_array, is_truncated, promised_size

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff",
            ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".ico", ".pcx", ".avif",
            ".heic", ".heif", ".psd", ".sgi", ".hdr", ".exr")
"""Endings, in lower case, of files that are taken for images."""

Size = Tuple[int, int]
"""Width and height in pixels."""

_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 274, 256, 257  # EXIF and TIFF tags
_STUMBLES = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, EOFError,
             struct.error, zlib.error)
"""What Pillow raises over damaged files."""
_TURNS, _QUARTER_TURNS = range(2, 9), range(5, 9)  # orientations; 1 is upright


def read_image(path: str | Path, name: str = "", size: Size | None = None) -> np.ndarray:
    """Decode `path` to uint8 `[h, w, 3]`, BGR, turned as its EXIF orientation says.

    Of 16 bits the upper 8 stay; floats are taken as 0..1. Alpha is left out; of an animation the
    first image is taken.

    `name` is what the file is to the user, for example `image 42`. Where annotations give a `size`,
    pixels stay as stored if only so they have it.

    Raises:
        UserError: the file is missing, empty, truncated, not an image, or of values out of range.
    """
    prefix = f"{name}: " if name else ""
    what = prefix + str(path)
    try:
        data = read_whole(path)
    except FileNotFoundError:
        raise UserError(f"{prefix}image file not found: {Path(path).absolute()}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{prefix}cannot read {str(path)!r}: {error}") from None
    if not data:
        raise UserError(f"{what} is an empty file, expected an image")
    if is_truncated(data):
        raise UserError(f"{what} is truncated ({len(data)} bytes, the end of the image is "
                        "missing); copy or download it again")
    try:
        image = _decode(data)
        if image is not None and size is not None and image.shape[1::-1] != size:
            stored = _decode(data, as_stored=True)
            if stored is not None and stored.shape[1::-1] == size:
                return stored
    except ValueError as problem:
        raise UserError(f"{what}: {problem}") from None
    if image is None:
        raise UserError(f"{what} is not an image that OpenCV or Pillow can read ({len(data)} "
                        "bytes)")
    return image


def _promised_size(data: bytes) -> Size:
    """Width and height that a file's header promises; zeros where it says none.

    Raises:
        ValueError: they are more than Pillow goes on with.
    """
    if any(promised_size(data)):  # without opening a JPEG or PNG twice
        return promised_size(data)
    from PIL import Image

    try:
        with _pil_open(io.BytesIO(data)) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from None
    except _STUMBLES:
        return 0, 0  # the decoder says what is wrong


def _decode(data: bytes, as_stored: bool = False) -> np.ndarray | None:
    """Decode a file's bytes as `read_image` does; None if they are not an image.

    With `as_stored` the EXIF orientation is left out. TIFF files are turned all the same: their
    decoders know no other way.

    Raises:
        ValueError: the image has too many pixels, or values out of range.
    """
    width, height = _promised_size(data)  # a file of some bytes may promise gigabytes
    if width * height > MOST_PIXELS:
        raise ValueError(f"the image is too large: {width} x {height} pixels, at most "
                         f"{MOST_PIXELS} are read")
    # OpenCV leaves the orientation of AVIF alone, and that of WebP in some versions.
    if data[4:8] != b"ftyp" and not (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        flags = _FLAGS | cv2.IMREAD_IGNORE_ORIENTATION if as_stored else _FLAGS
        _set_log_level(0)  # what OpenCV cannot decode, Pillow may
        try:
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            decoded = None
        if decoded is not None and decoded.dtype != np.int32:
            return image_from_array(decoded)
    try:
        image = load_pil(data)
    except OSError:
        return None
    return image_from_pil(image, as_stored)


def load_pil(data: bytes, alone: bool = False) -> Image.Image:
    """Decode bytes with Pillow, of several images the first. Of a file itself Pillow would read
    as much as a chunk promises.

    Raises:
        OSError: it is not an image, or a damaged one.
        ValueError: it has too many pixels, or is not `alone`.
    """
    from PIL import Image

    try:
        with _pil_open(io.BytesIO(data)) as image:
            count = getattr(image, "n_frames", 1) if alone else 1
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is too large: {error}") from None
    except _STUMBLES:
        raise OSError("is not an image that can be read") from None
    if count > 1:
        raise ValueError(f"holds {count} images (pages), expected one; save each as a file")
    return image


def image_from_pil(image: Image.Image, as_stored: bool = False) -> np.ndarray:
    """Convert a PIL image of any mode to the form of `read_image`, which `as_stored` is not turned.

    Raises:
        ValueError: the values are out of range, see `image_from_array`.
    """
    from PIL import ImageOps

    image.load()
    # Loading turns TIFF files, and some versions of Pillow would do it again.
    kept = as_stored or image.format == "TIFF"
    turned = image if kept else ImageOps.exif_transpose(image)
    if turned.mode.startswith(("I", "F")):  # 16 and 32 bit, grey
        values = np.asarray(turned)
        # Some versions of Pillow hold 16 bits in 32.
        if values.dtype == np.int32 and 255 < values.max() <= 65535 and values.min() >= 0:
            values = values.astype(np.uint16)
        return image_from_array(values)
    return image_from_array(np.asarray(turned.convert("RGB")), rgb=True)


class Header(NamedTuple):
    """What the header of an image file says."""

    stored: Size
    """Of the pixels as stored."""
    shown: Size
    """Of the image as viewers show it."""
    turned: bool
    """There is an EXIF orientation that turns or mirrors the image."""

    def annotated(self, size: Size | None) -> Size:
        """The one of both sizes that annotations made for an image of `size` refer to."""
        return self.stored if size == self.stored else self.shown


def read_header(path: str | Path) -> Header:
    """Sizes and orientation of an image file without its pixels.

    Raises:
        OSError: the file is missing (FileNotFoundError) or not an image.
    """
    from PIL import Image

    try:
        refuse_endless(path)
        with _Content(io.FileIO(str(path))) as content, _pil_open(content) as image:
            stored = int(image.size[0]), int(image.size[1])
            if image.format == "TIFF":  # some versions of Pillow give the size as shown
                tags = image.tag_v2  # type: ignore[attr-defined]
                stored = int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
            try:
                orientation = image.getexif().get(_ORIENTATION, 1)
            except _STUMBLES:
                orientation = 1  # damaged EXIF data: viewers show the image as stored
    except FileNotFoundError:
        raise
    except Image.UnidentifiedImageError:  # names what Pillow was given
        raise OSError("is not an image that can be read") from None
    except (Image.DecompressionBombError, *_STUMBLES) as error:
        raise OSError(first_line(error)) from None
    shown = stored[::-1] if orientation in _QUARTER_TURNS else stored
    return Header(stored, shown, orientation in _TURNS)


class _Content(io.BufferedReader):
    """A file of which Pillow asks for as much as a header promises, and gets what there is."""

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes."""
        return super().read(min(-1 if size is None else size, os.fstat(self.fileno()).st_size))


def _pil_open(source: io.BytesIO | io.BufferedReader) -> Image.Image:
    """A file whose pixels are not decoded yet; a large one without Pillow's warning."""
    from PIL import Image  # needed for rare formats, headers and masks only

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)
