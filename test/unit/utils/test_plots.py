"""Plots are drawn at all; how they look has been looked at."""

from __future__ import annotations

import importlib.util
import os
import sys

import cv2
import numpy as np
import pytest

from helpers.report_files import NASTY, write_run
from utils import plots
from utils.report import build_report

pytest.importorskip("matplotlib")


def bar(name, mask, box):
    return {"name": name, "mask_AP": mask, "box_AP": box}


def size(png):
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert picture.std() > 5  # something is on it
    return picture.shape[1], picture.shape[0]


@pytest.mark.parametrize("count", [1, 2, 30, 80, 1203])
def test_any_number_of_classes(count):
    names = [f"class name {n}" for n in range(count)]
    width, height = size(plots.draw_class_bars([
        bar(name, f"{n / 20:.2f}", f"{n / 19:.2f}") for n, name in enumerate(names)]))
    assert 500 < width < 1300 and 100 < height < 2800
    width, height = size(plots.draw_confusion(np.eye(count + 1, dtype=np.int64), names))
    assert 350 < width < 1400 and 350 < height < 1400


def test_any_name(recwarn):
    size(plots.draw_class_bars([bar(name, "5.0", "6.0") for name in NASTY]))
    size(plots.draw_confusion(np.eye(len(NASTY) + 1, dtype=np.int64), NASTY))
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_names_without_a_font_are_numbers(monkeypatch):
    monkeypatch.setattr(plots, "_FONTS", ("DejaVu Sans",))
    texts, font = plots.drawable(["cat", "\u732b", "caf\u00e9", "", "a$b$", "x" * 50])
    assert texts[:5] == ["cat", "class 2", "caf\u00e9", "class 4", "a\\$b\\$"]
    assert len(texts[5]) == 26 and font == "DejaVu Sans"


def test_no_score_is_not_zero(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_to_png", lambda figure: drawn.append(
        [text.get_text() for text in figure.axes[0].texts]))
    plots.draw_class_bars([bar("a", "", ""), bar("c", "0.00", "0.00")])
    assert drawn == [["0.0", "no objects"]]
    assert plots.draw_class_bars([]) is None


def test_no_state_of_the_process_changes():
    plots.draw_class_bars([bar("a", "1.0", "1.0")])
    assert "matplotlib.pyplot" not in sys.modules


def test_curves_without_numbers_are_none():
    assert plots.draw_plots([], [], [], None) == {}
    assert plots.draw_plots([{"iteration": 1, "lr": None}], [], [], None) == {}


def test_values_of_zero_are_drawn_and_a_single_point_is_not():
    rows = [{"iteration": number, "lr": 0.0, "loss_B": 0.0, "loss_total": 0.0, "mask_mAP": 0.0}
            for number in (1, 2)]
    assert set(plots.draw_plots(rows, rows, [], None)) == {
        "losses", "learning_rate", "average_precision"}
    assert plots.draw_plots(rows[:1], rows[:1], [], None) == {}


def test_without_jinja_there_are_plots_and_a_line(tmp_path, monkeypatch):
    real, folder = importlib.util.find_spec, write_run(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "jinja2" else real(name))
    line, = build_report(folder)
    assert "pip install jinja2" in line and folder.path in line
    assert len(os.listdir(folder.file("plots"))) == 5
    assert not os.path.exists(folder.file("report.html"))


def test_runs_whose_names_begin_alike_have_curves_of_their_own(monkeypatch):
    seen, rows = [], [{"iteration": number, "loss_total": number} for number in (1, 2)]
    monkeypatch.setattr(plots, "_draw_lines", lambda title, unit, lines, **more: seen.append(lines))
    assert plots.draw_comparison({30 * "a" + "1": (rows, []), 30 * "a" + "2": (rows, [])}) == {}
    assert [len(lines) for lines in seen] == [2, 2]
    assert all(name.startswith(("1 aa", "2 aa")) for name in seen[0])
