"""The lines of a training run, in ModelZoo's format, and the same numbers as JSON lines.

Launchers and CI systems read these lines with grep and awk, so their format is fixed to the byte,
and no other line of a run may contain `avg_fps:`, ` T: ` or the names of the two COCO metrics.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from typing import Any, Callable, Dict, Optional

from utils.errors import UserError


class Throughput:
    """Images per second over a window that starts after the first steps.

    The definition is ModelZoo's: steps x global batch / wall time, with data loading and checkpoint
    saving inside and compilation and warm-up (the first `start_iter` steps of the run) outside.
    Validation is outside too. The caller makes sure that the device is idle at both edges.

    Args:
        images_per_step: of all cards.
        start_iter: steps of this session before the window opens.
        clock: seconds, for tests.
    """

    def __init__(self, images_per_step: int, start_iter: int,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.images_per_step = images_per_step
        self.start_iter = start_iter
        self._clock = clock
        self._steps = 0
        self._elapsed = 0.0
        self._edge: Optional[float] = None

    def step(self) -> None:
        """Count a finished step."""
        self._steps += 1

    @property
    def at_edge(self) -> bool:
        """True when the step just counted is the last one before the window."""
        return self._steps == self.start_iter

    def start(self) -> None:
        """Open the window now."""
        self._edge = self._clock()

    def pause(self) -> None:
        """Leave out what follows, until `resume`."""
        if self._edge is not None:
            self._elapsed += self._clock() - self._edge
            self._edge = None

    def resume(self) -> None:
        """Go on after `pause`; does not open a window that was not open."""
        if self._steps >= self.start_iter:
            self._edge = self._clock()

    def average(self) -> float:
        """Images per second so far; 0 before the window has a step."""
        measured = self._steps - self.start_iter
        now = self._clock()
        elapsed = self._elapsed + (now - self._edge if self._edge is not None else 0.0)
        return measured * self.images_per_step / elapsed if measured > 0 and elapsed > 0 else 0.0


class StepTimer:
    """Mean seconds of a step, from the wall time between log lines; `clock` is for tests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._pending = 0
        self._total = 0.0
        self._steps = 0
        self.recent = 0.0

    def step(self) -> None:
        """Count a finished step."""
        self._pending += 1

    def skip(self) -> None:
        """Forget the steps and the time since the last log line (around a validation)."""
        self._last = self._clock()
        self._pending = 0

    def restart(self) -> None:
        """Forget everything: the first step compiles and allocates, it says nothing of the rest."""
        self.skip()
        self._total, self._steps = 0.0, 0

    def update(self) -> None:
        """At a log line, with the device idle: `recent` becomes the mean since the last one."""
        now = self._clock()
        if self._pending:
            self.recent = (now - self._last) / self._pending
            self._total += now - self._last
            self._steps += self._pending
        self._last, self._pending = now, 0

    def eta(self, steps_left: int) -> str:
        """Time left as `[D days, ]H:MM:SS`."""
        mean = self._total / self._steps if self._steps else self.recent
        return str(datetime.timedelta(seconds=int(steps_left * mean)))


def format_line(epoch: int, iteration: int, losses: Dict[str, float], total: float, eta: str,
                seconds: float, fps: float, average_fps: float, rank: int) -> str:
    """One log line, byte for byte as ModelZoo's YOLACT prints it."""
    shown = " ".join("{}: {:.3f} |".format(name, value) for name, value in losses.items())
    return ("[{:3d}] {:7d} || {} T: {:.3f} || ETA: {} || timer: {:.3f} || fps: {:.3f} || "
            "avg_fps: {:.3f} || GPU: {}".format(epoch, iteration, shown, total, eta, seconds, fps,
                                                average_fps, rank))


class JsonLog:
    """`<folder>/<name>.log`: one JSON object a line, appended as the run goes.

    NaN and infinity, which JSON does not have, become null.
    """

    def __init__(self, folder: str, name: str) -> None:
        path = os.path.join(folder, name + ".log")
        try:
            os.makedirs(folder, exist_ok=True)
            self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the run
        except OSError as error:
            raise UserError("cannot write the log '{}': {}; choose another --log_folder or give "
                            "--no_log".format(path, error.strerror)) from error

    def write(self, kind: str, **values: Any) -> None:
        """Append a record; `kind` tells sessions, training steps and validations apart."""
        record = dict({"type": kind, "time": time.time()}, **values)
        self._stream.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file; `write` must not be called afterwards."""
        self._stream.close()


def _finite(value: Any) -> Any:
    """`value` with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
