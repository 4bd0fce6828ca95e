"""Ctrl-C and SIGTERM as a wish that the training loop grants between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Dict, Optional, Type


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`.

    A step is then never torn apart and the checkpoint written afterwards is whole. A second signal
    does what the signal did before, for a run that hangs.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name = ""
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self._restore()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        self.requested = True
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
