"""The last line of a terminal while something long runs; nothing where the output is a file.

What a line says is put together from what the host knows: the device is asked for nothing.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Callable, Sequence, TextIO

INTERVAL = 0.5
"""Seconds between two drawings."""

_SMALLEST_BAR, _LARGEST_BAR = 8, 30
_FALLBACK_COLUMNS = 80


class ProgressBar:
    """A line that is drawn over and over: bar, count, time left, and what the caller adds.

    Parts that do not fit the terminal's width are left out from the end; the bar itself shrinks
    first.

    Args:
        total: steps of the whole; 0 where it is not known, then there is no bar.
        stream: where the line goes; there is none unless this is a terminal.
        beside: another stream that must be a terminal, too (that of the log lines).
        enabled: False shows nothing.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, stream: TextIO, beside: TextIO | None = None,
                 enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._stream = stream
        self._enabled = enabled and stream.isatty() and (beside is None or beside.isatty())
        self._clock = clock
        self._next = 0.0
        self._drawn = False

    @property
    def is_due(self) -> bool:
        """Whether `show` would draw: lets a caller leave out the work for what it would say."""
        return self._enabled and self._clock() >= self._next

    def show(self, done: int, parts: Sequence[str] = ()) -> None:
        """Draw the line if it is due, with `parts` behind the count, most important first."""
        if self.is_due:
            self._draw(done, parts)

    def finish(self, done: int, parts: Sequence[str] = ()) -> None:
        """Draw the line a last time and leave it there; more calls do nothing."""
        if self._enabled:
            self._draw(done, parts)
            self._write("\n")
            self._enabled = self._drawn = False

    def clear(self) -> None:
        """Make room for a line of the log; the next `show` draws at once."""
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn, self._next = False, 0.0

    def _draw(self, done: int, parts: Sequence[str]) -> None:
        line = compose(done, self.total, parts, _columns(self._stream))
        self._write(f"\r{line}\x1b[K")
        self._drawn, self._next = True, self._clock() + INTERVAL

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def compose(done: int, total: int, parts: Sequence[str], columns: int) -> str:
    """One line of less than `columns` characters."""
    count = f"{done}" if not total else f"{done} / {total} ({100 * done / total:.1f}%)"
    shown = [count]
    for part in parts:
        if len("  ".join(shown + [part])) >= columns:
            break
        shown.append(part)
    line = "  ".join(shown)
    room = min(columns - 1 - len(line) - 3, _LARGEST_BAR)
    if total and room >= _SMALLEST_BAR:
        filled = room * min(done, total) // total
        line = f"[{'=' * filled}{' ' * (room - filled)}] {line}"
    return line[:max(columns - 1, 1)]


def duration(seconds: float) -> str:
    """`1:02:03`, with days in front where there are some."""
    return str(datetime.timedelta(seconds=int(seconds)))


def short_seconds(seconds: float) -> str:
    """`1.25 s` or `125 ms`."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def step_parts(left: int, step: float, data: float, memory: int) -> list[str]:
    """What a line of training steps says behind its count: seconds of a `step` (0: not measured),
    of these waiting for `data`, and the bytes of `memory` reserved on the device, if any.
    """
    if not step:
        return []
    shown = [f"ETA {duration(left * step)}",
             f"data {short_seconds(data)} + compute {short_seconds(max(step - data, 0.0))}"]
    return shown + [f"{memory / 2 ** 30:.1f} GiB"] if memory else shown


def image_parts(left: int, images_per_second: float) -> list[str]:
    """What a line of images says behind its count; `left` 0 leaves out the time that is left."""
    eta = [f"ETA {duration(left / max(images_per_second, 1e-9))}"] if left > 0 else []
    return eta + [f"{images_per_second:.2f} images/s"]


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _FALLBACK_COLUMNS
    except (OSError, ValueError):  # no terminal behind it, or none that knows its width
        return _FALLBACK_COLUMNS
