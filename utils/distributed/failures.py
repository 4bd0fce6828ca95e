"""Why a process of a run ended, written where its supervisor finds it.

The first failure of a run drags the other processes down, milliseconds later and with errors of
their own. So a record holds the time, and whether its cause is only that another process has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

FILE_VARIABLE = "FAILURE_FILE"
"""Environment variable that names the file a process writes its record to."""

_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe",
              "connection refused", "connection was likely closed", "socket timeout",
              "timed out waiting", "connectfullmesh", "application timeout caused pair closure",
              "remote process exited", "nccl", "hccl")


def is_lost_peer(text: str) -> bool:
    """Whether an error message speaks of another process that has gone."""
    return any(part in text.lower() for part in _LOST_PEER)


def write_record(path: str, rank: int, cause: str, log: str = "", status: int = 1,
                 lost_peer: bool = False, when: Optional[float] = None) -> None:
    """Write a record unless there is one already: the first cause is the one that counts."""
    if os.path.exists(path):
        return
    record = {"rank": rank, "time": when or time.time(), "cause": cause, "status": status,
              "log": log, "lost_peer": lost_peer}
    temporary = "{}.{}".format(path, os.getpid())
    with contextlib.suppress(OSError):  # a full disk must not hide the failure itself
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(record, stream)
        os.replace(temporary, path)


@contextlib.contextmanager
def recorded(rank: int, environ: Optional[Mapping[str, str]] = None) -> Iterator[None]:
    """Record an exception that leaves the block, before anything is torn down for it."""
    try:
        yield
    except Exception as error:
        note(rank, "{}: {}".format(type(error).__name__, error), environ)
        raise


def note(rank: int, cause: str, environ: Optional[Mapping[str, str]] = None) -> None:
    """Record `cause` where the supervisor asked for it; without a supervisor do nothing."""
    path = (os.environ if environ is None else environ).get(FILE_VARIABLE)
    if path:
        sentence = " ".join(cause.split())
        write_record(path, rank, sentence[:500], lost_peer=is_lost_peer(cause))


def complete_record(path: str, log: str, status: int) -> None:
    """Add what only the supervisor knows to the program's own record."""
    records = read_records([path])
    if records:
        os.unlink(path)
        record = records[0]
        write_record(path, record["rank"], record["cause"], log, status, record["lost_peer"],
                     record["time"])


def read_records(paths: Iterable[str]) -> List[Dict[str, Any]]:
    """The records among `paths` that exist, the decisive one first."""
    records = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            with open(path, encoding="utf-8") as stream:
                records.append(json.load(stream))
    return sorted(records, key=lambda record: (record["lost_peer"], record["time"]))
