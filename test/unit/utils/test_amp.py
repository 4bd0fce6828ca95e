"""Precision: the loss scale, what is cast and what is not, float32 masters, skipped steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import rounding
from helpers.recorder import SKIP_REASON, Recorder, available
from train import train_step
from utils import amp
from utils import device as devices
from utils.amp import FIRST_SCALE, GOOD_STEPS_TO_GROW, LossScale, Precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.engine.observer import StepRecords
from utils.optimizer import ALIGNMENT, FlatAdamW, FlatSGD

CASTS = pytest.mark.skipif(not devices.has_autocast(), reason="this PyTorch casts on devices only")


# The loss scale.

def pattern(steps):
    """Overflows: some at the start, one just before and one just after a doubling, then a few."""
    overflows = {0, 1, 5, 5 + GOOD_STEPS_TO_GROW - 1, 5 + 2 * GOOD_STEPS_TO_GROW,
                 5 + 2 * GOOD_STEPS_TO_GROW + 1}
    return [step not in overflows for step in range(steps)]


def library_scaler(device):
    """PyTorch's scaler, or the plugin's on an NPU; None where there is none for the device."""
    if device.type == "npu":
        return torch.npu.amp.GradScaler(dynamic=True)
    found = getattr(getattr(torch, "amp", None), "GradScaler", None)
    return found and found(device.type)


def test_scales_are_those_of_the_librarys_scaler(device, capsys):
    scaler = library_scaler(device)
    if scaler is None:
        pytest.skip(f"this PyTorch has no scaler for {device}")
    rounding.skip_where_saturated()  # the plugin's reads the register there, which inf does not set
    ours, steps = LossScale(device), 3 * GOOD_STEPS_TO_GROW
    weight = nn.Parameter(torch.ones(1, device=device))
    theirs = torch.optim.SGD([weight], lr=0.0, foreach=False)
    one, bad = torch.ones(1, device=device), torch.full((1,), math.inf, device=device)
    scaler.scale(one)
    seen = []
    for step, finite in enumerate(pattern(steps)):
        weight.grad = (one if finite else bad).clone()
        scaler.step(theirs)
        scaler.update()
        ours.update(torch.isfinite(weight.grad).all())
        seen.append((float(ours.value), scaler.get_scale()))
        assert seen[-1][0] == seen[-1][1], step
    assert {FIRST_SCALE / 8, FIRST_SCALE / 4} < {scale for scale, _ in seen}


def test_the_scale_has_a_floor_and_a_ceiling(device):
    scale = LossScale(device)
    bad, good = (torch.tensor(value, device=device) for value in (False, True))
    for _ in range(20):
        scale.update(bad)
    assert float(scale.value) == Precision(scale=scale).scale_floor == 1.0
    scale.load_state_dict({"scale": amp.HIGHEST_SCALE, "good_steps": GOOD_STEPS_TO_GROW - 1})
    scale.update(good)
    assert float(scale.value) == amp.HIGHEST_SCALE


def test_a_fixed_scale_stays(device):
    scale = LossScale(device, 128.0)
    scale.update(torch.tensor(False, device=device))
    assert float(scale.value) == 128.0 and Precision(scale=scale).scale_floor == math.inf


def test_state_of_the_scale(device):
    scale, other = LossScale(device), LossScale(device)
    for finite in (False, True, True):
        scale.update(torch.tensor(finite, device=device))
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == {"scale": FIRST_SCALE / 2, "good_steps": 2}


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_the_scale_waits_for_nothing(device):
    scale, finite = LossScale(device), torch.tensor(True, device=device)
    recorder = Recorder()
    with recorder.step() as step:
        scale.update(finite)
    assert step.syncs == [] and step.kernels <= 12


# A step with it.

class Stub(nn.Module):
    """A network of one layer with the interface of the step, and its loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.seen = []

    def forward(self, images):
        out = self.layer(images.to(self.layer.weight.dtype))
        self.seen.append(out.dtype)
        return {"out": self.norm(out)}


