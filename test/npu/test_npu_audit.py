"""The audit as a command: its gates hold for the smallest network, and they can break."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from helpers import rounding
from helpers.recorder import SKIP_REASON, available
from npu import counters
from npu.kernels import AUXILIARY, CORE, KERNELS, ROUTES, UNKNOWN, kernels_of, parse

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


def test_a_kernel_off_the_cores_breaks_the_gates(device):
    """Bit arithmetic of bytes on both cards, 16 bits on 910A, and an operator of no known place."""
    if not counters.available():
        pytest.skip("where kernels run is told of the emulated npu")
    change = "batch.images & batch.images; batch.mask_index.short(); batch.gt_boxes.floor()"
    program = "import sys; sys.path.insert(0, '.')\n" + SPOILT.format(change)
    result = run("-c", program, *SMALL, "--device", device.type)
    assert result.returncode == 1
    for line in ("FAIL  kernels on the auxiliary CPU of a 910B: 1 (",
                 "BitwiseAnd u8: BitwiseAndTensor u8[1,3,",
                 "FAIL  kernels not in the table of 910B: 1 (",
                 "FAIL  kernels on the auxiliary CPU of a 910A: 2 (", "Cast i32 to i16"):
        assert line in result.stdout, result.stdout[-3000:]


@pytest.mark.parametrize("line, on_910b, on_910a", [
    ("BitwiseAndTensor Byte[2,8] Byte[8] Byte[2,8]", [AUXILIARY], [AUXILIARY]),
    ("BitwiseAndTensor Byte[2,8] Int[8] Int[2,8]", [CORE, CORE], [CORE, CORE]),
    ("BitwiseAndTensor Bool[2] Bool[2] Bool[2]", [CORE], [CORE]),
    ("Add Short[4,100] Long[4,1] Long[4,100]", [CORE, CORE], [AUXILIARY, CORE]),
    ("ReduceSum Int[4] Long[]", [CORE, CORE], [CORE, AUXILIARY]),
    ("Sort Float[4,19248] Float[4,19248] Long[4,19248]", [CORE], [CORE, CORE, CORE]),
    ("InplaceScatter Long[4,9] Long[4,9] Long[4,9]", [AUXILIARY], [AUXILIARY]),
    ("InplaceScatter Int[4,19248] Long[4,19248] Int[4,19248]", [CORE], [CORE]),
    ("InplaceScatter Int[4,57744] Long[4,57744] Int[4,57744]", [CORE], [AUXILIARY]),
    ("Gather Float[4,19248,32] Long[4,100,32] Float[4,100,32]", [CORE], [AUXILIARY]),
    ("InplaceCopy Float[2] Float[2]", [CORE], [CORE]),
    ("Fmod Float[2] Float[2]", [UNKNOWN], [UNKNOWN]),
])
def test_where_kernels_run(line, on_910b, on_910a):
    call = parse(line)
    assert [place for _, place in kernels_of(call, "910B")] == on_910b
    assert [place for _, place in kernels_of(call, "910A")] == on_910a


def test_every_kernel_of_a_route_has_a_row_with_a_source():
    for name in ROUTES:
        line = name + 4 * " Float[2,9]"
        for kernel, _ in kernels_of(parse(line), "910A"):
            assert kernel.name == "Cast" or KERNELS[kernel.name].source.startswith("ops-"), name


@pytest.mark.allocator
def test_gates_hold_with_the_fused_loss(device):
    """Two operators for four; refused where there is no plugin."""
    rounding.skip_where_saturated()  # it is for A2 and A3
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
