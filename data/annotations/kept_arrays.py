"""Arrays that take long to make are kept in the user's cache, each set as one memory-mapped file.

All processes of a host that open a file share its pages, and none holds a copy. A file is never
changed: another content has another key and so another file. What is damaged is made again, and
where the cache cannot be read or written the arrays live in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import alone, digest, remove_abandoned, user_cache, write_whole

_START = struct.Struct("<8sII")
"""What it is, the CRC-32 of all that follows, and the length of the directory (JSON)."""
_MAGIC = b"YOLACTa1"
_ALIGNMENT = 64
_SUFFIX = ".arrays"
_UNUSED_DAYS = 60


class KeptArrays(NamedTuple):
    """Arrays by name, and what is to be said about them."""

    facts: dict[str, Any]
    """As JSON holds it."""
    arrays: dict[str, np.ndarray]
    """Not to be changed."""
    lasting: bool = True
    """Whether they follow from the content of their source alone."""
    path: str | None = None
    """The file that they lie in; None: in this process's memory."""


def keep(kind: str, source: str, readers: Iterable[Path],
         make: Callable[[], KeptArrays]) -> KeptArrays:
    """What `make` reads from `source`, from the cache (folder `kind`) if it is there; one process
    of a host makes it while the others wait.

    The file is known by its content, wherever it lies. What another version of the Python files
    `readers` made is not taken. Errors of `make` are raised, and nothing is kept.
    """
    try:
        content = digest(source)
        key = hashlib.sha256(content.encode("ascii"))
        for reader in sorted(readers):
            key.update(reader.read_bytes())
        path = user_cache(kind) / (key.hexdigest() + _SUFFIX)
    except (OSError, UserError):
        return make()
    found = open_kept(path)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(alone(path.parent))
        found = open_kept(path)
        if found is not None:
            return found
        made = make()
        if made.lasting and digest(source) == content:  # not one that was written meanwhile
            with contextlib.suppress(UserError):
                _write(path, made)
                return open_kept(path) or made
        return made


def open_kept(path: Path) -> KeptArrays | None:
    """Map the arrays of a file into memory; None where it is not there, or not as it was written.

    Everything is read once, for its checksum: half a second for a gigabyte.
    """
    try:
        with open(str(path), "rb") as stream:
            magic, checksum, length = _START.unpack(stream.read(_START.size))
            found = 0
            for block in iter(lambda: stream.read(1 << 20), b""):
                found = zlib.crc32(block, found)
            if magic != _MAGIC or found != checksum:
                return None
            memory = np.memmap(stream, np.uint8, "r").view(np.ndarray)
        first = _START.size + length
        directory = json.loads(memory[_START.size:first].tobytes().decode("ascii"))
        arrays = {}
        for name, kind, shape in directory["arrays"]:
            first += -first % _ALIGNMENT
            size = np.dtype(kind).itemsize * int(np.prod(shape))
            arrays[name] = memory[first:first + size].view(kind).reshape(shape)
            first += size
    except (OSError, ValueError, struct.error):
        return None
    with contextlib.suppress(OSError):
        os.utime(str(path))
    return KeptArrays(directory["facts"], arrays, path=str(path))


def _write(path: Path, kept: KeptArrays) -> None:
    directory = json.dumps({"facts": kept.facts, "arrays": [
        (name, values.dtype.str, values.shape) for name, values in kept.arrays.items()]})
    pieces: list[Any] = [directory.encode("ascii")]
    end = _START.size + len(directory)
    for values in kept.arrays.values():
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        pieces += [bytes(-end % _ALIGNMENT), data]
        end += -end % _ALIGNMENT + len(data)
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    pieces.insert(0, _START.pack(_MAGIC, checksum, len(directory)))
    remove_abandoned(str(path.parent))
    for other in path.parent.glob("*" + _SUFFIX):  # those that no process has opened for long
        with contextlib.suppress(OSError):
            if other.stat().st_mtime < time.time() - _UNUSED_DAYS * 86400:
                other.unlink()
    write_whole(str(path), lambda stream: [stream.write(piece) for piece in pieces])
