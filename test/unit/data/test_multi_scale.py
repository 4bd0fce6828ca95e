"""Several input sides in turn: which, the same after a resume, and a bounded set of shapes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import train
from data import config_file
from data.config import get_config
from data.loader import TrainDataset
from data.shapes import write_dataset
from helpers.loss_reference import target_batch
from helpers.recorder import SKIP_REASON, Recorder, available
from layers.anchors import make_priors
from layers.multibox_loss import MultiBoxLoss
from train import train_step
from utils.amp import Precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.errors import UserError
from utils.optimizer import build_optimizer
from yolact import build_yolact

SMALL = dict(max_size=64, pred_scales=((8, 12), (17, 24), (34, 44)), masks_to_train=10)
SIDES = (64, 80, 96)


def sides_in_turn(interval, seed):
    return TrainDataset([], dict.fromkeys(SIDES), seed, interval).side_of


def test_a_side_is_kept_for_an_interval_and_all_come():
    side_of = sides_in_turn(5, seed=3)
    sides = [side_of(iteration) for iteration in range(200)]
    assert set(sides) == set(SIDES)
    assert all(len(set(sides[n:n + 5])) == 1 for n in range(0, 200, 5))
    assert sides == [sides_in_turn(5, seed=3)(n) for n in range(200)]
    assert sides != [sides_in_turn(5, seed=4)(n) for n in range(200)]


def test_the_network_takes_its_sides_and_no_other(device):
    config = get_config("yolact_shapes", multi_scale=(80, 96), **SMALL)
    network = build_yolact(config).to(device).eval()
    with torch.no_grad():
        for side in (64, 80, 96):
            found = network(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
            expected = make_priors(config.at_side(side))
            assert torch.equal(found["priors"].cpu(), expected)
            assert found["loc"].shape[1] == len(expected)
    with pytest.raises(ValueError, match="64, 64"):
        network(torch.zeros(1, 3, 72, 72, dtype=torch.uint8, device=device))


def test_anchors_keep_their_size_in_pixels():
    config = get_config("yolact_shapes", **SMALL)
    small, large = (make_priors(config.at_side(side))[0, 2:] * side for side in (64, 96))
    np.testing.assert_allclose(small.numpy(), large.numpy(), rtol=1e-5)


@pytest.mark.parametrize("sides, expected", [((64, 64), "different"), ((32,), "at least 64")])
def test_sides_are_checked(sides, expected):
    with pytest.raises(UserError, match=expected):
        get_config("yolact_shapes", multi_scale=sides)
    with pytest.raises(UserError, match="at least 249"):
        get_config("yolact_plus_base", multi_scale=(200,))


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
def test_each_side_brings_its_shapes_once(device):
    config = get_config("yolact_shapes", multi_scale=(80,), **SMALL)
    torch.manual_seed(0)
    network = build_yolact(config).to(device).train()
    criterion = MultiBoxLoss.from_config(config)
    optimizer = build_optimizer(config, network)
    sharing, recorder = Sharing(Processes(), device), Recorder()
    empty = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64),
             "crowds": np.zeros((0, 4), np.float32)}
    for step, side in enumerate((64, 64, 80, 80, 64, 80, 64, 80)):
        image = dict(empty, masks=np.zeros((0, side, side), np.uint8))
        batch = target_batch(config.at_side(side), [image, image], slots=8, seed=step).to(device)
        with recorder.step():
            train_step(network, criterion, optimizer, [batch], 1e-3, sharing, Precision())
    assert [bool(step.new_signatures) for step in recorder.steps[2:]] == [
        True, False, False, False, False, False]
    assert [step.syncs for step in recorder.steps] == [[]] * 8


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path, monkeypatch, request, workers):
    monkeypatch.setattr(config_file, "get_config", lambda name: get_config(name).replace(**SMALL))
    sides, forward = [], MultiBoxLoss.forward

    def seen(self, predictions, batch, *args, **kwargs):
        sides.append(batch.images.shape[-1])
        return forward(self, predictions, batch, *args, **kwargs)

    monkeypatch.setattr(MultiBoxLoss, "forward", seen)
    write_dataset(str(tmp_path / "data"), seed=3, train=8, val=2)
    flags = ["--data={}".format(tmp_path / "data"), "--config=yolact_shapes", "--batch_size=2",
             "--no_autoscale", f"--num_workers={workers}", "--max_iter=12", "--no_log",
             "--no_run_folder", "--save_folder={}".format(tmp_path / "weights"),
             "--save_interval=5", "--multi_scale=64,80,96", "--multi_scale_interval=2",
             "--node_device={}".format(request.config.getoption("--device"))]
    assert train.main(flags) == 0
    side_of = sides_in_turn(2, seed=0)
    assert sides == [side_of(iteration) for iteration in range(12)] and len(set(sides)) > 1
    final = str(tmp_path / "weights" / "yolact_shapes_3_12.pth")
    whole = torch.load(final)
    for name in ("yolact_shapes_2_10.pth", "yolact_shapes_3_12.pth"):
        os.unlink(str(tmp_path / "weights" / name))
    assert train.main(flags + ["--resume=latest"]) == 0
    assert sides[12:] == sides[5:12]
    resumed = torch.load(final)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_largest_side_is_known():
    config = get_config("yolact_shapes", multi_scale=(128, 192))
    assert config.at_largest_side().max_size == 192
    assert get_config("yolact_shapes").at_largest_side().max_size == 160
