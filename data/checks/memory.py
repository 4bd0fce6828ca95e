"""What was found out before, in the user's cache folder, so that it is found out once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Dict, Optional

from utils.errors import UserError
from utils.files import write_whole

_VERSION = 3


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/yolact`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "yolact"


def file_stamp(path: str) -> str:
    """Path, size and time of a file: another text as soon as the file changes."""
    state = os.stat(path)
    return "{} {} {}".format(os.path.abspath(path), state.st_size, state.st_mtime_ns)


def file_state(path: str) -> str:
    """`file_stamp`, or '' for a file that is not there."""
    try:
        return file_stamp(path)
    except OSError:
        return ""


class Memory:
    """Texts by stamp, of one dataset.

    Args:
        name: what the dataset is known by, for example the path of its annotation file.
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha1(os.path.abspath(name).encode("utf-8", "surrogatepass")).hexdigest()
        self.path = cache_folder() / "check-{}.json".format(digest[:16])
        self._used: Dict[str, str] = {}
        self._known: Dict[str, str] = {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["version"] == _VERSION:
                self._known = {str(key): str(text) for key, text in content["known"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or not ours: everything is found out anew

    def recall(self, stamp: str) -> Optional[str]:
        """The text kept for `stamp`, or None."""
        if stamp in self._known:
            self._used[stamp] = self._known[stamp]
        return self._known.get(stamp)

    def keep(self, stamp: str, text: str) -> None:
        """Remember `text`."""
        self._known[stamp] = self._used[stamp] = text

    def save(self, forget: bool = False) -> bool:
        """Write it; `forget` drops what was neither asked for nor new.

        Returns False where the cache folder cannot be written.
        """
        text = json.dumps({"version": _VERSION, "known": self._used if forget else self._known})
        try:
            write_whole(str(self.path), lambda stream: stream.write(text.encode("utf-8")))
        except UserError:
            return False
        return True
