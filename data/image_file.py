"""Read an image of a dataset, whole or not at all, in the order of pixels that was annotated.

A photo may be stored turned, with an EXIF orientation that says how to show it. Viewers, browsers
and annotation tools (labelme, CVAT, Label Studio, VIA) show it upright, so do Ultralytics' tools
and the original YOLACT when they read it, and annotations refer to that picture. Annotations that
were made on the pixels as stored exist as well. The size in the annotation file tells which of the
two it is, except where both have the same size: then the picture is turned, as viewers do.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Optional, Tuple, Union

import numpy as np

from data.image_bytes import is_truncated
from data.picture import decode_picture
from utils.errors import UserError

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
        raise UserError("{}: file not found: {}".format(name, Path(path).absolute())) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError("{}: cannot read {!r}: {}".format(name, str(path), error)) from None
    if not data:
        raise UserError("{}: {} is an empty file, expected an image".format(name, path))
    if is_truncated(data):
        raise UserError("{}: {} is truncated ({} bytes, the end of the image is missing); copy or "
                        "download it again".format(name, path, len(data)))
    try:
        image = decode_picture(data)
        if image is not None and size is not None and image.shape[1::-1] != size:
            stored = decode_picture(data, as_stored=True)
            if stored is not None and stored.shape[1::-1] == size:
                return stored
    except ValueError as problem:
        raise UserError("{}: {} {}".format(name, path, problem)) from None
    if image is None:
        raise UserError("{}: {} is not an image that OpenCV or Pillow can read ({} bytes)".format(
            name, path, len(data)))
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
        raise UserError("{}: file not found: {}".format(name, Path(path).absolute())) from None
    except (OSError, ValueError):
        raise UserError("{}: {!r} is not an image; its width and height are needed because the "
                        "annotation file does not give them".format(name, str(path))) from None
