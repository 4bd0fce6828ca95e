"""Weights files of other networks, given for one of ours."""

from __future__ import annotations

import pytest
import torch

from utils.errors import UserError
from utils.inference import Predictor


@pytest.mark.parametrize("tensors, words", [
    ({"model.0.conv.weight": (8, 3, 3, 3)}, "holds no YOLACT that is known (first tensors: 0.conv"),
    ({"conv1.weight": (64, 3, 7, 7), "layer1.0.conv1.weight": (64, 64, 1, 1),
      "layer1.0.conv3.weight": (256, 64, 1, 1)}, "alone, expected weights of a whole network"),
    ({"semantic_seg_conv.weight": (4, 64, 1, 1), "backbone.conv1.weight": (64, 3, 7, 7),
      "backbone.layers.0.0.conv1.weight": (64, 64, 3, 3),
      "prediction_layers.0.conf_layer.weight": (15, 64, 3, 3)}, "does not say which configuration"),
])
def test_weights_of_something_else_are_said_to_be(tmp_path, tensors, words):
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()},
               str(tmp_path / "x.pth"))
    with pytest.raises(UserError) as refusal:
        Predictor(str(tmp_path / "x.pth"), device="cpu")
    assert words in str(refusal.value)
