"""The audit as a command: its gates hold for the smallest network, and they can break."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from helpers.recorder import SKIP_REASON, available

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not available(), reason=SKIP_REASON)]
SMALL = ["--config=yolact_resnet50", "--batch_size=1", "--max_size=64"]

SPOILT = """
import runpy, sys
import layers.multibox_loss as loss
forward = loss.MultiBoxLoss.forward
def spoilt(self, predictions, batch, *more):
    {}
    return forward(self, predictions, batch, *more)
loss.MultiBoxLoss.forward = spoilt
runpy.run_path("test/npu/audit.py", run_name="__main__")
"""


def run(*command, **environ):
    return subprocess.run([sys.executable] + list(command), cwd=str(ROOT), timeout=300,
                          env=dict(os.environ, **environ), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)


@pytest.mark.allocator
def test_gates_hold(device):
    result = run("test/npu/audit.py", *SMALL, "--device", device.type)
    assert result.returncode == 0 and "all gates hold" in result.stdout, result.stdout
    assert "FAIL" not in result.stdout
    assert "pass  different operator counts with 0, 7, 30, 100 objects per image" in result.stdout


@pytest.mark.parametrize("change, gate", [
    ("float(batch.box_targets.sum())", "waits of the host in one step"),
    ("batch.box_targets[batch.class_targets > 0]", "shapes that depend on values"),
    ("for _ in range(50): batch.mask_scale + 1", "operators in the loss, forward"),
])
def test_gates_can_break(change, gate, device):
    program = "import sys; sys.path.insert(0, '.')\n" + SPOILT.format(change)
    result = run("-c", program, *SMALL, "--device", device.type)
    assert result.returncode == 1 and "FAIL  " + gate in result.stdout, result.stdout[-3000:]


@pytest.mark.allocator
def test_gates_hold_with_the_fused_loss(device):
    """Two operators for four; refused where there is no plugin."""
    result = run("test/npu/audit.py", *SMALL, "--fused_loss", "--device", device.type)
    if device.type != "npu":
        assert result.returncode == 2 and "but this device is " + device.type in result.stdout
        return
    assert result.returncode == 0 and "all gates hold" in result.stdout, result.stdout
    assert "npu.npu_cross_entropy_loss_backward.default" in result.stdout
    assert "aten._log_softmax" not in result.stdout and "aten.nll_loss" not in result.stdout


@pytest.mark.allocator
def test_without_an_npu_it_goes_to_the_emulator(device):
    if device.type != "npu" or "npu_emulator" not in os.environ.get("LD_LIBRARY_PATH", ""):
        pytest.skip("runs on the emulated npu, whose environment it finds again")
    result = run("test/npu/audit.py", *SMALL, LD_LIBRARY_PATH="", NPU_VENV=sys.prefix)
    assert result.returncode == 0 and "all gates hold" in result.stdout, result.stdout
    assert "torch_npu runs on the emulator" in result.stdout
    assert "emulated, not measured on Ascend" in result.stdout


def test_unknown_device_is_a_sentence():
    result = run("test/npu/audit.py", "--device", "nqu")
    assert result.returncode == 2 and "error: unknown device 'nqu'" in result.stdout
