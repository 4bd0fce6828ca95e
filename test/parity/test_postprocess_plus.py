"""Re-scored masks against the numbers of the original (postprocess.npz, plus_*)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import rounding
from helpers.deterministic import load_deterministic_weights
from layers.detection import Detections
from layers.heads import MaskIouNet
from layers.masks import mask_scores


@pytest.fixture
def recorded(golden):
    return golden("postprocess")


@pytest.fixture
def network(device):
    return load_deterministic_weights(MaskIouNet(81)).to(device)


def _detections(recorded, device, spare=0):
    """The recorded rows, and `spare` rows that are not in use."""
    rows = []
    for key in ("det_box", "det_score", "det_class", "det_mask"):
        array = recorded[key]
        padding = np.zeros((spare,) + array.shape[1:], array.dtype)
        rows.append(torch.from_numpy(np.concatenate((array, padding))).unsqueeze(0).to(device))
    return Detections(*rows, count=torch.tensor([len(recorded["det_box"])]).to(device))


def _proto(recorded, device):
    """Each recorded prototype pixel twice a side: the network needs 63."""
    proto = recorded["proto"].repeat(2, axis=0).repeat(2, axis=1)
    return torch.from_numpy(proto).unsqueeze(0).to(device)


def test_mask_scores(recorded, network, device):
    found = mask_scores(network, _detections(recorded, device, spare=5), _proto(recorded, device))
    assert found.shape == (1, 25)
    np.testing.assert_allclose(found[0, :20].cpu(), recorded["plus_mask_score"],
                               rtol=rounding.network(1e-4), atol=1e-6)
    assert not (found[0, 20:] != 0).any()


def test_box_scores_stay(recorded, network, device):
    detections = _detections(recorded, device)
    mask_scores(network, detections, _proto(recorded, device))
    np.testing.assert_array_equal(detections.scores[0].cpu(), recorded["plus_box_score"])


def test_uncropped_masks_score_otherwise(recorded, network, device):
    arguments = (network, _detections(recorded, device), _proto(recorded, device))
    assert not torch.allclose(mask_scores(*arguments), mask_scores(*arguments, crop=False))


def test_nothing_detected(recorded, network, device):
    empty = Detections(*(torch.zeros_like(field) for field in
                         vars(_detections(recorded, device)).values()))
    assert not (mask_scores(network, empty, _proto(recorded, device)) != 0).any()
