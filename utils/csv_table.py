"""CSV files that grow with a training, and survive whatever ends it.

A row is appended by one write of a whole line; a line that a crash cut off is dropped by the next
reader. Rows are known by their iteration, so that a resumed run can take back what came after the
checkpoint it starts from.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import os
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from utils.errors import UserError
from utils.files import write_whole

ITERATION = "iteration"

Row = Dict[str, str]
"""Text by column; '' where there is no value."""


class CsvTable:
    """One CSV file.

    Args:
        path: the file; made with the first row.
        columns: a pattern such as `loss_*` stands for whatever the rows bring that fits it and is
            not named otherwise. The file is rewritten where its columns turn out to be others.
        by_iteration: each iteration has one row, in rising order; False only appends.
    """

    def __init__(self, path: str, columns: Sequence[str], by_iteration: bool = True) -> None:
        self.path = path
        self._patterns = list(columns)
        self._by_iteration = by_iteration

    def rows(self) -> List[Row]:
        """All whole rows; none where there is no file."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, "rb") as stream:
            content = stream.read()
        whole = content[:content.rfind(b"\n") + 1].decode("utf-8", errors="replace")
        rows = csv.DictReader(io.StringIO(whole))
        return [dict(row) for row in rows if None not in row and None not in row.values()
                and (not self._by_iteration or (row.get(ITERATION) or "").isdigit())]

    def add(self, values: Mapping[str, Any]) -> None:
        """Append a row; with `by_iteration`, one of the same iteration gets the values instead.

        Args:
            values: by column; what fits no column is left out, None and NaN leave the cell empty.

        Raises:
            UserError: the disk is full or the folder cannot be written; the table is as before.
        """
        header, last = self._first_and_last_line()
        columns = self._columns(header + list(values))
        row = {column: _cell(values.get(column)) for column in columns}
        if columns == header and self._may_follow(row, header, last):
            self._append(_lines([row], columns))
            return
        rows = self.rows()
        if self._by_iteration:
            for old in rows:
                if old[ITERATION] == row[ITERATION]:
                    row = {column: row[column] or old.get(column, "") for column in columns}
            rows = [old for old in rows if old[ITERATION] != row[ITERATION]] + [row]
            self._rewrite(sorted(rows, key=lambda item: int(item[ITERATION])), columns)
        else:
            self._rewrite(rows + [row], columns)

    def keep_until(self, iteration: int) -> None:
        """Drop the rows of later iterations."""
        rows = self.rows()
        kept = [row for row in rows if int(row[ITERATION]) <= iteration]
        if len(kept) < len(rows):
            self._rewrite(kept, self._columns(self._first_and_last_line()[0]))

    def _columns(self, known: Sequence[str]) -> List[str]:
        columns: List[str] = []
        for pattern in self._patterns:
            columns += [pattern] if "*" not in pattern else [
                name for name in dict.fromkeys(known)
                if fnmatch.fnmatchcase(name, pattern) and name not in self._patterns]
        return columns

    def _first_and_last_line(self) -> Tuple[List[str], str]:
        """Names in the file's first line, and its last line, without reading all of it."""
        if not os.path.exists(self.path):
            return [], ""
        with open(self.path, "rb") as stream:
            header = stream.readline().decode("utf-8", errors="replace")
            stream.seek(max(0, os.path.getsize(self.path) - 4096))
            last = stream.read().decode("utf-8", errors="replace").splitlines(True)[-1:]
        return next(csv.reader([header]), []), "".join(last)

    def _may_follow(self, row: Row, header: Sequence[str], last: str) -> bool:
        """Whether a row belongs behind the file's last line."""
        if not last.endswith("\n") or not self._by_iteration:
            return last.endswith("\n")
        before = last.split(",")[header.index(ITERATION)]
        return before == ITERATION or (before.isdigit() and int(before) < int(row[ITERATION]))

    def _append(self, lines: bytes) -> None:
        try:
            with open(self.path, "ab", buffering=0) as stream:
                before = stream.seek(0, os.SEEK_END)
                if stream.write(lines) != len(lines):
                    stream.truncate(before)
                    raise OSError(0, "the disk is full")
        except OSError as error:
            raise UserError(f"cannot write '{self.path}': {error.strerror or error}; free some "
                            "space or choose another folder with --project") from error

    def _rewrite(self, rows: Sequence[Row], columns: Sequence[str]) -> None:
        lines = _lines([dict(zip(columns, columns))], columns) + _lines(rows, columns)
        write_whole(self.path, lambda stream: stream.write(lines))


def _lines(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [row.get(column, "") for column in columns] for row in rows)
    return text.getvalue().encode("utf-8")


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
