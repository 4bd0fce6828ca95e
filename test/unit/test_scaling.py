"""The step of many cards on paper: docs/scaling.md holds what the script prints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                                reason="PyTorch 1.x does not count operations")


def run(*flags):
    done = subprocess.run([sys.executable, "test/benchmark/scaling.py", *flags], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


def test_the_page_holds_its_table():
    code, text, _ = run()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert code == 0 and len(lines) == 6 and "\n".join(lines) in page


def test_a_field_report_takes_the_place_of_what_is_assumed(tmp_path):
    report = tmp_path / "report.txt"
    report.write_text("speed_1p:   Final Performance images/sec : 30.0 TrainingTime = 9 (3 s)\n"
                      "speed_2p:   Final Performance images/sec : 57.5 (3 s)\n"
                      "all_reduce: all-reduce of 200 MB on 2 cards: 9 ms, 21.5 GB/s a card (3 s)\n")
    code, text, _ = run("--config=yolact_shapes", f"--report={report}")
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert code == 0 and [row[0] for row in table] == ["| 1", "| 2", "| 8", "| 16", "| 64"]
    assert "21.5 GB/s between cards (measured), 12.5 GB/s between hosts" in text
    assert table[0][5:] == ["30", "100.0 %", "30.0 |"] and table[1][7] == "57.5 |"


@pytest.mark.parametrize("flag, sentence", [
    ("--report=/nowhere", "cannot read --report '/nowhere'"),
    ("--report=/", "cannot read --report '/': Is a directory; name the file in it"),
    ("--report=/dev/null", "has no line 'speed_1p: Final Performance"),
    ("--config=yolact_plus_base", "deformable convolution are not counted"),
    ("--tflops=0", "--tflops is '0'")])
def test_mistakes_are_one_sentence(flag, sentence):
    code, _, error = run("--config=yolact_shapes", flag)
    assert code == 2 and sentence in error and error.count("\n") == 1
