"""How a process of a run ends early: it is asked to stop, its data hang, or it fails.

A stop request lets the loop save first; a hang and a failure leave a record for the supervisor,
which tells the launcher which rank failed first. Nothing heavy is imported: the supervisor, which
imports this, has to start at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Iterable, Iterator, Mapping

from utils.errors import UserError

LAUNCHER_VARIABLE = "LAUNCHER_PID"
"""Environment variable that holds the number of the launcher's shell."""
FILE_VARIABLE = "FAILURE_FILE"
"""Environment variable that names the file a process writes its record to."""
EXIT_HUNG = 1
FIRST_FACTOR = 10
"""The first item may take this many limits: workers start, caches are cold."""
GRACE_SECONDS = 30.0
"""A loader that hangs and does not hear of it within this ends its process."""
SAME_REQUEST_SECONDS = 2.0
"""A signal that comes sooner after another one belongs to the same stop request."""

_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe",
              "connection refused", "connection was likely closed", "socket timeout",
              "timed out waiting", "connectfullmesh", "application timeout caused pair closure",
              "remote process exited", "ncclremoteerror", "ei0002", "ei0006")
"""EI0002 and EI0006 are HCCL's: another rank did not come in time. The name of a library alone
means nothing: a card that cannot start its collectives says NCCL or HCCL, too."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies, by kill -9 too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def is_lost_peer(text: str) -> bool:
    """Whether an error message speaks of another process that has gone."""
    return any(part in text.lower() for part in _LOST_PEER)


def new_record(rank: int, cause: str) -> dict[str, Any]:
    """The record of a failure that is seen now; log and exit code are for the supervisor to add."""
    return {"rank": rank, "time": time.time(), "cause": " ".join(cause.split())[:500],
            "lost_peer": is_lost_peer(cause), "log": "", "status": 1}


def write_record(path: str, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all; a full disk must not hide the failure itself."""
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(record, stream)
        os.replace(temporary, path)


def record_cause(rank: int, cause: str) -> None:
    """Record the first cause, the one that counts, where the supervisor asked for it."""
    path = os.environ.get(FILE_VARIABLE)
    if path and not os.path.exists(path):
        write_record(path, new_record(rank, cause))


@contextlib.contextmanager
def record_failure(rank: int) -> Iterator[None]:
    """Record an exception that leaves the block, before anything is torn down for it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        record_cause(rank, f"{kind}{error}")
        raise


def read_records(paths: Iterable[str]) -> list[dict[str, Any]]:
    """The records among `paths` that exist, the decisive one first."""
    records = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            with open(path, encoding="utf-8") as stream:
                records.append(json.load(stream))
    return sorted(records, key=lambda record: (record["lost_peer"], record["time"]))


def leave_hung(rank: int, cause: str) -> None:
    """End this process from a thread, because its main thread hangs, perhaps in foreign code.

    An exception could not get through. So say what happened, show where everything stands, end the
    loader processes and leave.
    """
    record_cause(rank, cause)
    faulthandler.dump_traceback(sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    print(f"training stopped: rank {rank}: {cause}", file=sys.stderr, flush=True)
    os._exit(EXIT_HUNG)


@contextlib.contextmanager
def time_limit(seconds: float, rank: int, cause: str) -> Iterator[None]:
    """End the process if the block takes longer than `seconds`; 0 is no limit."""
    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, leave_hung, (rank, cause))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def interrupted_after(seconds: float, sentence: str) -> Iterator[None]:
    """Raise `UserError(sentence)` in the main thread if that is in the block and the block takes
    longer than `seconds`; 0 is no limit. Waiting for a file or a queue is interrupted.
    """
    def expire(number: int, frame: FrameType | None) -> None:
        raise UserError(sentence)

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class WatchedLoader:
    """Iterate `source`; an item that takes longer than `limit` seconds (0: no limit) is a
    `UserError`. Where that does not get through, because foreign code hangs, the process ends a
    little later. `seconds` were spent waiting for `items` so far.
    """

    def __init__(self, source: Iterable[Any], limit: float, rank: int = 0) -> None:
        self._source, self._limit, self._rank = source, limit, rank
        self.seconds = 0.0
        self.items = 0
        self._start = time.perf_counter()
        self._told = (0.0, 0)

    def mean_since_last(self) -> float:
        """Mean wait for an item since the last call, in seconds."""
        seconds, items = self.seconds - self._told[0], self.items - self._told[1]
        self._told = (self.seconds, self.items)
        return seconds / max(items, 1)

    def sentence(self) -> str:
        """How much of the time since the start was spent waiting."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return (f"Waited for data {100 * self.seconds / elapsed:.1f} % of the time "
                f"({self.seconds:.1f} of {elapsed:.1f} s)")

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._source)
        limit = self._limit * FIRST_FACTOR
        while True:
            start = time.perf_counter()
            sentence = (f"the data loader delivered no batch for {limit:g} s (--loader_timeout); "
                        "the storage or a loader process hangs, or /dev/shm is full")
            try:
                with time_limit(limit and limit + GRACE_SECONDS, self._rank, sentence):
                    with interrupted_after(limit, sentence):
                        item = next(items)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - start
            self.items += 1
            limit = self._limit
            yield item


class StopRequest:
    """Context in which the first signal to end is a stop request: it only sets `requested`.

    SIGINT, SIGTERM, SIGUSR1 (batch systems warn with it) and SIGHUP (the terminal is gone), each
    unless it is ignored, as SIGHUP is under nohup.

    A step is then never torn apart and the checkpoint written afterwards is whole. A second signal
    does what the signal did before, for a run that hangs; but not at once: a batch system sends one
    to every process and the launcher passes on its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name = ""
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals go to the main thread; a notebook may train in another
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self.signal_name = signal.Signals(number).name
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)
