"""Ctrl-C and SIGTERM as a wish that the training loop grants between two steps."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type

SAME_WISH_SECONDS = 2.0


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`.

    A step is then never torn apart and the checkpoint written afterwards is whole. A second signal
    does what the signal did before, for a run that hangs; but not at once: a batch system sends one
    to every process and the launcher passes on its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name = ""
        self._since = 0.0
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if not self.requested:
            self.requested = True
            self.signal_name = signal.Signals(number).name
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SAME_WISH_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
