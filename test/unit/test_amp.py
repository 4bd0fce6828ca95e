"""Precision: flags, the loss scale, what is cast and what is not, float32 masters, resuming."""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from audit import SKIP_REASON, Recorder, available
from torch import nn

import train
from data.shapes import write_dataset
from utils import amp
from utils import device as devices
from utils.amp import FIRST_SCALE, GOOD_STEPS_TO_GROW, LossScale, Precision, build_precision
from utils.errors import UserError
from utils.optimizer import ALIGNMENT, FlatAdamW, FlatSGD, build_optimizer
from utils.parallel import Sharing, shared_step
from utils.processes import Processes
from utils.step_records import StepRecords

CPU = torch.device("cpu")
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
        pytest.skip("this PyTorch has no scaler for {}".format(device))
    ours, steps = LossScale(device), 3 * GOOD_STEPS_TO_GROW
    weight = nn.Parameter(torch.ones(1, device=device))
    theirs = torch.optim.SGD([weight], lr=0.0)
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
    assert float(scale.value) == scale.floor == 1.0
    scale.load_state_dict({"scale": amp.HIGHEST_SCALE, "good_steps": GOOD_STEPS_TO_GROW - 1})
    scale.update(good)
    assert float(scale.value) == amp.HIGHEST_SCALE


def test_a_fixed_scale_stays(device):
    scale = LossScale(device, 128.0)
    scale.update(torch.tensor(False, device=device))
    assert float(scale.value) == 128.0 and scale.floor == math.inf


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
    return shared_step(network, criterion or Criterion(), flat, [Part(device, seed)], 0.1,
                       Sharing(Processes(), device), precision=precision)


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
    masters = {id(p): values for p, values in flat.masters()}
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
        assert step.operators["aten.cat.default"] == 3  # a cat of each type, and one of both
        assert step.operators["aten._to_copy.default"] <= 3 and step.syncs == []


def test_a_missing_gradient_of_a_half_parameter_counts_as_zeros(device):
    network, flat, _ = make(device, "O2")
    before = flat.flat.clone()
    for parameter in network.norm.parameters():
        parameter.grad = torch.ones_like(parameter)
    flat.step(0.1)
    masters = dict((id(p), values) for p, values in flat.masters())
    assert bool(flat.step_finite) and not torch.equal(flat.flat, before)
    assert torch.equal(masters[id(network.layer.weight)].flatten(), before[:12])


def test_float32_weights_are_saved_and_loaded_and_the_hooks_stay(device):
    network, flat, precision = make(device, "O2")
    flat.flat.mul_(1.0001)  # less than the half type can hold
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
        records.add(iteration, {"B": torch.tensor(loss)}, torch.tensor(applied),
                    torch.tensor([7]), torch.tensor(scale))
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

def test_the_register_of_a_device_that_saturates(monkeypatch, device):
    events, register = [], torch.zeros((), device=device)
    monkeypatch.setattr(amp, "saturates", lambda device: True)
    monkeypatch.setattr(amp, "clear_overflow", lambda device: events.append("clear"))
    monkeypatch.setattr(amp, "overflow_since_clear", lambda device: register.clone())
    network, flat, precision = make(device, scale=LossScale(device))
    before = flat.flat.clone()
    register.fill_(1)
    run_step(network, flat, precision)
    assert events == ["clear"] and not bool(flat.step_finite)
    assert torch.equal(flat.flat, before) and float(precision.scale.value) == 32768
    register.fill_(0)
    run_step(network, flat, precision)
    assert bool(flat.step_finite) and not torch.equal(flat.flat, before)


def test_without_a_scale_the_register_is_left_alone(monkeypatch, device):
    monkeypatch.setattr(amp, "saturates", lambda device: True)
    monkeypatch.setattr(amp, "clear_overflow", lambda device: pytest.fail("asked"))
    run_step(*make(device))


# PyTorch 1.5 and 1.8: a library casts.