class Criterion(nn.Module):
    factor = 1.0

    def forward(self, predictions, part, num_positives):
        assert predictions["out"].dtype == torch.float32
        return {"B": predictions["out"].pow(2).mean() * self.factor}


class Part:
    def __init__(self, device, seed=0):
        self.images = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(device)
        self.num_positives = torch.ones(8, device=device)


def make(device, level="O0", kind=torch.bfloat16, scale=None, optimizer=FlatSGD):
    if level != "O0" and kind == torch.bfloat16:
        rounding.skip_where_saturated()
    torch.manual_seed(0)
    network = Stub().to(device)
    precision = Precision(level, device, kind, scale)
    last = amp.batch_norm_parameters(network) if level == "O2" else ()
    behind = {id(p) for p in last}
    flat = optimizer(sorted(network.parameters(), key=lambda p: id(p) in behind))
    precision.prepare(network, flat)
    return network, flat, precision


def run_step(network, flat, precision, criterion=None, seed=0):
    device = flat.flat.device
    return train_step(network, criterion or Criterion(), flat, [Part(device, seed)], 0.1,
                      Sharing(Processes(), device), precision)


class NanIsZero(Precision):
    """As on a card that saturates: NaN becomes 0 on its way back, and the register is silent."""

    def backward(self, loss):
        if not bool(torch.isfinite(loss)):
            loss = self.parameter.sum()
        super().backward(loss)

    def take_overflow(self):
        return torch.zeros((), device=self.device)


@pytest.mark.parametrize("void", [False, True])
def test_a_void_step_changes_nothing_where_nan_does_not_show(device, void):
    network = Stub().to(device)
    flat, precision = FlatSGD(network.parameters()), NanIsZero("O0", device)
    precision.parameter = next(network.parameters())
    before = flat.flat.clone()
    train_step(network, Criterion(), flat, [Part(device, 0)], 0.1, Sharing(Processes(), device),
               precision, void)
    assert torch.equal(flat.flat, before) == void
    assert bool(torch.isfinite(flat.flat).all())


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_scale_changes_no_update(device, scale):
    plain, ours = make(device), make(device, scale=LossScale(device, scale or None))
    for step in range(4):
        losses = run_step(*plain, seed=step)
        scaled = run_step(*ours, seed=step)
        assert torch.equal(losses["B"], scaled["B"])  # what is shown is not scaled
        assert torch.allclose(ours[1].flat, plain[1].flat, rtol=1e-6, atol=1e-7)
        assert float(ours[1].grad_norm) == pytest.approx(float(plain[1].grad_norm), rel=1e-5)


def test_an_overflow_skips_the_step_and_halves_the_scale(device):
    network, flat, precision = make(device, scale=LossScale(device))
    run_step(network, flat, precision)
    before = flat.flat.clone()
    overflowing = Criterion()
    overflowing.factor = 1e34  # a finite loss, but not its gradient times 65536
    losses = run_step(network, flat, precision, overflowing)
    assert bool(torch.isfinite(losses["B"])) and not bool(flat.step_finite)
    assert torch.equal(flat.flat, before)
    assert float(precision.used_scale) == 65536 and float(precision.scale.value) == 32768
    run_step(network, flat, precision)
    assert bool(flat.step_finite) and not torch.equal(flat.flat, before)


@CASTS
@pytest.mark.parametrize("level, computed, stored", [
    ("O0", torch.float32, torch.float32), ("O1", torch.bfloat16, torch.float32),
    ("O2", torch.bfloat16, torch.bfloat16)])
def test_what_is_cast(device, level, computed, stored):
    network, flat, precision = make(device, level)
    run_step(network, flat, precision)
    assert network.seen == [computed]
    assert network.layer.weight.dtype == stored == network.layer.weight.grad.dtype
    assert network.norm.weight.dtype == torch.float32 == network.norm.weight.grad.dtype
    assert flat.flat.dtype == torch.float32


