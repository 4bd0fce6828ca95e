"""Everything a run records beside the lines on its standard output: JSON, CSV, TensorBoard, a bar.

Only the main process keeps records; only a terminal shows the bar.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from typing import Any, Dict, List, Optional, TextIO

from utils.errors import UserError
from utils.training_log import JsonLog

BAR_SECONDS = 0.5
_BAR_WIDTH = 30


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


class RunLog:
    """Fan a run's records out to all files.

    Args:
        folder, name: of `<folder>/<name>.log` (JSON lines) and `.csv`.
        tensorboard: folder for TensorBoard's scalars; None for none.

    Raises:
        UserError: the folder cannot be written, or TensorBoard is not installed.
    """

    def __init__(self, folder: str, name: str, tensorboard: Optional[str] = None) -> None:
        self._json = JsonLog(folder, name)
        self._csv = CsvLog(os.path.join(folder, name + ".csv"))
        self._board = _summary_writer(tensorboard) if tensorboard else None

    def write(self, kind: str, **values: Any) -> None:
        """Add a record; `kind` is session, train or val."""
        self._json.write(kind, **values)
        if kind == "train":
            self._csv.write(values)
        if self._board is not None and "iteration" in values:
            for key, value in flatten(values).items():
                self._board.add_scalar("{}/{}".format(kind, key), value, values["iteration"])
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._json.close()
        if self._board is not None:
            self._board.close()


def open_log(args: argparse.Namespace, name: str) -> RunLog:
    """The records that the command line of train.py asks for."""
    return RunLog(args.log_folder, name, args.tensorboard)


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard ({}); install it or leave "
                        "the flag out".format(error)) from error
    return SummaryWriter(folder)


class ProgressBar:
    """The last line of a terminal; nothing where the output goes to a file.

    Args:
        total: steps of the run.
        stream: where the bar goes.
        beside: the stream of the log lines; there is no bar unless both are terminals.
    """

    def __init__(self, total: int, stream: TextIO = sys.stderr,
                 beside: TextIO = sys.stdout) -> None:
        self._total = max(total, 1)
        self._stream = stream
        self._enabled = stream.isatty() and beside.isatty()
        self._next = 0.0

    def show(self, done: int) -> None:
        """Draw the bar, at most twice a second."""
        if not self._enabled or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + BAR_SECONDS
        filled = _BAR_WIDTH * done // self._total
        self._stream.write("\r[{}{}] {} / {} ({:.1f}%)".format(
            "=" * filled, " " * (_BAR_WIDTH - filled), done, self._total,
            100 * done / self._total))
        self._stream.flush()

    def clear(self) -> None:
        """Make room for a line of the log."""
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._next = 0.0
