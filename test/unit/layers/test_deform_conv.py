"""Deformable convolution against a slow second one, and each backend against the plain."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from helpers import rounding
from helpers.recorder import SKIP_REASON, Recorder, available
from layers import deform_conv, fused_ops
from layers.deform_conv import DeformConv2d, deform_conv_backend, modulated_deform_conv2d

CASES = [(5, 7, 1, 1), (7, 6, 2, 1), (4, 4, 1, 0), (3, 9, 2, 2)]
"""Height, width, stride, padding."""


def slow_deform_conv2d(x, offset, mask, weight, bias, stride, padding):
    """By the formula of the paper, with loops, in float64."""
    x, offset, mask, weight, bias = (np.asarray(a, np.float64) for a in
                                     (x, offset, mask, weight, bias))
    batch, _, height, width = offset.shape
    out = np.zeros((batch, len(weight), height, width)) + bias[:, None, None]
    for b, row, column, tap in np.ndindex(batch, height, width, mask.shape[1]):
        tap_row, tap_column = divmod(tap, weight.shape[3])
        y = row * stride - padding + tap_row + offset[b, 2 * tap, row, column]
        z = column * stride - padding + tap_column + offset[b, 2 * tap + 1, row, column]
        pixel = slow_bilinear(x[b], y, z) * mask[b, tap, row, column]
        out[b, :, row, column] += weight[:, :, tap_row, tap_column] @ pixel
    return out


def slow_bilinear(image, y, x):
    """Zero outside of the image."""
    value = np.zeros(len(image))
    for row in range(int(np.floor(y)), int(np.floor(y)) + 2):
        for column in range(int(np.floor(x)), int(np.floor(x)) + 2):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                value += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def make_inputs(height, width, stride, padding, spread=2.0, dtype=torch.float32, channels=3,
                batch=2, seed=0):
    """x, offset, mask, weight, bias; offsets stay a tenth away from whole pixels."""
    rng = np.random.RandomState(seed)
    h, w = ((side + 2 * padding - 3) // stride + 1 for side in (height, width))
    offset = rng.uniform(-spread, spread, (batch, 18, h, w))
    offset = np.floor(offset) + 0.1 + 0.8 * (offset - np.floor(offset))
    arrays = (rng.randn(batch, channels, height, width), offset, rng.rand(batch, 9, h, w),
              rng.randn(4, channels, 3, 3), rng.randn(4))
    return [torch.from_numpy(np.asarray(array)).to(dtype) for array in arrays]


def gradients(backend, inputs, stride, padding):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = modulated_deform_conv2d(*leaves, stride=stride, padding=padding, backend=backend)
    pattern = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
    return [out.detach()] + list(torch.autograd.grad(out, leaves, pattern))


def assert_close(found, expected, rtol=1e-4):
    for left, right in zip(found, expected):
        bound = rounding.product(rtol)
        assert torch.allclose(left, right, rtol=bound, atol=bound * float(right.abs().max()))


@pytest.mark.parametrize("spread", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("height, width, stride, padding", CASES)
def test_plain_is_the_formula(device, height, width, stride, padding, spread):
    inputs = make_inputs(height, width, stride, padding, spread)
    found = modulated_deform_conv2d(*(x.to(device) for x in inputs), stride=stride,
                                    padding=padding, backend="plain")
    expected = slow_deform_conv2d(*inputs, stride=stride, padding=padding)
    bound = rounding.product(1e-4)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=bound,
                               atol=max(1e-4, bound * abs(expected).max()))


@pytest.mark.parametrize("height, width, stride, padding", CASES)
def test_gradients_of_plain(height, width, stride, padding):
    inputs = make_inputs(height, width, stride, padding, dtype=torch.float64, channels=2, batch=1)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: modulated_deform_conv2d(*args, stride=stride, padding=padding,
                                              backend="plain"),
        leaves)


def test_both_ways_to_add_rows_agree(device, monkeypatch):
    """The gradients were checked in float64; in float32 a CPU adds the rows in another way."""
    inputs = [x.to(device) for x in make_inputs(7, 6, 2, 1)]
    found = gradients("plain", inputs, 2, 1)
    monkeypatch.setattr(deform_conv, "_weighted_rows", deform_conv._weighted_rows_by_gather)
    assert_close(found, gradients("plain", inputs, 2, 1))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_each_gradient_alone(device, wanted):
    """A frozen part of a network asks for some gradients only."""
    inputs = [x.to(device) for x in make_inputs(5, 7, 1, 1)]
    expected = gradients("plain", inputs, 1, 1)[1 + wanted]
    leaf = inputs[wanted].clone().requires_grad_()
    out = modulated_deform_conv2d(*(inputs[:wanted] + [leaf] + inputs[wanted + 1:]),
                                  backend="plain")
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out))
    assert_close([leaf.grad], [expected])


@pytest.mark.parametrize("stride", [1, 2])
def test_without_displacement_it_is_a_convolution(device, stride):
    x, offset, mask, weight, bias = (t.to(device) for t in make_inputs(9, 7, stride, 1))
    found = modulated_deform_conv2d(x, torch.zeros_like(offset), torch.ones_like(mask), weight,
                                    bias, stride, backend="plain")
    assert_close([found], [F.conv2d(x, weight, bias, stride, 1)])
    found = modulated_deform_conv2d(x, torch.zeros_like(offset), torch.ones_like(mask), weight,
                                    None, stride, backend="plain")
    assert_close([found], [F.conv2d(x, weight, None, stride, 1)])


def test_offsets_start_with_the_slope_towards_larger_coordinates():
    """At whole positions, where training starts, the slope jumps; also at the very border."""
    x, offset, mask, weight, bias = make_inputs(5, 6, 1, 1, dtype=torch.float64)
    offset = torch.zeros_like(offset).requires_grad_()
    modulated_deform_conv2d(x, offset, mask, weight, bias, backend="plain").sum().backward()
    step, moved = 1e-3, np.zeros(offset.shape)
    base = slow_deform_conv2d(x, moved, mask, weight, bias, 1, 1)
    for tap in range(18):
        moved[:, tap] = step
        after = slow_deform_conv2d(x, moved, mask, weight, bias, 1, 1)
        np.testing.assert_allclose(offset.grad[:, tap], (after - base).sum(1) / step, atol=1e-9)
        moved[:, tap] = 0


def test_module_starts_as_half_a_convolution(device):
    layer = DeformConv2d(3, 5, stride=2).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.no_grad():
        assert_close([layer(x)], [0.5 * F.conv2d(x, layer.weight, None, 2, 1)])
    assert list(layer.state_dict()) == ["weight", "bias", "conv_offset_mask.weight",
                                        "conv_offset_mask.bias"]


def test_module_splits_offsets_from_factors(device):
    layer = DeformConv2d(3, 4).to(device)
    x, offset, mask, weight, bias = (t.to(device) for t in make_inputs(1, 1, 1, 1))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.conv_offset_mask.bias.copy_(torch.cat((offset, mask), 1)[0, :, 0, 0])
        found = layer(x[:1])
    expected = modulated_deform_conv2d(x[:1], offset[:1], torch.sigmoid(mask[:1]), weight,
                                       torch.zeros_like(bias), backend="plain")
    assert_close([found], [expected])


def test_half_precision_is_computed_in_float32(device):
    inputs = [x.half().to(device) for x in make_inputs(5, 5, 1, 1)]
    found = modulated_deform_conv2d(*inputs, backend="plain")
    expected = modulated_deform_conv2d(*(x.float() for x in inputs), backend="plain")
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), expected.half().float())


def test_wrong_number_of_channels_is_an_error():
    x, offset, mask, weight, bias = make_inputs(5, 5, 1, 1)
    with pytest.raises(ValueError, match="18 and 8 channels, expected 18 and 9"):
        modulated_deform_conv2d(x, offset, mask[:, :8], weight, bias)


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_plain_is_static():
    recorder = Recorder()
    for seed in range(3):
        inputs = make_inputs(6, 6, 1, 1, seed=seed)
        with recorder.step():
            gradients("plain", inputs, 1, 1)
    assert [step.syncs for step in recorder.steps] == [[]] * 3
    assert [len(step.new_signatures) for step in recorder.steps[1:]] == [0, 0]


@pytest.fixture
def fresh_choice():
    """The choice is made anew in the test and again after it."""
    deform_conv.deform_conv_backend.cache_clear()
    yield
    deform_conv.deform_conv_backend.cache_clear()


def _install(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, function in functions.items():
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)


def _torchvision(monkeypatch, function):
    _install(monkeypatch, "torchvision")
    _install(monkeypatch, "torchvision.ops", deform_conv2d=function)


@pytest.mark.parametrize("height, width, stride, padding", CASES)
def test_torchvision_agrees_where_it_works(device, height, width, stride, padding):
    if deform_conv._torchvision_problem(device):
        pytest.skip(deform_conv._torchvision_problem(device))
    inputs = [x.to(device) for x in make_inputs(height, width, stride, padding)]
    assert_close(gradients("torchvision", inputs, stride, padding),
                 gradients("plain", inputs, stride, padding))


def test_torchvision_is_chosen_and_given_its_arguments(monkeypatch, fresh_choice):
    def convolve(x, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
        return deform_conv.convolve_plainly(x, offset, mask, weight, bias, stride, padding)

    _torchvision(monkeypatch, convolve)
    assert deform_conv_backend(torch.device("cpu")) == "torchvision"
    inputs = make_inputs(7, 6, 2, 1)
    assert torch.equal(modulated_deform_conv2d(*inputs, stride=2),
                       modulated_deform_conv2d(*inputs, stride=2, backend="plain"))


def test_absent_torchvision_is_named(monkeypatch, fresh_choice):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    assert deform_conv_backend(torch.device("cpu")) == "plain"
    assert deform_conv._torchvision_problem(torch.device("cpu")) == "torchvision is not installed"


def test_broken_torchvision_is_named(monkeypatch, fresh_choice):
    def broken(*args, **kwargs):
        raise RuntimeError("Couldn't load custom C++ ops.\nThis can happen if ...")

    _torchvision(monkeypatch, broken)
    assert deform_conv_backend(torch.device("cpu")) == "plain"
    assert deform_conv._torchvision_problem(torch.device("cpu")).endswith(
        "does not work here: Couldn't load custom C++ ops.")


class Plugin:
    """What the Ascend operators are documented to do, by the plain one on the CPU."""

    def __init__(self, order=(1, 0)):
        self.order = order  # of the y and x offsets in a stored pair; (0, 1) is a wrong layout

    def unpack(self, packed):
        halves = packed[:, :18].chunk(2, 1)
        pairs = torch.stack([halves[n] for n in self.order], 2)
        return pairs.flatten(1, 2), packed[:, 18:]

    def forward(self, x, weight, packed, bias, kernel_size, stride, padding, dilation=(1,) * 4,
                groups=1, deformable_groups=1, modulated=True):
        assert stride[:2] == [1, 1] and stride[2] == stride[3] and len(set(padding)) == 1
        assert kernel_size == [3, 3] and list(dilation) == [1] * 4 and modulated
        assert groups == deformable_groups == 1
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in (x, weight, packed))
        offset, mask = self.unpack(packed)
        out = deform_conv.convolve_plainly(x, offset, mask, weight, bias, stride[2], padding[0])
        return out, x.new_full((1,), 7.0)

    def backward(self, x, grad, sampled, weight, packed, **geometry):
        assert sampled.tolist() == [7.0]
        with torch.enable_grad():
            bias = torch.zeros(len(weight), requires_grad=True)
            leaves = [t.detach().requires_grad_() for t in (x, weight, packed)] + [bias]
            out, _ = self.forward(leaves[0], leaves[1], leaves[2], bias, **geometry)
            return torch.autograd.grad(out, leaves, grad)

    def install(self, monkeypatch):
        _install(monkeypatch, "torch_npu", npu_deformable_conv2d=self.forward,
                 npu_deformable_conv2dbk=self.backward)


def _problem():
    return fused_ops.try_deform_conv(torch.device("cpu"), deform_conv.convolve_plainly)


@pytest.mark.parametrize("height, width, stride, padding", CASES)
def test_npu_way_speaks_the_operators_layout(monkeypatch, height, width, stride, padding):
    Plugin().install(monkeypatch)
    inputs = make_inputs(height, width, stride, padding)
    assert_close(gradients("npu", inputs, stride, padding),
                 gradients("plain", inputs, stride, padding))
    assert _problem() == ""


def test_npu_trial_refuses_another_layout(monkeypatch):
    Plugin(order=(0, 1)).install(monkeypatch)
    assert "deviates" in _problem()


def test_npu_trial_refuses_a_wrong_gradient(monkeypatch):
    plugin = Plugin()
    right = plugin.backward
    plugin.backward = lambda *args, **geometry: (
        lambda a, b, packed, d: (a, b, packed * 1.1, d))(*right(*args, **geometry))
    plugin.install(monkeypatch)
    assert "deviates" in _problem()


def test_npu_trial_names_what_fails(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("EZ1001\nmore")

    _install(monkeypatch, "torch_npu", npu_deformable_conv2d=broken,
             npu_deformable_conv2dbk=broken)
    assert _problem() == "the plugin's operator failed its trial (EZ1001)"
    _install(monkeypatch, "torch_npu")
    assert _problem() == "the plugin has no operator npu_deformable_conv2d"


OWN_PROCESS = {
    "": """
from unit.layers.test_deform_conv import Plugin
npu_deformable_conv2d, npu_deformable_conv2dbk = Plugin().forward, Plugin().backward
print("a plugin may say anything")
""",
    "the plugin has no operator npu_deformable_conv2d": "",
    "the trial of the plugin's operator ended with code 9": "import os; os._exit(9)",
}


@pytest.mark.parametrize("problem", sorted(OWN_PROCESS))
def test_npu_trial_runs_in_a_process_of_its_own(monkeypatch, tmp_path, problem):
    (tmp_path / "torch_npu.py").write_text(OWN_PROCESS[problem])
    monkeypatch.setenv("PYTHONPATH", "{}:{}".format(tmp_path, ROOT / "test"))
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert fused_ops.kernel_problem("deform_conv", torch.device("cpu")) == problem
