"""The report that a user with a card sends back: complete, with what failed, and nobody's names."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.launch
SMALL = ("--steps=4", "--config=yolact_shapes", "--batch_size=2", "--cards=2", "--audit_size=64")


def run(folder, *arguments, **env):
    environment = dict(os.environ, NPU_VENV=sys.prefix, PYTHON=sys.executable, **env)
    return subprocess.run(["bash", "test/npu/field_report.sh"] + list(arguments), cwd=str(folder),
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=900)


@pytest.fixture
def project(tmp_path, device):
    """A copy, because the launchers write into the folder they lie in."""
    if device.type != "npu":
        pytest.skip("measures an NPU; run with --device npu")
    names = subprocess.run(["git", "ls-files"], cwd=str(ROOT), stdout=subprocess.PIPE, check=True,
                           universal_newlines=True).stdout.split("\n")
    for name in names:
        if name and (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(ROOT / name), str(tmp_path / "copy" / name))
    return tmp_path / "copy"


@pytest.mark.allocator
def test_every_part_reports_and_a_failed_one_stops_no_other(project, tmp_path):
    output = tmp_path / "report.txt"
    result = run(project, "--tests=test/unit/test_no_such_thing.py", "--output=" + str(output),
                 *SMALL)
    assert result.returncode == 1, result.stdout + result.stderr
    text = output.read_text()
    summary, *parts = re.split("\n=+ ", text)
    assert [part.split("\n")[0] for part in parts] == [
        "prepare", "versions", "suite", "data", "speed_1p", "fused_loss", "speed_2p", "audit",
        "losses"]
    assert re.search(r"^suite: +FAILED with exit code 4", summary, re.MULTILINE)
    assert summary.count("FAILED") == 1 and "parts failed: 1;" in summary
    assert re.search(r"^versions: +device npu:0 \(.*torch_npu .*CANN .*driver ", summary,
                     re.MULTILINE)
    for name in ("speed_1p", "fused_loss", "speed_2p"):
        assert re.search(name + r": +Final Performance images/sec : [1-9\d]*[.\d]+ TrainingTime = ",
                         summary)
    assert "all gates hold" in summary and "0 of 16 losses beyond rounding" in summary
    for private in (str(project), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(private)}\b", text), private


@pytest.mark.parametrize("argument, sentence", [
    ("--stepz=4", "unknown argument '--stepz=4'"), ("--steps=0", "--steps is '0'"),
    ("--data=/nowhere/at/all", "--data is '/nowhere/at/all', which does not exist"),
    ("--output=/nowhere/report.txt", "whose folder does not exist")])
def test_mistakes_are_one_sentence(argument, sentence):
    result = run(ROOT, argument)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1
