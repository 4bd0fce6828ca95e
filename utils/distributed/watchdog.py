"""Waiting with a limit: one process that hangs must not hold all cards for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from typing import Callable, Generic, Iterable, Iterator, Optional, TypeVar

from utils.distributed.failures import note

T = TypeVar("T")

FIRST_FACTOR = 10
"""The first item may take this many limits: workers start, caches are cold."""
EXIT_HUNG = 1


def leave(rank: int, cause: str) -> None:
    """End this process from a thread, because its main thread hangs, perhaps in foreign code.

    An exception could not get through. So say what happened, show where everything stands, end the
    loader processes and leave.
    """
    note(rank, cause)
    faulthandler.dump_traceback(sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    print("training stopped: rank {}: {}".format(rank, cause), file=sys.stderr, flush=True)
    os._exit(EXIT_HUNG)


@contextlib.contextmanager
def time_limit(seconds: float, rank: int, cause: str) -> Iterator[None]:
    """End the process if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, leave, (rank, cause))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class WatchedLoader(Generic[T]):
    """Iterate `source`; end the process if one item takes longer than `limit` seconds.

    Args:
        source: any iterable, usually a data loader.
        limit: seconds for an item; 0 waits for ever.
        rank: of this process, for the message.

    Attributes:
        seconds: spent waiting for items so far.
        items: received so far.
    """

    def __init__(self, source: Iterable[T], limit: float, rank: int = 0,
                 end: Optional[Callable[[int, str], None]] = None) -> None:
        self._source = source
        self._limit = limit
        self._rank = rank
        self._end = end or leave
        self._deadline: Optional[float] = None
        self._ended = False
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
        return "Waited for data {:.1f} % of the time ({:.1f} of {:.1f} s)".format(
            100 * self.seconds / elapsed, self.seconds, elapsed)

    def __iter__(self) -> Iterator[T]:
        if self._limit > 0:
            threading.Thread(target=self._watch, name="loader watchdog", daemon=True).start()
        try:
            yield from self._timed()
        finally:
            self._ended = True

    def _timed(self) -> Iterator[T]:
        limit = self._limit * FIRST_FACTOR
        items = iter(self._source)
        while True:
            start = time.perf_counter()
            self._deadline = time.monotonic() + limit
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._deadline = None
            self.seconds += time.perf_counter() - start
            self.items += 1
            limit = self._limit
            yield item

    def _watch(self) -> None:
        while not self._ended:
            time.sleep(min(1.0, self._limit / 10))
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end(self._rank, "the data loader delivered no batch for {:g} s "
                          "(--loader_timeout); the storage or a loader process hangs".format(
                              self._limit))
                return
