"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Collection, Iterator

from utils.errors import UserError
from utils.files import alone


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to fill, which takes the name `path` at the end; after an error none is left.

    What a killed export has left there goes first.

    Raises:
        UserError: there is something at `path` already, or nothing can be written there.
    """
    path = os.path.abspath(path)
    _refuse_taken(path)
    hidden = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.export")
    new = [str(parent) for parent in Path(path).parents if not parent.exists()]
    try:
        with alone(Path(hidden)), contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, hidden, ignore_errors=True)
            _refuse_taken(path)  # by the one that this one has waited for
            clear(hidden)
            yield hidden
            if os.path.isdir(path):
                os.rmdir(path)
            os.replace(hidden, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}; free some space or "
                        "choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # one holds the folder, or ATC's output
            for parent in new:
                os.rmdir(parent)


def _refuse_taken(path: str) -> None:
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"'{path}' exists and is not an empty folder; choose another --out, or "
                        "remove it")


def clear(folder: str, keep: Collection[str] = ()) -> None:
    """Remove all that is in a folder, but what is named in `keep`."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.name in keep:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
