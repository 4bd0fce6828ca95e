"""YOLACT++ trains: the losses fall, the loop shows and saves it, evaluation takes the result."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import config_file
from data.shapes import write_dataset
from helpers.deterministic import small_plus_config
from helpers.loss_reference import target_batch
from layers.deform_conv import DeformConv2d
from layers.multibox_loss import MultiBoxLoss
from train import train_step
from utils.amp import Precision
from utils.distributed.processes import Processes
from utils.distributed.sharing import Sharing
from utils.optimizer import build_optimizer
from yolact import build_yolact

NAME = "yolact_plus_resnet50"


def test_the_losses_of_a_batch_fall(device):
    config = small_plus_config(NAME).replace(num_classes=4, masks_to_train=20)
    masks = np.zeros((2, 256, 256), np.uint8)
    masks[0, 40:200, 30:120], masks[1, 100:240, 130:250] = 1, 1
    image = {"boxes": np.array([[30, 40, 120, 200], [130, 100, 250, 240]]) / 256.0,
             "labels": [1, 3], "masks": masks}
    batch = target_batch(config, [image]).to(device)
    torch.manual_seed(0)
    network = build_yolact(config).to(device)
    network.freeze_bn()
    criterion = MultiBoxLoss.from_config(config, network.maskiou_net)
    optimizer = build_optimizer(config, network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sharing = Sharing(Processes(), device)
    history = [train_step(network, criterion, optimizer, [batch], 1e-3, sharing, Precision())
               for _ in range(5)]
    totals = [sum(losses.values()).item() for losses in history]
    # I alone may rise: it starts near 0, since no mask is right and none is thought to be.
    assert totals[-1] < 0.7 * totals[0]
    assert all(torch.isfinite(losses["I"]) for losses in history)
    assert bool(optimizer.step_finite)
    after = network.state_dict()
    offsets = [f"{name}.conv_offset_mask.weight" for name, module
               in network.named_modules() if isinstance(module, DeformConv2d)]
    assert len(offsets) == 13
    for name in offsets + ["maskiou_net.maskiou_net.0.weight"]:
        assert not torch.equal(after[name], before[name]), name


@pytest.fixture
def smaller(monkeypatch):
    """The recipe at 256 px, for both commands."""
    def get_config(name, **changes):
        return small_plus_config(name[:-len("_config")]).replace(**changes)

    monkeypatch.setattr(config_file, "get_config", get_config)


def test_train_and_evaluate_from_the_command_line(smaller, tmp_path, capsys, request):
    data, weights = str(tmp_path / "data"), str(tmp_path / "weights")
    write_dataset(data, seed=3, train=4, val=2)
    device = request.config.getoption("--device")
    assert train.main(["--data=" + data, "--config=" + NAME + "_config", "--batch_size=2",
                       "--no_autoscale", "--num_workers=0", "--max_iter=2", "--no_log",
                       "--backbone_weights=none", "--save_folder=" + weights,
                       "--node_device=" + device]) == 0
    out = capsys.readouterr().out
    assert re.search(r"B: [\d.]+ \| C: [\d.]+ \| M: [\d.]+ \| S: [\d.]+ \| I: [\d.]+ \| T: ", out)

    boxes, masks = str(tmp_path / "box.json"), str(tmp_path / "mask.json")
    assert evaluation.main([f"--trained_model={weights}/{NAME}_1_2.pth",
                            "--val_data=" + data, "--eval_device=" + device, "--num_workers=0",
                            "--no_bar", "--output_coco_json", "--bbox_det_file=" + boxes,
                            "--mask_det_file=" + masks]) == 0
    results = []
    for path in (boxes, masks):
        with open(path) as stream:
            results.append(json.load(stream))
    pairs = [(box["score"], mask["score"]) for box, mask in zip(*results)]
    assert len(results[0]) == len(results[1]) > 0
    assert any(box != mask for box, mask in pairs)
