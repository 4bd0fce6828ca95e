"""Tables that grow: whole lines, no doubled rows, whatever ends the run."""

from __future__ import annotations

import pytest

from utils import csv_table
from utils.csv_table import CsvTable
from utils.errors import UserError

COLUMNS = ("iteration", "loss", "mAP")


@pytest.fixture
def table(tmp_path):
    return CsvTable(str(tmp_path / "run" / "results.csv"), COLUMNS)


def text(table):
    with open(table.path) as stream:
        return stream.read()


def test_rows_are_appended_and_empty_cells_stay_empty(table):
    table.add({"iteration": 10, "loss": 1.23456789, "other": 5})
    table.add({"iteration": 20, "loss": float("nan"), "mAP": None})
    table.add({"iteration": 30, "mAP": 0.0})
    assert text(table) == "iteration,loss,mAP\n10,1.23457,\n20,,\n30,,0\n"
    assert [row["loss"] for row in table.rows()] == ["1.23457", "", ""]


def test_a_row_of_the_same_iteration_is_filled_in(table):
    for step in (10, 20, 30):
        table.add({"iteration": step, "loss": step})
    table.add({"iteration": 30, "mAP": 3.5})
    table.add({"iteration": 10, "mAP": 1.5})
    table.add({"iteration": 15, "mAP": 2.5})
    assert text(table) == "iteration,loss,mAP\n10,10,1.5\n15,,2.5\n20,20,\n30,30,3.5\n"


def test_a_resumed_run_takes_back_what_it_makes_again(table):
    for step in (10, 20, 30):
        table.add({"iteration": step, "loss": step})
    again = CsvTable(table.path, COLUMNS)
    again.keep_until(20)
    again.add({"iteration": 30, "loss": 7})
    assert text(table) == "iteration,loss,mAP\n10,10,\n20,20,\n30,7,\n"
    again.keep_until(5)
    assert text(table) == "iteration,loss,mAP\n"


@pytest.mark.parametrize("torn", ["30,3", "30,30,", "3"])
def test_a_line_that_was_cut_off_is_dropped(table, torn):
    table.add({"iteration": 10, "loss": 10})
    with open(table.path, "a") as stream:
        stream.write(torn)
    assert [row["iteration"] for row in table.rows()] == ["10"]
    CsvTable(table.path, COLUMNS).add({"iteration": 40, "loss": 4})
    assert text(table) == "iteration,loss,mAP\n10,10,\n40,4,\n"


def test_columns_of_an_older_version_are_brought_up_to_date(table):
    CsvTable(table.path, ("iteration", "mAP", "gone")).add({"iteration": 1, "mAP": 2, "gone": 3})
    table.add({"iteration": 5, "loss": 6})
    assert text(table) == "iteration,loss,mAP\n1,,2\n5,6,\n"


def test_columns_of_a_pattern_are_those_that_the_rows_bring(tmp_path):
    table = CsvTable(str(tmp_path / "t.csv"), ("iteration", "loss_*", "loss_total", "mAP"))
    table.add({"iteration": 1, "mAP": 0.5})
    table.add({"iteration": 2, "loss_B": 1.0, "loss_total": 1.0, "gone": 3})
    table.add({"iteration": 3, "loss_X": 4.0, "loss_total": 4.0})
    assert text(table) == ("iteration,loss_B,loss_X,loss_total,mAP\n1,,,,0.5\n2,1,,1,\n"
                           "3,,4,4,\n")


def test_a_table_without_iterations_is_only_appended_to(tmp_path):
    for _ in range(2):
        table = CsvTable(str(tmp_path / "t.csv"), ["*"], by_iteration=False)
        table.add({"iteration": 2, "B": 1})
        table.add({"iteration": 1, "B": 2})
    assert text(table) == "iteration,B\n2,1\n1,2\n2,1\n1,2\n"


def test_a_full_disk_leaves_the_table_as_it_was(table, monkeypatch):
    table.add({"iteration": 10, "loss": 10})
    before = text(table)

    class Full:
        """A file that takes three bytes."""

        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            return self.stream.write(data[:3])

    def full_open(path, mode="r", **kwargs):
        stream = open(path, mode, **kwargs)  # noqa: SIM115 - the caller closes it
        return Full(stream) if mode == "ab" else stream

    monkeypatch.setattr(csv_table, "open", full_open, raising=False)
    with pytest.raises(UserError, match="results.csv.*disk is full"):
        table.add({"iteration": 20, "loss": 20})
    monkeypatch.undo()
    assert text(table) == before
    table.add({"iteration": 20, "loss": 20})
    assert len(table.rows()) == 2
