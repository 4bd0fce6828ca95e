"""The report as a file: complete, self-contained, every name escaped, with and without plots."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

from helpers.report_files import NASTY, POLICY, write_evaluation, write_run
from utils import plots, report
from utils.cli import run_main
from utils.report import build_report, read_run
from utils.run_folder import CONFIG

pytest.importorskip("jinja2")

NOTHING = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
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
    assert build_report(folder) == ["Report : " + folder.file("report.html")]
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
    assert policy == [POLICY] and "default-src 'none'" in policy[0]


def test_without_matplotlib_the_tables_are_there(folder, monkeypatch):
    monkeypatch.setattr(plots, "is_available", lambda: False)
    missing, _ = build_report(folder)
    assert "pip install matplotlib" in missing and folder.path in missing
    page = Page(folder.file("report.html"))
    assert missing in page.text and len(page.all("img")) == 2
    assert [tag["id"] for tag in page.all("section")] == SECTIONS
    assert not os.path.exists(folder.file("plots"))


def test_commands_to_copy(folder):
    folder.write_bytes("weights/best.pth", b"")
    page = built(folder)
    assert [tag["id"] for tag in page.all("section")] == SECTIONS + ["commands"]
    score = f"python eval.py --trained_model={folder.path}/weights/best.pth"
    for line in (f"{score} --score_threshold=0.3 --image=in.jpg:out.png\n",
                 f"{score} --val_data='/data/<b>bold</b>' --run_folder={folder.path}\n",
                 f"python train.py --rerun={folder.path}\n"):
        assert line in page.text


def test_settings_that_are_not_the_default_are_told(folder):
    evaluation = folder.read(report.SUMMARY)
    folder.write(report.SUMMARY, dict(evaluation, settings={"score_threshold": 0.3}))
    assert "Not with the default settings: score_threshold 0.3" in built(folder).text


@pytest.mark.parametrize("steps, validations", [(0, 0), (1, 0), (1, 1), (0, 1)])
def test_a_run_that_has_hardly_begun(tmp_path, steps, validations):
    page = built(write_run(tmp_path, ["a"], steps, validations))
    assert ("Nothing has been evaluated yet" in page.text) == (validations == 0)


def test_an_evaluation_alone(tmp_path):
    folder = write_run(tmp_path, ["a"], 0, 0)
    write_evaluation(folder, ["a"])
    assert "25.00" in built(folder).text


@pytest.mark.parametrize("name, content", [
    ("evaluation/confusion_matrix.csv", "a,b\nc,d\n"), ("evaluation/evaluation.json", '{"box": 1}'),
    ("evaluation/evaluation.json", "[1]"), ("environment.json", "{"),
    ("log.jsonl", '{"type": "train", "iteration": 30}\n')])
def test_a_damaged_folder_is_one_sentence(folder, name, content, capsys):
    with open(folder.file(*name.split("/")), "w") as stream:
        stream.write(content)
    assert run_main(report.main, [folder.path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and folder.path in error


def test_missing_files_are_left_out(folder):
    for name in ("evaluation/confusion_matrix.csv", "evaluation/pictures/000000000000.jpg"):
        os.unlink(folder.file(*name.split("/")))
    run = read_run(folder)
    assert run["matrix"] is None and len(run["images"]) == 1
    built(folder)


def test_small_scores_and_empty_images_are_not_praised(folder):
    assert "no detection in these images has that score yet" not in built(folder).text
    evaluation = folder.read(report.SUMMARY)
    for item in evaluation["pictures"]["shown"]:
        item["detections"] = 0
    folder.write(report.SUMMARY, evaluation)
    page = built(folder)
    assert "no detection in these images has that score yet" in page.text
    assert page.source.count('class="figure best"') == page.source.count('tr class="best"') == 1
    folder.go_on_from(0)
    folder.add_record("val", iteration=100, epoch=1, images=3, mask=NOTHING, box=NOTHING)
    page = built(folder)
    assert 'class="figure best"' not in page.source and 'tr class="best"' not in page.source


def test_runs_side_by_side(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "runs", name="first")
    second = write_run(tmp_path / "runs", name="se<i>cond", validations=2)
    stored = second.read(CONFIG)
    stored["run"]["config"]["max_size"] = 320
    stored["data"]["train"]["images"] = 9
    second.write_config(stored)
    assert report.main([first.path, second.path, f"--out={tmp_path}/both.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Comparison : {tmp_path}/both.html"
    page = Page(str(tmp_path / "both.html"))
    assert [tag["id"] for tag in page.all("section")] == ["comparison"]
    assert len(page.all("img")) == 2 and not page.all("i")
    text = " ".join(page.text.split())
    for words in ("first / se<i>cond", "max_size 160 320", "train: images 5 9",
                  "first 30.00 60.00 \u2013 33.00 66.00 300 300 0.300 12.50",
                  "se<i>cond 20.00 40.00 \u2013 22.00 44.00 200 300 0.300 12.50"):
        assert words in text, words
    assert "pred_scales" not in text and "python" not in text


def test_the_page_of_one_run_stays_in_its_folder(folder, tmp_path, capsys):
    assert run_main(report.main, [folder.path, f"--out={tmp_path}/page.html"]) == 2
    assert "only a comparison of several runs is written there" in capsys.readouterr().err


def test_a_comparison_replaces_no_file_of_a_run(folder, capsys):
    before = folder.read(CONFIG)
    for out in (folder.path, folder.file(CONFIG)):
        assert run_main(report.main, [folder.path, folder.path, f"--out={out}"]) == 2
        assert "expected the name of an .html file" in capsys.readouterr().err
    assert folder.read(CONFIG) == before


def test_equal_runs_differ_in_nothing(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / "runs", name="a" * 30 + name) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert report.main([folder.path for folder in folders]) == 0
    assert "Nothing: the same configuration" in Page("runs/comparison.html").text


def test_command_draws_it_again(folder):
    command = [sys.executable, "-m", "utils.report"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command + [folder.path], cwd=str(ROOT), env=env, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Report : " + folder.file("report.html")
    assert os.path.exists(folder.file("report.html"))
    refused = subprocess.run(command + ["/nowhere"], cwd=str(ROOT), env=env, timeout=120,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: '/nowhere' is no run folder")
