"""The report as a file: complete, self-contained, every name escaped, with and without plots."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from conftest import ROOT

from helpers.report_files import NASTY, write_evaluation, write_run
from utils.report import figure, html
from utils.report.build import build_report, read_contents
from utils.report.class_bars import ClassAp, draw_class_bars
from utils.report.confusion import draw_confusion
from utils.report.curves import draw_curves, points_of, short_number

SECTIONS = ["training", "scores", "classes", "confusion", "pictures", "data", "configuration",
            "environment"]


class Page(HTMLParser):
    """What a page holds: tags with attributes, and its text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], "", []
        with open(path, encoding="utf-8") as stream:
            self.source = stream.read()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "runs")


def built(folder):
    assert build_report(folder) is None
    page = Page(folder.file("report.html"))
    assert page.open == []
    return page


def test_page_has_everything(folder):
    pytest.importorskip("matplotlib")
    page = built(folder)
    assert [tag["id"] for tag in page.all("section")] == SECTIONS
    assert len(page.all("img")) == 5 + 2  # plots and pictures
    assert sorted(os.listdir(folder.file("plots"))) == [
        "average_precision.png", "class_ap.png", "confusion_matrix.png", "learning_rate.png",
        "losses.png"]
    for words in ("30.00", "iteration 300 of 300", "python train.py --data='<i>'", "one & two",
                  "best.pth on 2 of 3 images", "torch 2.13"):
        assert words in page.text, words


def test_every_name_is_escaped(folder):
    page = built(folder)
    for name in NASTY:
        assert name in page.text
    allowed = {"html", "head", "meta", "link", "title", "style", "body", "main", "header", "h1",
               "h2", "h3", "p", "nav", "a", "div", "b", "span", "section", "figure", "figcaption",
               "img", "table", "thead", "tbody", "tr", "th", "td", "br", "details", "summary",
               "pre"}
    assert {tag for tag, _ in page.tags} <= allowed  # no script, i, u, note
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.all("b")) == len(re.findall('<div class="figure( best)?"', page.source))


def test_nothing_is_asked_of_anybody(folder):
    page = built(folder)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert not re.search(r"url\(|@import|https?://", page.source.replace("data:image", ""))
    policy = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy == [html.POLICY] and "default-src 'none'" in policy[0]


def test_without_matplotlib_the_tables_are_there(folder, monkeypatch):
    monkeypatch.setattr(figure, "is_available", lambda: False)
    missing = build_report(folder)
    assert "pip install matplotlib" in missing and folder.path in missing
    page = Page(folder.file("report.html"))
    assert missing in page.text and len(page.all("img")) == 2
    assert [tag["id"] for tag in page.all("section")] == SECTIONS
    assert not os.path.exists(folder.file("plots"))


@pytest.mark.parametrize("steps, validations", [(0, 0), (1, 0), (1, 1), (0, 1)])
def test_a_run_that_has_hardly_begun(tmp_path, steps, validations):
    page = built(write_run(tmp_path, ["a"], steps, validations))
    assert ("Nothing has been evaluated yet" in page.text) == (validations == 0)


def test_an_evaluation_alone(tmp_path):
    folder = write_run(tmp_path, ["a"], 0, 0)
    write_evaluation(folder, ["a"])
    assert "25.00" in built(folder).text


def test_broken_files_are_left_out(folder):
    for name in ("evaluation/confusion_matrix.csv", "evaluation/pictures/000000000000.jpg"):
        open(folder.file(*name.split("/")), "w").close()
    contents = read_contents(folder)
    assert contents.matrix is None and len(contents.pictures) == 1
    built(folder)


def test_command_draws_it_again(folder):
    command = [sys.executable, "-m", "utils.report"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command + [folder.path], cwd=str(ROOT), env=env, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == folder.file("report.html")
    assert os.path.exists(folder.file("report.html"))
    refused = subprocess.run(command + ["/nowhere"], cwd=str(ROOT), env=env, timeout=120,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: '/nowhere' is no run folder")


class TestPlots:
    """That they are drawn at all; how they look has been looked at."""

    @pytest.fixture(autouse=True)
    def need(self):
        pytest.importorskip("matplotlib")

    @staticmethod
    def size(png):
        picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
        assert picture.std() > 5  # something is on it
        return picture.shape[1], picture.shape[0]

    @pytest.mark.parametrize("count", [1, 2, 30, 31, 80, 1203])
    def test_any_number_of_classes(self, count):
        names = [f"class name {n}" for n in range(count)]
        width, height = self.size(draw_class_bars([
            ClassAp(name, n, n / 20.0, n / 19.0) for n, name in enumerate(names)]))
        assert 500 < width < 1300 and 100 < height < 1900
        width, height = self.size(draw_confusion(np.eye(count + 1, dtype=np.int64), names))
        assert 350 < width < 1400 and 350 < height < 1400

    def test_any_name(self, recwarn):
        bars = [ClassAp(name, 1, 5.0, 6.0) for name in NASTY]
        self.size(draw_class_bars(bars))
        self.size(draw_confusion(np.eye(len(NASTY) + 1, dtype=np.int64), NASTY))
        assert not [str(warning.message) for warning in recwarn
                    if "Glyph" in str(warning.message)]

    def test_names_without_a_font_are_numbers(self, monkeypatch):
        monkeypatch.setattr(figure, "_FONTS", ())
        letters = figure.Letters(["cat", "\u732b", "caf\u00e9", "", "x" * 50, "a$b$"])
        assert letters.missing
        assert [letters[name] for name in ("cat", "\u732b", "caf\u00e9", "", "a$b$")] == [
            "cat", "class 2", "caf\u00e9", "class 4", "a\\$b\\$"]
        assert len(letters["x" * 50]) == 26
        assert not figure.Letters(["cat"]).missing

    def test_no_score_is_not_zero(self):
        absent = [ClassAp("a", 0, None, None), ClassAp("b", 0, float("nan"), float("nan")),
                  ClassAp("c", 1, 0.0, 0.0)]
        self.size(draw_class_bars(absent))
        assert draw_class_bars([]) is None

    def test_no_state_of_the_process_changes(self):
        draw_class_bars([ClassAp("a", 1, 1.0, 1.0)])
        assert "matplotlib.pyplot" not in sys.modules


def test_curves_of_long_runs_are_thinned():
    rows = [{"iteration": str(n), "loss_total": str(n * 2.0)} for n in range(1, 80001)]
    points = points_of(rows, "loss_total")
    assert 700 < len(points) <= 1500
    assert points[0][1] == pytest.approx(2 * points[0][0])
    assert points[-1][0] > 79000


def test_curves_without_numbers_are_none():
    assert draw_curves([], []) == {}
    assert draw_curves([{"iteration": "1", "lr": ""}], []) == {}


@pytest.mark.parametrize("value, text", [(0, "0"), (1500, "1500"), (20000, "20k"),
                                         (800000, "800k"), (1200000, "1.2M")])
def test_iterations_are_short(value, text):
    assert short_number(value) == text