class Library:
    """What is used of it, with a note of each call."""

    def __init__(self):
        self.calls = []

    def initialize(self, model, opt_level, loss_scale, verbosity):
        self.calls.append(("initialize", opt_level, loss_scale))
        return model

    @contextlib.contextmanager
    def disable_casts(self):
        self.calls.append("loss")
        yield

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizers):
        assert optimizers == []
        yield loss
        self.calls.append("drop copies")


def test_the_library_casts_the_network_and_not_the_loss(device):
    network, library = Stub().to(device), Library()
    flat = FlatSGD(network.parameters())
    precision = Precision("O1", device, torch.float16, LossScale(device), library)
    precision.prepare(network, flat)
    for _ in range(2):
        run_step(network, flat, precision)
    assert library.calls == [("initialize", "O1", 1.0)] + 2 * ["loss", "drop copies"]


def fake_module(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(os.sys.modules, "apex", raising=False)
    monkeypatch.setattr(amp, "has_autocast", lambda: False)


@pytest.mark.parametrize("text, sentence", [
    (None, "need the package apex .* install Ascend's"),
    ("import pyramid_toolkit", "that on PyPI is something else .* install Ascend's"),
    ("", "that on PyPI is something else")])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_missing_or_wrong_library_is_one_sentence(tmp_path, monkeypatch, text, sentence, level):
    fake_module(tmp_path, monkeypatch, text)
    npu = type("Device", (), {"type": "npu", "index": 0})()
    with pytest.raises(UserError, match=sentence):
        build_precision(level, None, "auto", npu)


def test_no_half_precision_on_an_old_cpu(tmp_path, monkeypatch):
    fake_module(tmp_path, monkeypatch, None)
    with pytest.raises(UserError, match="no half precision on the CPU"):
        build_precision("O1", None, "auto", CPU)


# Flags.

@pytest.mark.parametrize("level, scale, kind, sentence", [
    ("O4", None, "auto", r"--opt_level is 'O4'; did you mean 'O\d'\? Known: O0, O1, O2"),
    ("half", None, "auto", "--opt_level is 'half'"),
    ("O1", "dynamc", "auto", "--loss_scale is 'dynamc', expected dynamic or a number above 0"),
    ("O1", "0", "auto", "--loss_scale is '0'"),
    ("O1", "nan", "auto", "--loss_scale is 'nan'"),
    ("O1", "1e39", "auto", "--loss_scale is '1e39'"),
    ("O1", None, "bf16", "--amp_dtype is 'bf16'; did you mean 'bfloat16'"),
    ("O0", "128", "auto", "--loss_scale means nothing at --opt_level=O0"),
    ("O0", None, "float16", "--amp_dtype means nothing at --opt_level=O0"),
])
def test_a_wrong_flag_is_one_sentence(level, scale, kind, sentence):
    with pytest.raises(UserError, match=sentence):
        build_precision(level, scale, kind, CPU)


def test_a_type_that_the_device_lacks(monkeypatch):
    monkeypatch.setattr(amp, "half_type_problem", lambda *asked: "Ascend910A has no bfloat16")
    monkeypatch.setattr(amp, "has_autocast", lambda: True)
    with pytest.raises(UserError, match="Ascend910A has no bfloat16; choose another type or O0"):
        build_precision("O1", None, "bfloat16", CPU)


@CASTS
@pytest.mark.parametrize("flags, name", [
    (("O0", None, "auto"), "O0"),
    (("O1", None, "auto"), "O1, float16, loss scale dynamic"),
    (("O1", "128", "float16"), "O1, float16, loss scale 128"),
    (("O2", None, "bfloat16"), "O2, bfloat16, loss scale none"),
    (("O2", "dynamic", "bfloat16"), "O2, bfloat16, loss scale dynamic"),
])
def test_defaults(device, flags, name):
    assert build_precision(*flags, device=device).name == name


# Whole runs.

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=13, val=4)
    return folder


