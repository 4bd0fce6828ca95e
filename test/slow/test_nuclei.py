"""A result on photographs: a small network learns real nuclei from scratch, on a CPU."""

from __future__ import annotations

import csv

import pytest

import train
from helpers.paths import ROOT

NUCLEI = ROOT.parent / "shared" / "nuclei"


@pytest.mark.slow
@pytest.mark.skipif(not NUCLEI.is_dir(), reason="no nuclei beside the project")
def test_nuclei_are_learned_as_the_readme_says(tmp_path, monkeypatch, request):
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.delenv("YOLACT_RUNS")
    assert train.main([
        "--config=yolact_small", f"--data={NUCLEI}", "--num_workers=1",
        "--node_device={}".format(request.config.getoption("--device"))]) == 0
    with open("runs/yolact_small/results.csv", newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    assert int(last["images_scored"]) == 107
    assert float(last["box_mAP"]) > 45 and float(last["mask_mAP"]) > 40
