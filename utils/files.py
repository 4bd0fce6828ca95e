"""Files are written whole or not at all."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Callable

from utils.errors import UserError


def write_whole(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file through `write(stream)` so that `path` never holds half of it.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the
    name. Whatever fails before leaves the old file as it was and no temporary file behind. A full
    disk or a folder that cannot be written is a `UserError` that names the file.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(folder, ".{}.{}.tmp".format(os.path.basename(path), os.getpid()))
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    except OSError as error:
        raise UserError("cannot write '{}': {}; free some space or choose another folder".format(
            path, error.strerror or error)) from error
