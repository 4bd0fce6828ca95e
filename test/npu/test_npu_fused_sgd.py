"""The plugin's fused SGD on the flat buffer: equal to ours, skips, resumes, at O2 as well."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import train
from data.shapes import write_dataset
from layers import fused_ops, kernel_trials
from layers.fused_ops import npu_fused_sgd, npu_fused_sgd_problem
from utils.fused_optimizer import FusedSGD
from utils.optimizer import FlatSGD

FUSED = functools.partial(FusedSGD, kernel=npu_fused_sgd)


@pytest.fixture(autouse=True)
def only_on_an_npu(device):
    if device.type != "npu":
        pytest.skip("runs with --device npu")


def make(device, sgd, **more):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 7))
    network.to(device)
    return network, sgd(network.parameters(), momentum=0.9, weight_decay=0.01, **more)


def take_step(network, optimizer, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()  # to None
    for number, parameter in enumerate(network.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        if number == 1 and value is not None:
            gradient[0] = value
        if number != 3:  # one that never has a gradient
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
    optimizer.step(0.1 / (seed + 1))


def test_the_trial_passes(device):
    assert npu_fused_sgd_problem(device) == ""


def test_the_trial_sees_a_wrong_result(device, monkeypatch):
    monkeypatch.setattr(fused_ops, "npu_fused_sgd", lambda parameters, lr, **more: npu_fused_sgd(
        parameters, lr=1.01 * lr, **more))
    assert "deviates" in kernel_trials.try_fused_sgd(device)
    monkeypatch.setattr(fused_ops, "npu_fused_sgd", None)
    assert "failed its trial" in kernel_trials.try_fused_sgd(device)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_equal_the_flat_ones(device, clip):
    (ours, flat), (theirs, fused) = (make(device, sgd, clip_norm=clip) for sgd in (FlatSGD, FUSED))
    identities = list(theirs.parameters())
    for step in range(5):
        value = float("nan") if step in (0, 3) else None
        before = fused.flat.clone()
        take_step(ours, flat, step, value)
        take_step(theirs, fused, step, value)
        assert bool(fused.step_finite) == (value is None) == (not torch.equal(before, fused.flat))
    assert int(fused.steps) == 3
    assert torch.allclose(fused.flat, flat.flat, rtol=1e-6, atol=1e-7)
    assert all(a is b for a, b in zip(theirs.parameters(), identities))
    for parameter, (_, values) in zip(theirs.parameters(), fused.masters()):
        assert parameter.data_ptr() == values.data_ptr()


def test_state_goes_on_exactly(device):
    network, fused = make(device, FUSED)
    for step in range(2):
        take_step(network, fused, step)
    other, resumed = make(device, FUSED)
    other.load_state_dict(network.state_dict())
    resumed.load_state_dict(fused.state_dict())
    for one, optimizer in ((network, fused), (other, resumed)):
        take_step(one, optimizer, 2)
    assert torch.equal(fused.flat, resumed.flat)
    resumed.load_state_dict(fused.state_dict())  # after its first step, too
    for one, optimizer in ((network, fused), (other, resumed)):
        take_step(one, optimizer, 3)
    assert torch.equal(fused.flat, resumed.flat)


def test_half_parameters_follow(device):
    network, fused = make(device, FUSED)
    fused.halve(network[3].parameters(), torch.float16)
    take_step(network, fused, 0)
    masters = {id(p): values for p, values in fused.masters()}
    assert torch.equal(network[3].weight.detach(), masters[id(network[3].weight)].half())


@pytest.mark.launch
def test_a_run_with_it(device, tmp_path, capsys):
    write_dataset(str(tmp_path / "data"), seed=3, train=13, val=4)
    flags = ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--batch_size=2",
             "--no_autoscale", "--num_workers=0", "--max_iter=2", "--no_log", "--fused_optimizer",
             "--save_folder={}".format(tmp_path / "weights"), "--node_device=npu"]
    assert train.main(flags) == 2
    assert "but the recipe's optimiser is adamw; leave it out" in capsys.readouterr().err
