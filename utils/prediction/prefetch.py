"""Prepare the next items of an iterator in a thread while the current one is worked on."""

from __future__ import annotations

import queue
import threading
from typing import Any, Generic, Iterable, Iterator, TypeVar

T = TypeVar("T")
_END = object()


class _Failure:
    """An exception on its way from the thread to the reader."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetch(Generic[T]):
    """Iterate `source` in one thread, at most `depth` items ahead.

    An exception in the thread is raised where the items are read, at its place in their order.
    Close it, or leave the `with` block, to end the thread early; the source is closed in any case.

    Args:
        source: read by the thread alone.
        depth: items that may wait.
        newest_only: items that nobody had time for are dropped, as of a camera.
    """

    def __init__(self, source: Iterable[T], depth: int = 2, newest_only: bool = False) -> None:
        self._source = source
        self._newest_only = newest_only
        self._items: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._items.get()
            if item is _END:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item

    def close(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._stopped.set()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        try:
            for item in self._source:
                if not self._put(item, self._newest_only):
                    break
            self._put(_END)
        except BaseException as error:  # whatever it is, the reader has to know
            self._put(_Failure(error))
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()

    def _put(self, item: Any, drop: bool = False) -> bool:
        """Hand on an item; False if nobody wants it any more."""
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=0 if drop else 0.1)
                return True
            except queue.Full:
                if drop:
                    self._drop_oldest()
        return False

    def _drop_oldest(self) -> None:
        try:
            self._items.get_nowait()
        except queue.Empty:
            pass
