"""CSV tables of a run: rows that grow with the training, and survive whatever ends it.

A row is appended by one write of a whole line; a line that a crash cut off is dropped by the next
reader. Rows are known by their iteration, so that a resumed run can take back what came after the
checkpoint it starts from.
"""

from __future__ import annotations

import csv
import io
import os
from typing import Any, Dict, List, Optional, Sequence

from utils.errors import UserError
from utils.files import write_whole

KEY = "iteration"

Row = Dict[str, str]
"""Text by column; '' where there is no value."""


class RunTable:
    """One CSV file whose rows have an `iteration`, in rising order.

    Args:
        path: the file; made with the first row.
        columns: names of the columns, `iteration` among them. A file with other columns is
            rewritten with these before a row is added.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)
        self._checked = False

    def rows(self) -> List[Row]:
        """All whole rows; none where there is no file."""
        return read_rows(self.path)

    def add(self, values: Dict[str, Any]) -> None:
        """Append a row; one of the same iteration gets the values instead.

        Args:
            values: by column; what is no column is left out, None and NaN leave the cell empty.

        Raises:
            UserError: the disk is full or the folder cannot be written; the table is as before.
        """
        row = {column: _text(values.get(column)) for column in self.columns}
        if not self._checked:
            self._check()
        rows = self.rows() if self._last() >= int(row[KEY]) else []
        if not rows:
            self._append(row)
            return
        same = [old for old in rows if old[KEY] == row[KEY]]
        kept = [old for old in rows if old[KEY] != row[KEY]]
        if same:
            row = {column: row[column] or same[0].get(column, "") for column in self.columns}
        self._rewrite(sorted(kept + [row], key=lambda item: int(item[KEY])))

    def keep_until(self, iteration: int) -> None:
        """Drop the rows of later iterations."""
        rows = self.rows()
        kept = [row for row in rows if int(row[KEY]) <= iteration]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def _check(self) -> None:
        """Make the file end in a whole line and have the columns of this table."""
        self._checked = True
        if not os.path.exists(self.path):
            return
        with open(self.path, "rb") as stream:
            content = stream.read()
        header = ",".join(self.columns) + "\n"
        if not (content.startswith(header.encode("utf-8")) and content.endswith(b"\n")):
            self._rewrite(self.rows())

    def _last(self) -> int:
        """Iteration of the last row; -1 where there is none."""
        if not os.path.exists(self.path):
            return -1
        with open(self.path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            size = stream.tell()
            stream.seek(max(0, size - 4096))
            line = stream.read().splitlines()[-1:]
        cells = line[0].decode("utf-8").split(",") if line else []
        number = cells[self.columns.index(KEY)] if len(cells) == len(self.columns) else ""
        return int(number) if number.isdigit() else -1

    def _append(self, row: Row) -> None:
        exists = os.path.exists(self.path) and os.path.getsize(self.path) > 0
        data = self._format([row], header=not exists)
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with open(self.path, "ab", buffering=0) as stream:
                before = stream.seek(0, os.SEEK_END)
                if stream.write(data) != len(data):
                    stream.truncate(before)
                    raise OSError(0, "the disk is full")
        except OSError as error:
            raise UserError(f"cannot write '{self.path}': {error.strerror or error}; free some "
                            "space or choose another folder with --project") from error

    def _rewrite(self, rows: Sequence[Row]) -> None:
        data = self._format(rows, header=True)
        write_whole(self.path, lambda stream: stream.write(data))

    def _format(self, rows: Sequence[Row], header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow(self.columns)
        for row in rows:
            writer.writerow([row.get(column, "") for column in self.columns])
        return text.getvalue().encode("utf-8")


def read_rows(path: str) -> List[Row]:
    """Rows of a table, without a last line that is not whole; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as stream:
        content = stream.read()
    whole = content[:content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(whole))
    return [dict(row) for row in rows if None not in row and None not in row.values()
            and (row.get(KEY) or "").isdigit()]


def numbers(rows: Sequence[Row], column: str) -> List[Optional[float]]:
    """One column as numbers; None where a cell is empty or no number."""
    found: List[Optional[float]] = []
    for row in rows:
        try:
            value = float(row.get(column) or "nan")
        except ValueError:
            value = float("nan")
        found.append(value if value == value else None)
    return found


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
