"""Losses and gradients of YOLACT++ equal to those recorded from the original (loss_plus_*.npz)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from helpers.deterministic import load_deterministic_weights, small_plus_config
from helpers.loss_reference import golden_images, target_batch
from layers.heads import MaskIouNet
from layers.multibox_loss import MultiBoxLoss

KEYS = ("loc", "conf", "mask", "proto", "segm")
LOSSES = ("B", "C", "M", "S", "I")


@pytest.fixture
def setting(golden, device):
    """Golden arrays, predictions, the mask-IoU network and the losses."""
    data = golden("loss_plus_b1_maskiou")
    config = small_plus_config("yolact_plus_resnet50")
    predictions = {key: torch.from_numpy(data["in_" + key]).to(device).requires_grad_()
                   for key in KEYS}
    batch = target_batch(config, golden_images(data, 1)).to(device)
    np.testing.assert_array_equal(batch.class_targets.cpu().numpy(), data["conf_t"])
    network = load_deterministic_weights(MaskIouNet(config.num_classes)).to(device)
    losses = MultiBoxLoss.from_config(config, network)(predictions, batch)
    return data, predictions, network, losses


def _norms(loss, tensors):
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    return [0.0 if grad is None else grad.double().norm().item() for grad in grads]


def test_losses(setting):
    data, _, _, losses = setting
    assert list(losses) == list(LOSSES)
    for key in LOSSES:
        assert_close(losses[key].item(), data["L_" + key])
    assert_close(sum(losses.values()).item(), data["L_total"])


def test_gradients_of_the_total(setting):
    data, predictions, _, losses = setting
    tensors = [predictions[key] for key in KEYS]
    grads = dict(zip(KEYS, torch.autograd.grad(sum(losses.values()), tensors)))
    for key in KEYS:
        norm = grads[key].double().norm().item()
        assert_close(norm, data["gradnorm_" + key])
    for key in ("loc", "mask"):
        _assert_gradient(grads[key].cpu().numpy(), data["grad_" + key])
    for key in ("conf", "proto"):
        sample = grads[key].reshape(-1).cpu().numpy()[data[f"grad_{key}_idx"]]
        _assert_gradient(sample, data[f"grad_{key}_val"])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_each_loss(setting, loss):
    data, predictions, _, losses = setting
    norms = _norms(losses[loss], [predictions[key] for key in KEYS])
    assert_close(norms, data["gradnorms_of_" + loss], atol=1e-12)


def test_gradients_of_the_mask_iou_network(setting):
    data, _, network, losses = setting
    parameters = dict(network.named_parameters())
    assert list(parameters) == data["maskiou_param_names"].tolist()
    np.testing.assert_allclose(_norms(losses["I"], list(parameters.values())),
                               data["maskiou_param_gradnorms"], rtol=rounding.network(1e-5))


def _assert_gradient(found, expected):
    np.testing.assert_allclose(found, expected, rtol=rounding.network(1e-4),
                               atol=rounding.network(1e-6) * np.abs(expected).max())


def assert_close(found, expected, atol=0):
    np.testing.assert_allclose(found, expected, rtol=rounding.network(1e-5), atol=atol)