# Float32 masters of half parameters.

@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [FlatSGD, FlatAdamW])
def test_masters_follow_the_float32_optimiser(device, kind, optimizer):
    ours, flat, _ = make(device, "O2", kind, optimizer=optimizer)
    plain, reference, _ = make(device, optimizer=optimizer)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours.parameters(), plain.parameters()):
            # In steps of 1 / 64, which every type holds exactly.
            gradient = torch.randint(-64, 64, other.shape, generator=generator) / 64.0
            mine.grad = gradient.to(device, mine.dtype)
            other.grad = gradient.to(device)
        flat.step(1e-3)
        reference.step(1e-3)
    masters = {id(p): values for p, values in flat.master_weights()}
    for mine, other in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(masters[id(mine)], other.detach())
        assert torch.equal(mine.detach().float(), other.detach().to(mine.dtype).float())


def test_half_parameters_lie_together_and_are_gathered_with_one_cast(device):
    network, flat, _ = make(device, "O2")
    kinds = [p.dtype for p in flat.parameters]
    assert kinds == sorted(kinds, key=lambda kind: kind == torch.float32)
    spans = [p.data_ptr() for p in flat.parameters if p.dtype == torch.bfloat16]
    assert all((later - first) % (2 * ALIGNMENT) == 0 for first, later in zip(spans, spans[1:]))
    if available():
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        recorder = Recorder()
        with recorder.step() as step:
            flat.step(0.1)
        # A cat of each type, and one of both, on a CPU into a tensor that is kept.
        assert step.operators["aten.cat.default"] + step.operators["aten.cat.out"] == 3
        assert step.operators["aten._to_copy.default"] <= 3 and step.syncs == []


def test_a_missing_gradient_of_a_half_parameter_counts_as_zeros(device):
    network, flat, _ = make(device, "O2")
    before = flat.flat.clone()
    for parameter in network.norm.parameters():
        parameter.grad = torch.ones_like(parameter)
    flat.step(0.1)
    masters = dict((id(p), values) for p, values in flat.master_weights())
    assert bool(flat.step_finite) and not torch.equal(flat.flat, before)
    assert torch.equal(masters[id(network.layer.weight)].flatten(), before[:12])


def test_float32_weights_are_saved_and_loaded_and_the_hooks_stay(device):
    network, flat, precision = make(device, "O2")
    flat.flat.copy_(flat.flat * 1.0001)  # less than the half type can hold
    calls = []
    for parameter in network.parameters():
        parameter.register_hook(lambda gradient: calls.append(gradient.dtype))
    objects = list(network.parameters())
    with precision.float32_weights(network):
        saved = {name: value.clone() for name, value in network.state_dict().items()}
        assert network(Part(device).images)["out"].dtype == torch.float32
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved.values())
    assert list(saved) == list(network.state_dict())
    assert all(a is b for a, b in zip(network.parameters(), objects))

    other, other_flat, other_precision = make(device, "O2")
    with other_precision.float32_weights(other):
        other.load_state_dict({name: value * 1.5 if value.is_floating_point() else value
                               for name, value in saved.items()})
    assert torch.equal(other_flat.flat, flat.flat * 1.5)
    assert torch.equal(other.layer.weight.detach(), (saved["layer.weight"] * 1.5).bfloat16())
    if devices.has_autocast():
        run_step(network, flat, precision)
        assert sorted(calls, key=str) == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_frozen_parameters_keep_their_float32_values(device):
    rounding.skip_where_saturated()
    torch.manual_seed(0)
    network = Stub().to(device)
    network.layer.weight.requires_grad_(False)
    values = network.layer.weight.detach().clone()
    flat = FlatSGD([p for p in network.parameters() if p.requires_grad])
    precision = Precision("O2", device, torch.bfloat16)
    precision.prepare(network, flat)
    assert network.layer.weight.dtype == torch.bfloat16
    with precision.float32_weights(network):
        assert torch.equal(network.state_dict()["layer.weight"], values)
        network.load_state_dict(dict(network.state_dict(), **{"layer.weight": values + 1}))
    assert torch.equal(network.layer.weight.detach(), (values + 1).bfloat16())


