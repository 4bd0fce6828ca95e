"""Everything a run records beside the lines on its standard output: JSON, CSV, TensorBoard.

Only the main process keeps records.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import time
from typing import Any, Callable, Dict, List, Optional, Sequence

from utils.errors import UserError
from utils.run_environment import timestamp
from utils.run_folder import RunFolder, loss_cells, score_cells


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
    shown = " ".join(f"{name}: {value:.3f} |" for name, value in losses.items())
    return (f"[{epoch:3d}] {iteration:7d} || {shown} T: {total:.3f} || ETA: {eta} || timer: "
            f"{seconds:.3f} || fps: {fps:.3f} || avg_fps: {average_fps:.3f} || GPU: {rank}")


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
            raise UserError(f"cannot write the log '{path}': {error.strerror}; choose another "
                            "--log_folder or give --no_log") from error

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


_MIB = 1024 * 1024


class RunRecords:
    """Writes `training.csv` and `results.csv`; see `RunFolder` for where they are.

    The losses of an epoch's or validation's row are those of the last log line: nothing is asked
    of the device for it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._latest: Dict[str, Any] = {}

    def write(self, kind: str, values: Dict[str, Any]) -> None:
        """Take a record; `kind` is train, epoch or val, any other is left out."""
        if kind == "train":
            self._write_step(values)
        elif kind in ("epoch", "val"):
            scores = score_cells(values) if kind == "val" else {}
            self._folder.results.add(dict(
                self._latest, iteration=values["iteration"], epoch=values["epoch"],
                time=timestamp(), **scores))

    def close(self) -> None:
        """Nothing is open between two rows."""

    def _write_step(self, values: Dict[str, Any]) -> None:
        common = dict(loss_cells(values["losses"], values["total"]), lr=values["lr"],
                      skipped_steps=values["skipped"])
        self._latest = dict(common, images_per_second=values["avg_fps"] or values["fps"])
        self._folder.training.add(dict(
            common, iteration=values["iteration"], epoch=values["epoch"],
            images_per_second=values["fps"], seconds_per_step=values["seconds"],
            data_seconds=values["data_seconds"], memory_MiB=round(values["memory"] / _MIB, 1)))


def flatten(values: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """`{"losses": {"B": 1}}` becomes `{"losses.B": 1}`; what is no number is left out."""
    flat: Dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, prefix + key + "."))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


class CsvLog:
    """`<folder>/<name>.csv`: a row for each training record; a resumed run goes on in the file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._columns: List[str] = []
        if os.path.exists(path) and os.path.getsize(path):
            with open(path, newline="", encoding="utf-8") as stream:
                self._columns = next(csv.reader(stream))

    def write(self, values: Dict[str, Any]) -> None:
        """Append the numbers in `values`; the first row decides on the columns."""
        row = flatten(values)
        with open(self.path, "a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if not self._columns:
                self._columns = list(row)
                writer.writerow(self._columns)
            writer.writerow([row.get(column, "") for column in self._columns])


class FileLog:
    """`<folder>/<name>.log`, JSON lines, and `<folder>/<name>.csv`, a row a training record.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str, name: str) -> None:
        self._json = JsonLog(folder, name)
        self._csv = CsvLog(os.path.join(folder, name + ".csv"))

    def write(self, kind: str, values: Dict[str, Any]) -> None:
        """Add a record; epochs have no record of their own here."""
        if kind == "epoch":
            return
        self._json.write(kind, **values)
        if kind == "train":
            self._csv.write(values)

    def close(self) -> None:
        """Close the file that stays open."""
        self._json.close()


class Board:
    """Scalars for TensorBoard.

    Args:
        folder: where the events go.
        start: iteration that the run goes on from; what earlier files say of later ones is void.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except AttributeError as error:  # old PyTorch beside a new setuptools
            raise ImportError(str(error)) from error
        self._writer = SummaryWriter(folder, purge_step=start + 1 if start else None)

    def write(self, kind: str, values: Dict[str, Any]) -> None:
        """Add the numbers of a record that has an iteration."""
        if "iteration" not in values or kind == "epoch":
            return
        for key, value in flatten(values).items():
            self._writer.add_scalar(f"{kind}/{key}", value, values["iteration"])
        self._writer.flush()

    def close(self) -> None:
        """Close the events file."""
        self._writer.close()


class RunLog:
    """Fan a run's records out.

    Args:
        sinks: whatever takes `write(kind, values)` and `close()`.
        notes: sentences for the user on what is not written.
    """

    def __init__(self, sinks: Sequence[Any], notes: Sequence[str] = ()) -> None:
        self._sinks = list(sinks)
        self.notes = list(notes)

    def write(self, kind: str, **values: Any) -> None:
        """Add a record; `kind` is session, train, epoch or val."""
        for sink in self._sinks:
            sink.write(kind, values)

    def close(self) -> None:
        """Close the files."""
        for sink in self._sinks:
            sink.close()


def open_log(args: argparse.Namespace, name: str, folder: Optional[RunFolder] = None,
             start: int = 0) -> RunLog:
    """The records that the command line of train.py asks for, and those of the run folder.

    Raises:
        UserError: a folder cannot be written, or --tensorboard is given and not installed.
    """
    sinks: List[Any] = []
    notes: List[str] = []
    if not args.no_log:
        sinks.append(FileLog(args.log_folder, name))
        if args.tensorboard:
            sinks.append(_demanded_board(args.tensorboard))
    if folder is not None:
        sinks.append(RunRecords(folder))
        try:
            sinks.append(Board(folder.path, start))
        except ImportError:
            notes.append("TensorBoard is not installed: no events in the run folder (pip install "
                         "tensorboard)")
    return RunLog(sinks, notes)


def _demanded_board(folder: str) -> Board:
    try:
        return Board(folder)
    except ImportError as error:
        raise UserError(f"--tensorboard needs the package tensorboard ({error}); install it or "
                        "leave the flag out") from error
