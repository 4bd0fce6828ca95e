"""docs/data.md by itself: from raw files to a trained network and drawn predictions, on a CPU."""

from __future__ import annotations

import re
import sys

import cv2
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "test" / "docs"))
from documents import commands  # noqa: E402
from world import SHAPES, link_project, run, write_labelme  # noqa: E402

DOCUMENT = "docs/data.md"
TUTORIAL = "From labelme to predictions"
IMAGES = 160


@pytest.mark.slow
def test_from_labelme_to_predictions(tmp_path):
    link_project(tmp_path / "place")
    place = tmp_path / "place"
    write_labelme(place / "raw", IMAGES)
    printed = ""
    for command in commands(DOCUMENT):
        if command.section == TUTORIAL:
            code, output = run(command.text, place, timeout=1800)
            assert code == 0, f"{command.text}\n{output}"
            printed += output
    scores = re.findall(r"(?m)^  mask \| +([\d.]+) \|", printed)
    assert float(scores[-1]) > 25
    assert all(name in printed for name in SHAPES)
    for name in ("results/first_batch.png", "drawn.png"):
        assert cv2.imread(str(place / name)) is not None, name
