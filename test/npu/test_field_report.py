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

from npu import profile_step
from npu.verdict import verdict
from utils.errors import UserError

pytestmark = pytest.mark.launch
SMALL = ("--steps=4", "--config=yolact_shapes", "--batch_size=2", "--cards=2", "--audit_size=64")


def run(folder, *arguments, **env):
    environment = dict(os.environ, NPU_VENV=sys.prefix, PYTHON=sys.executable, **env)
    return subprocess.run(["bash", "test/npu/field_report.sh"] + list(arguments), cwd=str(folder),
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=1500)


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
        "prepare", "versions", "suite", "data", "speed_1p", "graph", "fused_loss", "O1", "O2",
        "batch_1", "batch_4", "batch_auto", "internal_format", "speed_2p", "all_reduce", "audit",
        "losses", "verdict"]
    assert re.search(r"^suite: +FAILED with exit code 4", summary, re.MULTILINE)
    assert summary.count("FAILED") == 1 and "parts failed: 1;" in summary
    assert re.search(r"^versions: +device npu:0 \(.*torch_npu .*CANN .*driver ", summary,
                     re.MULTILINE)
    for name in ("speed_1p", "graph", "fused_loss", "O1", "O2", "batch_1", "batch_4", "batch_auto",
                 "internal_format", "speed_2p"):
        assert re.search(name + r": +Final Performance images/sec : [1-9\d]*[.\d]+ TrainingTime = ",
                         summary)
    assert re.search(r"^all_reduce: +all-reduce of 200 MB on 2 cards: .* GB/s a card", summary,
                     re.MULTILINE)
    for name in ("jit_compile", "profile"):
        assert re.search(rf"^{name}: +left out: the emulator", summary, re.MULTILINE)
    page = parts[-1]
    assert "EMULATED: these speeds say nothing" in page and "\nSet: " in page
    for flag in ("--device_graph", "--opt_level=O1", "--internal_format", "--batch_size=auto"):
        assert re.search(rf"^  {flag} +[\d.]+ images/s \(", page, re.MULTILINE), page
    assert "Look at: suite: FAILED" in page
    assert "all gates hold" in summary and "0 of 16 losses beyond rounding" in summary
    for private in (str(project), socket.gethostname()):
        assert not re.search(rf"\b{re.escape(private)}\b", text), private


SUMMARY = """speed_1p:  Final Performance images/sec : 40.0 TrainingTime = 9 (3 s)
graph:     Final Performance images/sec : 44.0 (3 s)
O1:        Final Performance images/sec : 40.5 (3 s)
fused_loss: error: --fused_loss is the Ascend plugin's cross entropy, but this device is old (3 s)
jit_compile: Final Performance images/sec : 80.0 (3 s)
O2:        FAILED with exit code 1; Final Performance images/sec : 99.0 (3 s)
profile:   step 200 ms; profiled 9 ms, of it 3 % between kernels, auxiliary CPU 7.00 ms, 0 kernels
"""


def test_the_verdict_advises_what_is_faster_and_tested():
    lines = verdict(SUMMARY)
    text = "\n".join(lines)
    assert "--device_graph       44 images/s (+10 %): faster" in text
    assert "--opt_level=O1       40.5 images/s (+1 %): no difference" in text
    assert "--fused_loss         not measured: error: --fused_loss is" in text
    assert "80 images/s (+100 %): faster; nothing has been tested with it" in text
    assert "Set: --device_graph (each measured alone)" in lines
    assert "Look at: O2: FAILED" in text and "Look at: profile: step 200" in text
    lost = SUMMARY.replace("44.0 (3 s)", "44.0 TrainingTime = 9 ActualLoss = nan (3 s)")
    assert "Set: nothing; the defaults are as fast as what was tried" in verdict(lost)
    with pytest.raises(UserError, match="no speed of one card"):
        verdict(SUMMARY.replace("speed_1p", "speed_2p"))


KERNELS = """Step Id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Input Shapes,\
Input Data Types,Output Data Types
1,a,Conv2D,AI_CORE,100.0,50.0,"1,3;4,3",FLOAT16;FLOAT16,FLOAT16
1,b,ScatterElementsV2,AI_CPU,170.0,30.0,"4,9",INT64;INT64,INT64
1,c,Cast,AI_CPU,200.0,4.0,"4",INT32,FLOAT
1,d,Add,AI_VECTOR_CORE,204.0,6.0,"4",FLOAT;FLOAT,FLOAT
"""


def test_a_profile_is_told_by_core_and_held_against_the_table(tmp_path):
    file = tmp_path / "kernel_details.csv"
    file.write_text(KERNELS.replace("\\\n", ""))
    lines = profile_step.report(profile_step.read_kernels(file), 2, "910B", 61.5)
    text = "\n".join(lines)
    assert "  AI_CORE               0.5 kernels     0.025 ms" in lines
    assert "Conv2D AI_CORE 1,3;4,3" in text
    assert ("ScatterElementsV2 INT64;INT64 to INT64: auxiliary CPU, 0.5 times and 0.015 ms a step; "
            "as the table says") in text
    assert ("Cast INT32 to FLOAT: auxiliary CPU, 0.5 times and 0.002 ms a step; DIFFERENT: the "
            "table says core") in text
    assert "Add FLOAT" not in text
    assert lines[-1] == ("step 61.5 ms; profiled 0.1 ms, of it 18 % between kernels, auxiliary CPU "
                         "0.02 ms, 1 kernels unlike the table")
    file.write_text("Type\nConv2D\n")
    with pytest.raises(UserError, match="kernel_details.csv' cannot be used: KeyError"):
        profile_step.read_kernels(file)


def test_columns_are_those_that_the_profiler_writes(device):
    if device.type != "npu":
        pytest.skip("looks into torch_npu; run with --device npu")
    from torch_npu.profiler.analysis.prof_common_func._csv_headers import CsvHeaders

    written = CsvHeaders.OP_SUMMARY_KERNEL_BASE_HEADERS + CsvHeaders.OP_SUMMARY_ADDITIONAL_HEADERS
    ours = KERNELS.replace("\\\n", "").split("\n")[0].split(",")
    assert set(ours) - set(written) == {"Step Id"}


def test_names_are_hidden_whatever_their_letters(tmp_path):
    """By the shell function itself; a folder may have letters that mean something to sed."""
    script = (ROOT / "test/npu/field_report.sh").read_text()
    function = script[script.index("anonymous() {"):script.index("write_report() {")]
    done = subprocess.run(
        ["bash", "-c", f"{function}\nroot='/p|q&[r]' work=/w data='/d.$x*' HOME=/root anonymous"],
        input="/p|q&[r]/a /dxyx* /d.$x* /w/b\n", stdout=subprocess.PIPE, check=True,
        universal_newlines=True)
    assert done.stdout == "<project>/a /dxyx* <data> <work>/b\n"


@pytest.mark.parametrize("argument, sentence", [
    ("--stepz=4", "unknown argument '--stepz=4'"), ("--steps=0", "--steps is '0'"),
    ("--data=/nowhere/at/all", "--data is '/nowhere/at/all', which does not exist"),
    ("--output=/nowhere/report.txt", "whose folder does not exist"),
    ("--output=/", "is a folder; name a file"), ("--audit_size=small", "--audit_size is 'small'")])
def test_mistakes_are_one_sentence(argument, sentence):
    result = run(ROOT, argument)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1