# What is skipped, and what stops a run.

def records_of(rows, floor=1.0, on_any_card=lambda flags: flags):
    records = StepRecords(floor, on_any_card)
    for iteration, (loss, applied, scale) in enumerate(rows):
        records.add({"B": torch.tensor(loss)}, torch.tensor(applied), torch.tensor(scale))
        records.count(iteration, (7,))
    return records.report()


def test_an_overflow_is_told_from_a_loss_that_is_not_finite():
    report = records_of([(1.0, False, 65536.0), (1.0, True, 32768.0), (math.nan, False, 32768.0)])
    overflow, bad = (step.sentence() for step in report.skipped)
    assert overflow == ("iteration 0: gradient overflow at scale 65536, the scale is now 32768; "
                        "update skipped on every card")
    assert "loss (B: nan) not finite" in bad and "image ids 7" in bad
    assert (report.in_a_row, report.scale, report.total) == (1, 32768.0, 1.0)


def test_overflows_count_as_failures_only_at_the_lowest_scale():
    falling = [(1.0, False, 2.0 ** power) for power in range(16, 0, -1)]
    assert records_of(falling).in_a_row == 0
    report = records_of(falling + [(1.0, False, 1.0)] * 10)
    assert report.in_a_row == 10
    assert "gradient at loss scale 1 not finite" in report.skipped[-1].sentence()
    assert records_of([(1.0, False, 128.0)] * 3, floor=math.inf).in_a_row == 3
    assert records_of([(math.inf, False, 65536.0)] * 4).in_a_row == 4


def test_a_loss_that_another_card_saw_counts_here_too():
    asked = []

    def other_card(flags):
        asked.append(flags)
        return flags + torch.tensor([0.0, 1.0, 0.0])

    rows = [(1.0, False, 65536.0), (1.0, False, 32768.0), (1.0, True, 16384.0)]
    assert records_of(rows, on_any_card=other_card).in_a_row == 1
    assert len(asked) == 1
    records_of([(1.0, True, 65536.0)] * 3, on_any_card=other_card)
    assert len(asked) == 1  # nothing to ask without a skipped step


# The register of devices that saturate.

@pytest.mark.parametrize("scaled", [True, False])
def test_the_register_of_a_device_that_saturates(monkeypatch, device, scaled):
    events, register = [], torch.zeros((), device=device)
    monkeypatch.setattr(amp, "saturates", lambda device: True)
    monkeypatch.setattr(amp, "clear_overflow", lambda device: events.append("clear"))
    monkeypatch.setattr(amp, "overflow_since_clear", lambda device: register.clone())
    network, flat, precision = make(device, scale=LossScale(device) if scaled else None)
    network.register_forward_pre_hook(lambda *ignored: events.append("forward"))
    before = flat.flat.clone()
    register.fill_(1)
    run_step(network, flat, precision)
    assert events == ["clear", "forward"] and not bool(flat.step_finite)
    assert torch.equal(flat.flat, before)
    assert precision.scale is None or float(precision.scale.value) == 32768
    register.fill_(0)
    run_step(network, flat, precision)
    assert bool(flat.step_finite) and not torch.equal(flat.flat, before)


def test_automatic_precision(monkeypatch):
    cpu = torch.device("cpu")
    for computes in (False, True):
        monkeypatch.setattr("utils.amp.cpu_computes_bfloat16", lambda: computes)  # noqa: B023
        expected = computes and not devices.half_type_problem(cpu, torch.bfloat16)
        assert amp.inference_dtype("auto", cpu) == (torch.bfloat16 if expected else torch.float32)
    assert amp.inference_dtype("auto", SimpleNamespace(type="npu")) == torch.float32
