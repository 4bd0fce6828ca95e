"""PyTorch 1.5 and 1.8, where a library casts: what is cast and when, frozen weights, whole runs."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.casting_library import Real, library  # noqa: F401 - a fixture
from layers.fused_ops import without_casts
from train import train_step
from unit.utils.engine.test_amp_runs import run_train
from unit.utils.test_amp import Criterion, Part, Stub
from utils import amp
from utils import device as devices
from utils.amp import LossScale, Precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.optimizer import FlatSGD

FINE = 1.0001
"""Becomes 1 in half precision."""


def casts(device):
    """Whether functions cast now."""
    if devices.saturates(device):
        pytest.skip("the first Ascend 910 multiplies in half precision whether or not they cast")
    with torch.no_grad():
        found = F.linear(torch.full((1, 1), FINE, device=device), torch.ones(1, 1, device=device))
    return float(found) == 1.0


class Watching(Stub):
    """Notes in its forward and backward pass whether functions cast."""

    def __init__(self):
        super().__init__()
        # The real library fails on a CPU's weight that two functions see, as a bias is on 1.5.
        self.layer = nn.Linear(4, 3, bias=False)
        self.forward_casts, self.backward_casts = [], []

    def forward(self, images):
        found = super().forward(images)
        self.forward_casts.append(casts(images.device))
        found["out"].register_hook(
            lambda gradient: self.backward_casts.append(casts(gradient.device)))
        return found


class WatchingCriterion(Criterion):
    def __init__(self):
        super().__init__()
        self.casts = []

    def forward(self, predictions, part, num_positives):
        self.casts.append(casts(predictions["out"].device))
        return super().forward(predictions, part, num_positives)


def make(device, level, library):  # noqa: F811
    torch.manual_seed(0)
    network = Watching().to(device)
    behind = {id(p) for p in amp.batch_norm_parameters(network)}
    optimizer = FlatSGD(sorted(network.parameters(), key=lambda p: id(p) in behind), momentum=0.9,
                        weight_decay=0.01)
    precision = Precision(level, device, torch.float16, level != "O0" and LossScale(device, 1024)
                          or None, library)
    precision.prepare(network, optimizer)
    return network, optimizer, precision


def step(network, optimizer, precision, criterion=None, parts=1, seed=0):
    device = optimizer.flat.device
    batches = [Part(device, seed + number) for number in range(parts)]
    losses = train_step(network, criterion or Criterion(), optimizer, batches, 0.1,
                        Sharing(Processes(), device, parts), precision)
    return float(losses["B"])


@pytest.mark.parametrize("parts", [1, 2])
def test_casts_in_the_forward_pass_and_nowhere_else(device, library, parts):  # noqa: F811
    made, criterion = make(device, "O1", library), WatchingCriterion()
    assert not casts(device)
    for _ in range(2):
        step(*made, criterion=criterion, parts=parts)
        assert not casts(device)
    with made[2].float32_weights(made[0]):
        assert not casts(device)
    assert not casts(device)
    assert made[0].forward_casts == [library.casts] * 2 * parts
    assert made[0].backward_casts == criterion.casts == [False] * 2 * parts
    assert library.calls == [("initialize", "O1", 1.0)] + ["drop copies"] * 2 * parts
    assert library._amp_state.handle.cache == {}


def test_an_error_in_the_forward_pass_ends_casts(device, library):  # noqa: F811
    _, _, precision = make(device, "O1", library)
    with pytest.raises(RuntimeError):
        with precision.forward():
            raise RuntimeError("out of memory")
    assert not casts(device)


@pytest.mark.parametrize("parts", [1, 2])
def test_every_forward_sees_the_new_weights(device, library, parts):  # noqa: F811
    """Without `scale_loss` the second step would use the copies of the first."""
    made, plain = make(device, "O1", library), make(device, "O0", None)
    for network in (made[0], plain[0]):
        network.norm = nn.Identity()  # behind which the scale of weights would not show
    found = [step(*made, parts=parts) for _ in range(4)]
    assert len({round(value, 3) for value in found}) == 4
    assert found == pytest.approx([step(*plain, parts=parts) for _ in range(4)], rel=0.02)


def test_trial_steps_before_the_training_leave_nothing_behind(device, library):  # noqa: F811
    """As --batch_size=auto makes them; the library patches the patched functions then."""
    step(*make(device, "O1", library))
    made, criterion, plain = make(device, "O1", library), WatchingCriterion(), make(
        device, "O0", None)
    found = [step(*made, criterion=criterion) for _ in range(3)]
    assert made[0].forward_casts == [library.casts] * 3 and criterion.casts == [False] * 3
    assert found == pytest.approx([step(*plain) for _ in range(3)], rel=0.02)
    assert not casts(device)


def test_deformable_convolution_is_not_cast(device, library):  # noqa: F811
    _, _, precision = make(device, "O1", library)
    with precision.forward():
        with without_casts(device):
            assert not casts(device)
        assert casts(device) == library.casts
    with without_casts(device):
        assert not casts(device)
    assert not casts(device)


def test_frozen_parameters_keep_their_float32_values(device, library):  # noqa: F811
    torch.manual_seed(0)
    network = Stub().to(device)
    network.layer.weight.requires_grad_(False)
    values = network.layer.weight.detach().clone()
    optimizer = FlatSGD([p for p in network.parameters() if p.requires_grad])
    precision = Precision("O2", device, torch.float16, library=library)
    precision.prepare(network, optimizer)
    assert network.layer.weight.dtype == network.layer.bias.dtype == torch.float16
    assert network.norm.weight.dtype == torch.float32
    with precision.float32_weights(network):
        found = network.state_dict()
        assert torch.equal(found["layer.weight"], values)
        assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    assert torch.equal(network.layer.weight.detach().float(), values.half().float())


# Whole runs.

@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_resumed_run_is_the_undisturbed_one(shapes, tmp_path, request, capsys,
                                              monkeypatch, device, library, level):  # noqa: F811
    if device.type == "cpu" and (level == "O2" or not library.casts):
        pytest.skip("half precision is refused on the CPU of PyTorch 1.x")
    if device.type == "cpu":
        monkeypatch.setattr(amp, "half_type_problem", lambda device, dtype: "")
    ends = {}
    for way in ("library", "own") if devices.has_autocast() and library.casts else ("library",):
        with monkeypatch.context() as patch:
            if way == "library":
                patch.setattr(amp, "has_autocast", lambda: False)
                patch.setattr(amp, "casting_library", lambda device: library)
            folder = tmp_path / way
            flags = ["--opt_level=" + level, "--amp_dtype=auto", "--validation_epoch=1"]
            assert run_train(shapes, folder, request, *flags) == 0
            last = folder / "yolact_shapes_1_6"
            ends[way] = torch.load(str(last) + ".pth")
            for end in (".pth", ".state"):
                os.unlink(str(last) + end)
            assert run_train(shapes, folder, request, *flags, "--resume=latest") == 0
            assert "Resumed" in capsys.readouterr().out
            again = torch.load(str(last) + ".pth")
        assert all(torch.equal(ends[way][name], again[name]) for name in again)
    assert all(bool(torch.isfinite(value.float()).all()) for value in again.values())
    if isinstance(library, Real) and len(ends) == 2:
        assert all(torch.equal(ends["library"][name], ends["own"][name]) for name in again)
