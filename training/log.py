"""Everything a run records beside the lines on its standard output: JSON, CSV, TensorBoard.

Only the main process keeps records.
"""

from __future__ import annotations

import argparse
import csv
import os
from typing import Any, Dict, List, Optional, Sequence

from training.log_lines import JsonLog
from training.tables import RunRecords
from utils.errors import UserError
from utils.run_folder import RunFolder


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
            self._writer.add_scalar("{}/{}".format(kind, key), value, values["iteration"])
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
        raise UserError("--tensorboard needs the package tensorboard ({}); install it or leave "
                        "the flag out".format(error)) from error


