"""What a training says of itself: ModelZoo's log line, and one stream of records.

A record is a kind (session, train, epoch, val) and values; losses go under whatever names they
have. Only the main process keeps records.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, TextIO

from utils.csv_table import CsvTable
from utils.errors import UserError
from utils.run_folder import RunFolder, score_cells, timestamp

_MIB = 1024 * 1024


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


def format_line(epoch: int, iteration: int, losses: Mapping[str, float], total: float, eta: str,
                seconds: float, fps: float, average_fps: float, rank: int) -> str:
    """One log line, byte for byte as ModelZoo's YOLACT prints it."""
    shown = " ".join(f"{name}: {value:.3f} |" for name, value in losses.items())
    return (f"[{epoch:3d}] {iteration:7d} || {shown} T: {total:.3f} || ETA: {eta} || timer: "
            f"{seconds:.3f} || fps: {fps:.3f} || avg_fps: {average_fps:.3f} || GPU: {rank}")


class RunLog:
    """Where the records of a run go; each `write` is on the disk when it returns.

    Of the kinds, `train` goes everywhere; `epoch` to results.csv alone, with the losses of the last
    log line, so that nothing is asked of the device for it.

    Args:
        name: of the log.
        log_folder: gets `<name>.log`, a JSON object a line in which NaN and infinity are null, and
            `<name>.csv`, a row for each train record; both go on after a resume. None: neither.
        board: folder of TensorBoard events that the user asked for, if any.
        folder: gets training.csv, results.csv and, where TensorBoard is installed, its events.
        start: iteration that the run goes on from; what earlier events say of later ones is void.

    Attributes:
        notes: sentences for the user on what is not written.

    Raises:
        UserError: a folder cannot be written, or `board` is given and TensorBoard not installed.
    """

    def __init__(self, name: str, log_folder: Optional[str] = None, board: Optional[str] = None,
                 folder: Optional[RunFolder] = None, start: int = 0) -> None:
        self.notes: List[str] = []
        self._folder = folder
        self._stream = None if log_folder is None else _open_log(log_folder, name)
        self._csv = None if log_folder is None else CsvTable(
            os.path.join(log_folder, name + ".csv"), ["*"], by_iteration=False)
        self._latest: Dict[str, Any] = {}
        self._boards = []
        if board is not None:
            try:
                self._boards.append(_open_board(board, start))
            except ImportError as error:
                raise UserError(f"--tensorboard needs the package tensorboard ({error}); install "
                                "it or leave the flag out") from error
        if folder is not None:
            try:
                self._boards.append(_open_board(folder.path, start))
            except ImportError:
                self.notes.append("TensorBoard is not installed: no events in the run folder (pip "
                                  "install tensorboard)")

    def write(self, kind: str, **values: Any) -> None:
        """Add a record; `train` has what `train.py` puts into it, `val` a summary of scores."""
        if self._folder is not None:
            self._write_rows(self._folder, kind, values)
        if kind == "epoch":
            return
        if self._stream is not None and self._csv is not None:
            record = _finite(dict({"type": kind, "time": time.time()}, **values))
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
            self._stream.flush()
            if kind == "train":
                self._csv.add(flatten(values))
        if "iteration" in values:
            for writer in self._boards:
                for key, value in flatten(values).items():
                    writer.add_scalar(f"{kind}/{key}", value, values["iteration"])
                writer.flush()

    def _write_rows(self, folder: RunFolder, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "train":
            common = {"loss_" + name: value for name, value in values["losses"].items()}
            common.update(loss_total=values["total"], lr=values["lr"],
                          skipped_steps=values["skipped"])
            self._latest = dict(common, images_per_second=values["avg_fps"] or values["fps"])
            folder.training.add(dict(
                common, iteration=values["iteration"], epoch=values["epoch"],
                images_per_second=values["fps"], seconds_per_step=values["seconds"],
                data_seconds=values["data_seconds"],
                memory_MiB=round(values["memory"] / _MIB, 1)))
        elif kind in ("epoch", "val"):
            folder.results.add(dict(
                self._latest, iteration=values["iteration"], epoch=values["epoch"],
                time=timestamp(), **(score_cells(values) if kind == "val" else {})))

    def close(self) -> None:
        """Close the files; `write` must not be called afterwards."""
        for file in [self._stream] + self._boards:
            if file is not None:
                file.close()


def flatten(values: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    """`{"losses": {"B": 1}}` becomes `{"losses.B": 1}`; what is no number is left out."""
    flat: Dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix + key + "."))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def _open_log(folder: str, name: str) -> TextIO:
    path = os.path.join(folder, name + ".log")
    try:
        os.makedirs(folder, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the log '{path}': {error.strerror}; choose another "
                        "--log_folder or give --no_log") from error


def _open_board(folder: str, start: int) -> Any:
    """TensorBoard's writer; an `ImportError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except AttributeError as error:  # old PyTorch beside a new setuptools
        raise ImportError(str(error)) from error
    return SummaryWriter(folder, purge_step=start + 1 if start else None)


def _finite(value: Any) -> Any:
    """`value` with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
