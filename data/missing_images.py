"""Say where an image that is not where the annotation file says may be instead."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

_UP = 3
"""Folders above the image folder that are looked at."""


def missing_hint(images_dir: str, file_name: str) -> str:
    """What to change so that a missing image is found, as the end of a sentence; '' if unknown.

    Args:
        images_dir: folder that file names refer to.
        file_name: of an image that is not there, as the annotation file gives it.
    """
    folder = Path(os.path.abspath(images_dir))
    written = file_name.replace("\\", "/")
    base = written.rsplit("/", 1)[-1]
    for above in list(folder.parents)[:_UP]:
        if (above / written).is_file():
            return "; it is found where {} is given as the image folder".format(above)
    if written != file_name and (folder / written).is_file():
        return "; {} is there: write / in place of \\ in file_name".format(written)
    if base != file_name and (folder / base).is_file():
        return "; {} itself is there: leave the folders out of file_name".format(base)
    parent = (folder / written).parent
    for name in sorted(os.listdir(str(parent))) if parent.is_dir() else []:
        if name != base and _plain(name) == _plain(base):
            return ("; there is {}, which differs in upper and lower case or in the form of its "
                    "accents (Unicode)".format(name))
    return ""


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
