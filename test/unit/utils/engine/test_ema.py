"""The moving average of the weights: its formula, steps that do not count, and no host read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from data.config import get_config
from helpers.loss_reference import target_batch
from helpers.recorder import SKIP_REASON, Recorder, available
from layers.multibox_loss import MultiBoxLoss
from train import train_step
from utils.amp import Precision
from utils.device import saturates
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.engine.learner import AVERAGE_RAMP, WeightAverage
from utils.engine.observer import StepRecords
from utils.errors import UserError
from utils.optimizer import FlatSGD, build_optimizer
from yolact import build_yolact

DECAY = 0.9


def small(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).to(device)
    optimizer = FlatSGD(model.parameters(), momentum=0.9)
    return model, optimizer, WeightAverage(model, optimizer, DECAY)


def train(model, optimizer, average, device, bad=False):
    optimizer.zero_grad()
    images = torch.randn(2, 3, 6, 6).to(device)
    if bad:
        images = images * float("nan")
    model(images).pow(2).sum().backward()
    # A card without NaN has a register that tells.
    told = torch.ones((), device=device) if bad and saturates(device) else None
    optimizer.step(0.01, overflow=told)
    average.update()


def values(state_dict):
    return {name: value.cpu().numpy().copy() for name, value in state_dict.items()
            if name != "1.num_batches_tracked"}


def test_it_follows_the_formula_and_leaves_out_steps_that_were_not_applied(device):
    model, optimizer, average = small(device)
    expected = {name: value.astype(np.float64)
                for name, value in values(model.state_dict()).items()}
    applied = AVERAGE_RAMP
    optimizer.steps.fill_(applied)
    for step in range(8):
        before = values(average.apply_to(model.state_dict()))
        train(model, optimizer, average, device, bad=step in (2, 3))
        after = values(average.apply_to(model.state_dict()))
        if step in (2, 3):
            # The network's own statistics are, unless the card has no such number.
            assert math.isnan(float(model[1].running_mean[0])) or saturates(device)
            for name, value in before.items():
                np.testing.assert_array_equal(value, after[name])
            model[1].reset_running_stats()
            continue
        applied += 1
        decay = DECAY * (1 - math.exp(-applied / AVERAGE_RAMP))
        for name, value in values(model.state_dict()).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
            np.testing.assert_allclose(after[name], expected[name], rtol=2e-5, atol=1e-7)


def test_the_decay_approaches_its_final_value(device):
    model, optimizer, average = small(device)
    optimizer.steps.fill_(20 * AVERAGE_RAMP)
    before = values(average.apply_to(model.state_dict()))["0.weight"]
    with torch.no_grad():
        optimizer.flat.add_(1.0)
    average.update()
    moved = values(average.apply_to(model.state_dict()))["0.weight"] - before
    np.testing.assert_allclose(moved, 1 - DECAY, rtol=1e-4)


def test_the_network_has_the_averages_inside_the_block_only(device):
    model, optimizer, average = small(device)
    for _ in range(3):
        train(model, optimizer, average, device)
    raw, averaged = values(model.state_dict()), values(average.apply_to(model.state_dict()))
    assert not np.array_equal(raw["0.weight"], averaged["0.weight"])
    with pytest.raises(KeyboardInterrupt):
        with average.in_place_of_weights():
            for name, value in values(model.state_dict()).items():
                np.testing.assert_array_equal(value, averaged[name])
            raise KeyboardInterrupt
    for name, value in values(model.state_dict()).items():
        np.testing.assert_array_equal(value, raw[name])
    train(model, optimizer, average, device)  # parameters still live in the flat buffer


def test_frozen_batch_norm_has_no_average(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()).to(device)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    optimizer = FlatSGD([p for p in model.parameters() if p.requires_grad])
    average = WeightAverage(model, optimizer, DECAY)
    found = average.apply_to({name: name for name in model.state_dict()})
    assert [name for name, value in found.items() if isinstance(value, str)] == [
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_saved_averages_come_back(device):
    model, optimizer, average = small(device)
    for _ in range(3):
        train(model, optimizer, average, device)
    saved = {name: value.clone() for name, value in average.apply_to(model.state_dict()).items()}
    train(model, optimizer, average, device)
    average.load(saved)
    for name, value in average.apply_to(model.state_dict()).items():
        if name != "1.num_batches_tracked":
            assert torch.equal(value.cpu(), saved[name].cpu())
    average.restart()
    for name, value in average.apply_to(model.state_dict()).items():
        assert torch.equal(value.cpu(), model.state_dict()[name].cpu())
    del saved["0.weight"]
    with pytest.raises(UserError, match=r"no average of '0.weight'"):
        average.load(saved)


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_steps_with_all_training_options_are_static_and_never_wait(device):
    """EMA, clipping, class weights and a frozen stage: nothing new after the second step."""
    config = get_config("yolact_shapes", max_size=64, masks_to_train=20, clip_grad_norm=1.0)
    torch.manual_seed(0)
    network = build_yolact(config).to(device)
    network.freeze_backbone(1)
    network.train()
    criterion = MultiBoxLoss.from_config(config, class_factors=[1.0, 2.0, 0.5, 1.0, 1.0]).to(device)
    optimizer = build_optimizer(config, network)
    average = WeightAverage(network, optimizer, 0.999)
    sharing, recorder, records = Sharing(Processes(), device), Recorder(), StepRecords()
    rng = np.random.default_rng(0)
    for step in range(6):
        batch = target_batch(config, [_image(config, count, rng) for count in (step, 5 - step)],
                             slots=8, seed=step).to(device)
        with recorder.step():
            losses = train_step(network, criterion, optimizer, [batch], 1e-3, sharing,
                                Precision())
            average.update()
            records.add(losses, optimizer.applied)
    assert [step.syncs for step in recorder.steps] == [[]] * 6
    assert [step.new_signatures for step in recorder.steps[2:]] == [set()] * 4
    assert len({step.total for step in recorder.steps[2:]}) == 1


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_an_update_is_a_dozen_operators(device):
    model, optimizer, average = small(device)
    train(model, optimizer, average, device)
    recorder = Recorder()
    with recorder.step() as step:
        average.update()
    assert step.syncs == [] and step.total <= 14, step.operators


def _image(config, count, rng):
    low = rng.uniform(0, 0.6, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], 1).astype(np.float32)
    masks = np.zeros((count, config.max_size, config.max_size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, (boxes * config.max_size).astype(int)):
        mask[y1:y2 + 1, x1:x2 + 1] = 1
    return {"boxes": boxes, "labels": rng.integers(1, config.num_classes, count), "masks": masks,
            "crowds": np.zeros((0, 4), np.float32)}
