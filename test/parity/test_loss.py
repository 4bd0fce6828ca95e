"""Losses and gradients equal to those recorded from the original YOLACT."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.config import get_config
from helpers import rounding
from helpers.deterministic import small_config
from helpers.loss_reference import golden_images, make_batch, target_batch
from layers.multibox_loss import MultiBoxLoss

FILES = ("loss_base_b2", "loss_base_b2_crowd")
KEYS = ("loc", "conf", "mask", "proto", "segm")


def _predictions(data, device):
    return {key: torch.from_numpy(data["in_" + key]).to(device).requires_grad_() for key in KEYS}


def _batch(data, device):
    batch = make_batch(golden_images(data), data["in_priors"], num_classes=81, proto_size=36,
                       semantic_size=18, samples=int(data["masks_to_train"]), slots=8)
    for key, value in vars(batch).items():
        setattr(batch, key, value.to(device))
    return batch


def _gradients(total, predictions):
    tensors = [predictions[key] for key in KEYS]
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    return {key: torch.zeros_like(tensor) if grad is None else grad
            for key, tensor, grad in zip(KEYS, tensors, grads)}


@pytest.mark.parametrize("name", FILES)
def test_losses_and_gradients_are_the_originals(golden, device, name):
    data = golden(name)
    batch, predictions = _batch(data, device), _predictions(data, device)
    np.testing.assert_array_equal(batch.class_targets.cpu().numpy(), data["conf_t"])
    losses = MultiBoxLoss.from_config(get_config("yolact_base"))(predictions, batch)
    for key in "BCMS":
        assert_close(losses[key].item(), data["L_" + key])
    total = sum(losses.values())
    assert_close(total.item(), data["L_total"])

    grads = _gradients(total, predictions)
    for key in KEYS:
        norm = grads[key].double().norm().item()
        assert_close(norm, data["gradnorm_" + key])
    for key in ("loc", "mask"):
        _assert_gradient(grads[key].cpu().numpy(), data["grad_" + key])
    for key in ("conf", "proto"):
        sample = grads[key].reshape(-1).cpu().numpy()[data[f"grad_{key}_idx"]]
        _assert_gradient(sample, data[f"grad_{key}_val"])


@pytest.mark.parametrize("name", FILES)
def test_losses_through_the_packages_own_targets_are_the_originals(golden, device, name):
    data = golden(name)
    config = small_config("yolact_base")
    batch = target_batch(config, golden_images(data), slots=48).to(device)
    losses = MultiBoxLoss.from_config(config)(_predictions(data, device), batch)
    found = [losses[key].item() for key in "BCMS"]
    assert_close(found, [data["L_" + key] for key in "BCMS"])


@pytest.mark.parametrize("name", FILES)
def test_each_loss_reaches_only_its_own_predictions(golden, device, name):
    data = golden(name)
    batch, predictions = _batch(data, device), _predictions(data, device)
    losses = MultiBoxLoss.from_config(get_config("yolact_base"))(predictions, batch)
    for key, loss in losses.items():
        grads = _gradients(loss, predictions)
        norms = [grads[name].double().norm().item() for name in KEYS]
        assert_close(norms, data["gradnorms_of_" + key], atol=1e-12)


def _assert_gradient(found, expected):
    np.testing.assert_allclose(found, expected, rtol=rounding.product(1e-4),
                               atol=rounding.product(1e-6) * np.abs(expected).max())


def assert_close(found, expected, atol=0):
    np.testing.assert_allclose(found, expected, rtol=rounding.product(1e-5), atol=atol)