def run_train(shapes, folder, request, *more):
    return train.main(["--data={}".format(shapes), "--config=yolact_shapes", "--batch_size=2",
                       "--no_autoscale", "--num_workers=0", "--max_iter=6", "--no_log",
                       "--save_interval=3", "--save_folder={}".format(folder),
                       "--amp_dtype=bfloat16", "--loss_scale=dynamic", "--node_device={}".format(
                           request.config.getoption("--device"))] + list(more))


@CASTS
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_resumed_run_is_the_undisturbed_one(shapes, tmp_path, request, capsys, monkeypatch,
                                              level):
    monkeypatch.setattr(amp, "GOOD_STEPS_TO_GROW", 4)  # the counter matters across the checkpoint
    last = tmp_path / "yolact_shapes_1_6"
    assert run_train(shapes, tmp_path, request, "--opt_level=" + level) == 0
    whole = {end: torch.load(str(last) + end) for end in (".pth", ".state")}
    assert all(value.dtype in (torch.float32, torch.int64) for value in whole[".pth"].values())
    assert whole[".state"]["loss_scale"] == {"scale": 2 * FIRST_SCALE, "good_steps": 2}
    for end in whole:
        os.unlink(str(last) + end)
    assert run_train(shapes, tmp_path, request, "--opt_level=" + level, "--resume=latest") == 0
    again = {end: torch.load(str(last) + end) for end in (".pth", ".state")}
    assert "Resumed" in capsys.readouterr().out
    assert all(torch.equal(whole[".pth"][name], again[".pth"][name]) for name in whole[".pth"])
    assert whole[".state"]["loss_scale"] == again[".state"]["loss_scale"]

    other = "O2" if level == "O1" else "O1"
    assert run_train(shapes, tmp_path, request, "--opt_level=" + other, "--resume=latest") == 2
    assert "its precision is {}, bfloat16".format(level) in capsys.readouterr().err


@CASTS
def test_validation_scores_what_is_saved(shapes, tmp_path, request, capsys):
    assert run_train(shapes, tmp_path, request, "--opt_level=O2", "--validation_epoch=1") == 0
    assert "   box |" in capsys.readouterr().out


@CASTS
def test_a_run_whose_losses_are_not_finite_stops_at_any_scale(shapes, tmp_path, request, capsys,
                                                              monkeypatch):
    real = train.shared_step

    def poisoned(network, criterion, *args, **kwargs):
        def spoilt(*more):
            return {name: loss * math.nan for name, loss in criterion(*more).items()}
        return real(network, spoilt, *args, **kwargs)

    monkeypatch.setattr(train, "shared_step", poisoned)
    assert run_train(shapes, tmp_path, request, "--opt_level=O1", "--max_iter=30") == 1
    assert "10 steps in a row up to iteration 10" in capsys.readouterr().err


@CASTS
def test_a_scale_that_is_too_high_finds_its_way(shapes, tmp_path, request, capsys, monkeypatch):
    monkeypatch.setattr(amp, "FIRST_SCALE", amp.HIGHEST_SCALE)
    assert run_train(shapes, tmp_path, request, "--opt_level=O1", "--max_iter=20") == 0
    assert ("iteration 0: gradient overflow at scale 1.70141e+38, the scale is now 8.50706e+37"
            in capsys.readouterr().out)


@CASTS
def test_the_recipes_parameters_are_halved_but_batch_norms():
    from data.config import get_config
    from yolact import build_yolact

    config = get_config("yolact_shapes")
    network = build_yolact(config)
    last = amp.batch_norm_parameters(network)
    flat = build_optimizer(config, network, last=last)
    Precision("O2", CPU, torch.bfloat16).prepare(network, flat)
    kept = {name for name, p in network.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in network.named_parameters() if ".bn" in name
                    or "downsample.1" in name} != set()
    kinds = [p.dtype for p in flat.parameters]
    assert kinds == sorted(kinds, key=lambda kind: kind == torch.float32)
