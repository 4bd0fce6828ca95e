"""Four SGD steps of the ResNet-50 network: losses, gradients and parameters of the original."""

from __future__ import annotations

import numpy as np
import torch

from helpers import rounding
from helpers.deterministic import load_deterministic_weights, small_config
from helpers.loss_reference import golden_images, target_batch
from layers.multibox_loss import MultiBoxLoss
from utils.optimizer import FlatSGD
from yolact import build_yolact

LOSS_RTOL = (1e-5, 5e-4, 2e-3, 5e-3)
"""Rounding differences grow with every step through a network of 50 layers."""


def test_four_steps_are_the_originals(golden, device):
    data = golden("train4steps_resnet50_138")
    config = small_config("yolact_resnet50")
    network = load_deterministic_weights(build_yolact(config))
    network.freeze_bn()
    network.to(device).train()
    batch = target_batch(config, golden_images(data)).to(device)
    images = torch.from_numpy(data["in_x"]).to(device)
    criterion = MultiBoxLoss.from_config(config)
    optimizer = FlatSGD([p for p in network.parameters() if p.requires_grad], momentum=0.9,
                        weight_decay=5e-4)
    parameters = dict(network.named_parameters())
    probes = [parameters[str(name)] for name in data["probe"]]
    for step, exact in enumerate(LOSS_RTOL):
        rtol = max(exact, (step + 1) * rounding.network(0))
        losses = criterion(network(images), batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        found = [losses[key].item() for key in "BCMS"] + [total.item()]
        np.testing.assert_allclose(found, data["losses_BCMS_total"][step], rtol=rtol)

        norms = [0.0 if p.grad is None else p.grad.double().norm().item() for p in probes]
        np.testing.assert_allclose(norms, data[f"gradnorm_{step}"], rtol=max(10 * exact, 2 * rtol))
        optimizer.step(1e-3)
        values = [p.detach().double() for p in probes]
        squares = data[f"paramsq_{step}"]
        np.testing.assert_allclose([(v * v).sum().item() for v in values], squares, rtol=rtol)
        # The sums cancel; what they can be compared with is the parameter's norm.
        apart = np.array([v.sum().item() for v in values]) - data[f"paramsum_{step}"]
        assert (np.abs(apart) <= rtol * np.sqrt(squares)).all(), apart
    assert norms[2] == 0 and str(data["probe"][2]) == "backbone.bn1.weight"
