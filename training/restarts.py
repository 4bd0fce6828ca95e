"""Going on by itself after a failure, where torch's elastic launcher starts the ranks again."""

from __future__ import annotations

import os
from typing import Mapping, Optional

from utils.checkpoint import list_checkpoints


def find_restart(environ: Mapping[str, str], folder: str, config_name: str) -> Optional[str]:
    """Newest weights file of this very launch in `folder`, if this is a restart.

    None in the first attempt, and where nothing was saved since LAUNCH_TIME (seconds): files of an
    earlier training must not be mistaken for this one's.
    """
    if int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) == 0:
        return None
    since = float(environ.get("LAUNCH_TIME") or "inf")
    found = [path for path in list_checkpoints(folder, config_name)
             if os.path.getmtime(path) >= since]
    return found[-1] if found else None
