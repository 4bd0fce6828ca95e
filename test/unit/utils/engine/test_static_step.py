"""A training step asks for nothing new after the second, and never waits for a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.config import get_config
from helpers import rounding
from helpers.deterministic import load_deterministic_weights, small_plus_config
from helpers.loss_reference import target_batch
from helpers.recorder import SKIP_REASON, Recorder, available
from layers.multibox_loss import MultiBoxLoss
from train import train_step
from utils import amp
from utils.amp import Precision, build_precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.engine.observer import StepRecords
from utils.optimizer import build_optimizer
from utils.schedule import LearningRate
from yolact import build_yolact

pytestmark = pytest.mark.skipif(not available(), reason=SKIP_REASON)

STEPS, BATCH, SLOTS, SIDE = 12, 4, 64, 64
PLUS_STEPS, PLUS_BATCH = 6, 2
HALF_STEPS = 6
SCALES = ((6,), (12,), (24,), (36,), (48,))


def test_steps_of_resnet50_are_static(device):
    config = get_config("yolact_resnet50", max_size=SIDE, pred_scales=SCALES)
    _train_and_check(config, STEPS, BATCH, device)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_steps_in_half_precision_are_static(device, level):
    """With a dynamic loss scale, which the libraries' scalers read in every step.

    A small network: where a CPU emulates bfloat16, steps of a large one take minutes.
    """
    rounding.skip_where_saturated()
    config = get_config("yolact_shapes", max_size=SIDE)
    _train_and_check(config, HALF_STEPS, BATCH, device,
                     build_precision(level, "dynamic", "bfloat16", device))


def test_steps_of_yolact_plus_are_static(device):
    """Deformable convolution and the mask-IoU network, at the smallest input that has both."""
    config = small_plus_config("yolact_plus_resnet50").replace(masks_to_train=20)
    _train_and_check(config, PLUS_STEPS, PLUS_BATCH, device)


def _train_and_check(config, steps, size, device, precision=None):
    precision = precision or Precision(device=device)
    network = load_deterministic_weights(build_yolact(config)).to(device).train()
    network.freeze_bn()
    criterion = MultiBoxLoss.from_config(config, network.maskiou_net)
    optimizer = build_optimizer(config, network)
    precision.prepare(network, optimizer)
    rate = LearningRate.from_config(config, size)
    sharing = Sharing(Processes(), device)
    recorder, records, counts, skipped = Recorder(), StepRecords(), set(), []
    for iteration in range(steps):
        batch = _batch(config, size, iteration, counts).to(device)
        with recorder.step():
            losses = train_step(network, criterion, optimizer, [batch], rate(iteration), sharing,
                                precision)
            records.add(losses, optimizer.applied, precision.used_scale)
        skipped.append(~optimizer.step_finite)
    assert {0, 60} <= counts and len(counts) > steps / 2
    assert precision.scale is None or float(precision.scale.value) == amp.FIRST_SCALE
    assert int(torch.stack(skipped).sum()) == 0
    assert [step.syncs for step in recorder.steps] == [[]] * steps
    assert [step.async_copies for step in recorder.steps] == [[]] * steps
    assert [step.new_signatures for step in recorder.steps[2:]] == [set()] * (steps - 2)
    assert len({step.total for step in recorder.steps[2:]}) == 1


def _batch(config, size, iteration, counts):
    """Images of 0 to 60 objects with 0 to 3 crowds; every fifth batch holds an empty image."""
    rng = np.random.default_rng(iteration)
    numbers = rng.integers(0, 61, size)
    if iteration % 5 == 0:
        numbers[:2] = 0, 60
    counts.update(int(number) for number in numbers)
    return target_batch(config, [_image(config, int(number), int(rng.integers(0, 4)), rng)
                                 for number in numbers], slots=SLOTS, seed=iteration)


def _image(config, count, crowds, rng):
    low = rng.uniform(0, 0.8, (count + crowds, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.02, 0.2, low.shape)], 1).astype(np.float32)
    pixels = (boxes[:count] * config.max_size).astype(int)
    masks = np.zeros((count, config.max_size, config.max_size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, pixels):
        mask[y1:y2 + 1, x1:x2 + 1] = 1
    return {"boxes": boxes[:count], "labels": rng.integers(1, config.num_classes, count),
            "masks": masks, "crowds": boxes[count:]}


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "np.asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "boolean read": lambda x: x[x > 0],
    "boolean write": lambda x: x.clone().__setitem__(x > 0, x[:1, :1].reshape(())),
    "nonzero": lambda x: x.nonzero(),
    "where of a condition": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "0-d index": lambda x: x[x.argmax() // 10],
    "allclose": lambda x: torch.allclose(x, x),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 2, 1]), 0),
}
FLOWS = {
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "integer index": lambda x: x[torch.tensor([0, 2])],
    "isfinite": lambda x: torch.isfinite(x).all(),
    "one_hot by compare": lambda x: x.argmax(1)[:, None] == torch.arange(4),
}


@pytest.mark.parametrize("name", sorted(WAITS))
def test_the_recorder_sees_the_host_wait(name):
    recorder = Recorder()
    with recorder.step() as step:
        WAITS[name](torch.randn(3, 4))
    assert step.syncs
    assert all("test_static_step.py" in sync for sync in step.syncs)


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_the_recorder_lets_device_work_pass(name):
    recorder = Recorder()
    with recorder.step() as step:
        FLOWS[name](torch.randn(3, 4))
    assert step.syncs == [] and step.total > 0


def test_the_recorder_sees_shapes_and_types_that_vary():
    recorder = Recorder()
    for x in (torch.zeros(3), torch.zeros(3), torch.zeros(4), torch.zeros(3).int()):
        with recorder.step():
            x.add(x)
    assert [len(step.new_signatures) for step in recorder.steps] == [1, 0, 1, 1]


def test_the_recorder_sees_the_backward_pass():
    x = torch.randn(3, 4, requires_grad=True)
    recorder = Recorder()
    loss = (x * x.detach().relu()).sum()
    with recorder.step() as step:
        loss.backward()
    assert step.kernels >= 2 and any("mul" in name for name in step.operators)


def test_the_recorder_tells_views_from_kernels():
    recorder = Recorder()
    with recorder.step() as step:
        torch.zeros(3, 4).view(4, 3).t().unsqueeze(0).add_(1)
    assert (step.total, step.kernels) == (5, 2)
