"""Which pictures a flag means, and where what is made of them goes."""

from __future__ import annotations

import glob
import os
from collections import Counter
from typing import List, NamedTuple, Optional, Sequence, Tuple

from utils.errors import UserError

RESULTS = "results"


class Picture(NamedTuple):
    """One picture of a run."""

    source: str
    target: str
    """Picture file that is drawn."""
    image_id: int
    """Of the records in JSON."""


def split_pair(value: str) -> Tuple[str, Optional[str]]:
    """`in:out` -> both, or None for an output left out. Drives and addresses (://) stay whole."""
    source, separator, target = value.rpartition(":")
    is_drive = len(source) == 1 and source.isalpha() and target[:1] in ("\\", "/")
    if not separator or is_drive or target.startswith("//"):
        return value, None
    return source, target or None


def image_pair(value: str) -> Tuple[str, str]:
    """Paths of `--image=in.jpg[:out.png]`; the output is results/in.png if left out.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if target is None:
        target = os.path.join(RESULTS, _stem(source) + ".png")
    _refuse_overwriting(source, target)
    return source, target


def video_pair(value: str) -> Tuple[str, Optional[str]]:
    """Source and output of `--video=in.mp4[:out.mp4]` or `--video=0[:out.mp4]`.

    A file's output is results/in.mp4 if left out; a camera's is None then.

    Raises:
        UserError: both are the same file.
    """
    source, target = split_pair(value)
    if source.isdigit():
        return source, target
    if target is None:
        target = os.path.join(RESULTS, _stem(source) + ".mp4")
    _refuse_overwriting(source, target)
    return source, target


def find_pictures(value: str, suffixes: Sequence[str]) -> Tuple[List[Picture], str, int]:
    """Resolve `--images=in_dir[:out_dir]`; `in_dir` may be a pattern such as `in/*.jpg`.

    Args:
        value: of the flag.
        suffixes: endings, in lower case, of files that are taken for pictures. Files without any
            ending are tried, too; hidden ones are not.

    Returns:
        The pictures in the order of their names, the output folder, and how many other files there
        were. Image ids are the numbers that the files' names are, as in COCO; if they are not all
        different numbers, 1, 2, 3, ...

    Raises:
        UserError: no such folder, no pictures in it, or both folders are the same.
    """
    source, target = split_pair(value)
    is_folder = os.path.isdir(source)
    folder = target or os.path.join(RESULTS, os.path.basename(os.path.normpath(
        source if is_folder else os.path.dirname(source) or ".")))
    paths = sorted(glob.glob(os.path.join(glob.escape(source), "*")) if is_folder
                   else glob.glob(source))
    if not paths and not is_folder:
        raise UserError("--images: no folder '{}', and no files that fit it as a pattern; give a "
                        "folder with pictures".format(os.path.abspath(source)))
    files = [path for path in paths if os.path.isfile(path)]
    known = set(suffixes) | {""}
    chosen = [path for path in files if os.path.splitext(path)[1].lower() in known]
    if not chosen:
        raise UserError("--images: none of the {} files of '{}' is a picture (known: {})".format(
            len(files), source, " ".join(suffixes)))
    if any(os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder) for path in chosen):
        raise UserError("--images: '{}' is both the folder of the pictures and the output folder; "
                        "choose another output folder, e.g. --images={}:{}".format(
                            folder, source, os.path.join(RESULTS, "drawn")))
    names, ids = _output_names(chosen), _image_ids(chosen)
    pictures = [Picture(path, os.path.join(folder, name + ".png"), image_id)
                for path, name, image_id in zip(chosen, names, ids)]
    return pictures, folder, len(files) - len(chosen)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _output_names(paths: Sequence[str]) -> List[str]:
    """File names without their endings where that keeps them apart, else whole."""
    # Compared without case: some file systems do not know it.
    counts = Counter(_stem(path).lower() for path in paths)
    return [_stem(path) if counts[_stem(path).lower()] == 1 else os.path.basename(path)
            for path in paths]


def _image_ids(paths: Sequence[str]) -> List[int]:
    stems = [_stem(path) for path in paths]
    if all(stem.isdigit() and stem.isascii() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _refuse_overwriting(source: str, target: str) -> None:
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError("'{}' is both input and output; choose another name for the output".format(
            source))
