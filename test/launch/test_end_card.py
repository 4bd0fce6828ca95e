"""The commands that a training ends with are pasted into a shell and run, as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from data.shapes import write_dataset
from helpers.exports import require_onnx
from helpers.ranks import clean_environ

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("it's my") / "own data"
    write_dataset(str(folder), seed=3, train=8, val=2)
    return folder


def run(command, folder, shell=False):
    # Without the project on the path: a user's shell does not have it there either.
    env = dict(clean_environ(), PYTHONPATH="")
    done = subprocess.run(command, cwd=str(folder), shell=shell, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, timeout=300,
                          executable="/bin/bash" if shell else None)
    return done.returncode, done.stdout


def train(shapes, folder, *more):
    return run([sys.executable, str(ROOT / "train.py"), f"--data={shapes}",
                "--config=yolact_shapes", "--batch_size=2", "--no_autoscale", "--num_workers=0",
                "--no_log", "--node_device=cpu", "--save_folder=my weights", "--project=runs"]
               + list(more), folder)


def commands(printed):
    found = re.search(r"^Next +: .*\n((?:  .*\n)+)", printed, re.M)
    assert found, printed
    return [line.strip() for line in found.group(1).splitlines()]


def test_after_a_whole_run_score_draw_train_longer_and_export(shapes, tmp_path):
    code, printed = train(shapes, tmp_path, "--max_iter=4", "--validation_epoch=1", "--ema")
    assert code == 0, printed
    score, draw, further, export = commands(printed)
    code, text = run(score, tmp_path, shell=True)
    assert code == 0 and re.search(r"^  mask \|", text, re.M), text
    code, text = run(draw, tmp_path, shell=True)
    assert code == 0 and (tmp_path / "runs" / "yolact_shapes" / "prediction.png").exists(), text
    code, text = run(further, tmp_path, shell=True)
    assert code == 0 and (tmp_path / "my weights" / "yolact_shapes_2_8.pth").exists(), text
    require_onnx()
    code, text = run(export, tmp_path, shell=True)
    assert code == 0, text
    assert (tmp_path / "runs" / "yolact_shapes" / "export" / "run.py").exists()


def test_without_a_folder_and_validation_train_on(shapes, tmp_path):
    code, printed = train(shapes, tmp_path, "--max_iter=2", "--no_run_folder",
                          "--validation_epoch=0")
    assert code == 0, printed
    _, draw, further, _ = commands(printed)
    code, text = run(draw, tmp_path, shell=True)
    assert code == 0 and (tmp_path / "results" / "prediction.png").exists(), text
    code, text = run(further, tmp_path, shell=True)
    assert code == 0 and (tmp_path / "my weights" / "yolact_shapes_1_4.pth").exists(), text


@pytest.mark.slow
def test_after_early_stopping_train_on(shapes, tmp_path):
    code, printed = train(shapes, tmp_path, "--max_iter=16", "--validation_epoch=1",
                          "--early_stopping", "1", "--lr=1e-9")
    assert code == 0 and "found nothing better" in printed, printed
    further = commands(printed)[2]
    code, text = run(further, tmp_path, shell=True)
    assert code == 0 and "yolact_shapes_4_16.pth" in text, text
