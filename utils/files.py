"""Files are written whole or not at all, and known by their digest; the user's cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Union

from utils.errors import UserError, nearest

_MOST_BYTES = 1 << 29
"""Of a file that is read at once: as many as the largest picture has without compression."""
Content = Union[bytes, memoryview, Callable[[BinaryIO], Any]]
"""Of a file, or what writes it to a stream."""
_LONGEST_NAME = 200
"""Bytes of a file's name that its temporary file has too; file systems take 255."""
GUESSED_ENCODING = "gb18030"
"""Of a Chinese Windows: what text is read in that is not Unicode."""
GUESSED = ("not UTF-8, read as GB18030, the encoding of a Chinese Windows; save as UTF-8 if names "
           "come out wrong")
"""What is said of such a file, behind its name."""
_ABANDONED = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp(\.\w+)?$")


def write_whole(path: str, content: Content) -> None:
    """Write a file so that `path` never holds half of it.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the
    name. Whatever fails before leaves the old file as it was and no temporary file behind. A link
    is followed; a device or a FIFO is written to. A full disk or a folder that cannot be written is
    a `UserError` that names the file.
    """
    try:
        if _is_special(path):
            with open(path, "wb") as special:
                _write(special, content)
            return
        target = os.path.realpath(path)
        with open_temporary(target) as stream:
            try:
                _write(stream, content)
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(stream.name, target)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}; free some space or "
                        "choose another folder") from error


def temporary_name(path: str, ending: str = "") -> str:
    """A random name beside `path`, of those that `remove_abandoned` knows."""
    folder, name = os.path.split(os.path.abspath(path))
    name = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    return os.path.join(folder, f".{name}.{os.urandom(4).hex()}.tmp{ending}")


def open_temporary(path: str, ending: str = "") -> BinaryIO:
    """A new file beside `path`, whose folder is made; its name ends in `.tmp` and `ending`.

    Nobody else has it open, and while it is open, nobody takes it for abandoned.
    """
    import fcntl  # exports hold this module, too, and run where there is none

    name = temporary_name(path, ending)
    os.makedirs(os.path.dirname(name), exist_ok=True)
    stream = open(name, "xb")  # noqa: SIM115
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return stream


def remove_abandoned(folder: str) -> None:
    """Remove the temporary files in a folder whose process was killed."""
    import fcntl

    with contextlib.suppress(OSError):
        for name in filter(_ABANDONED.match, os.listdir(folder)):
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(stream.name)


def clean_below(folder: str) -> None:
    """Remove such files in a folder and in all below it."""
    for place, _, _ in os.walk(folder):
        remove_abandoned(place)


def _is_special(path: str) -> bool:
    """Whether a file is to be written in its place: a device, a FIFO, an open descriptor."""
    return path.startswith(("/dev/fd/", "/dev/std")) or (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))


def refuse_endless(path: str | Path) -> None:
    """Raise an `OSError` where reading may never end: at a device or a FIFO, or a link to one."""
    mode = os.stat(str(path)).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a device or a FIFO, expected a file", str(path))


def read_whole(path: str | Path) -> bytes:
    """Bytes of a file; an `OSError` if it cannot be read, may never end, or is no file of the kind
    that fits into memory.
    """
    refuse_endless(path)
    with open(str(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"{size} bytes, expected at most {_MOST_BYTES}", str(path))
        return stream.read()


def read_text(path: Path, what: str = "file",
              notes: list[str] | None = None) -> str:
    """Text of a file in UTF-8, UTF-16 or a Chinese Windows' encoding; `what` it is to the user.
    That it is in the last goes to `notes`, for others look the same.

    Raises:
        UserError: it is missing, cannot be read, or is none of these.
    """
    try:
        data = read_whole(path)
    except FileNotFoundError:
        raise UserError(f"{what} not found: looked for {path.absolute()}{similar(path)}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from None
    for encoding in (unicode_encoding(data), GUESSED_ENCODING):
        with contextlib.suppress(ValueError):
            text = data.decode(encoding)
            if notes is not None and encoding == GUESSED_ENCODING:
                notes.append(f"{path}: {GUESSED}")
            return text
    raise UserError(f"{path}: is not text in UTF-8")


def unicode_encoding(start: bytes) -> str:
    """The encoding of a text that begins so, if it is one of Unicode's; `utf-8` where nothing
    tells.
    """
    return json.detect_encoding(start[:4])


def similar(path: Path) -> str:
    """A hint with the nearest name in the folder where `path` should be."""
    try:
        return nearest(path.name, sorted(os.listdir(str(path.parent))))
    except OSError:
        return ""


def first_match(path: str, pattern: str) -> str | None:
    """First group in the first line that `pattern` matches from its start; None where there is no
    such line, or no file.
    """
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            match = re.match(pattern, line.strip())
            if match:
                return match.group(1)
    return None


def digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal; an `OSError` if it cannot be read."""
    refuse_endless(path)
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def user_cache(kind: str) -> Path:
    """Folder of the user's cache for one kind of things; not made.

    Raises:
        UserError: nothing says where it is.
    """
    place = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
    if place.startswith("~"):
        raise UserError("this user has no home folder for what is kept between runs; set "
                        "XDG_CACHE_HOME to a folder")
    return Path(place) / "yolact" / kind


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process work in `folder`, which is made: it waits, and finds what this one made.

    Where the file system knows no locks several may do it: they write the same files, each whole.

    Raises:
        OSError: the folder cannot be made or opened.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(str(folder), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def refuse_unwritable(folder: str) -> None:
    """Raise a `UserError` if no file can be written in `folder`, which is made; leaves none there,
    nor any that a killed process has left.

    A run learns so before its first step what it would otherwise learn when it saves.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"cannot write to '{folder}': it is a file; choose another folder")
    remove_abandoned(folder)
    probe = os.path.join(folder, f".writable.{os.getpid()}")
    write_whole(probe, b"")
    os.unlink(probe)


def refuse_unwritable_file(path: str) -> None:
    """Raise a `UserError` if `path` is a folder, or its folder, which is made, takes no files."""
    if os.path.isdir(path):
        raise UserError(f"cannot write '{path}': it is a folder; give the name of a file")
    if _is_special(path) and os.access(path, os.W_OK):
        return
    try:
        refuse_unwritable(os.path.dirname(os.path.realpath(path)))
    except UserError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise UserError(f"cannot write '{path}': {reason}; free some space or choose another "
                        "folder") from error


def _write(stream: BinaryIO, content: Content) -> None:
    if callable(content):
        content(stream)
    else:
        stream.write(content)
