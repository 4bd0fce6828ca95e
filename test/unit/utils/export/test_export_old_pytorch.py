"""What PyTorch 1.8 and 1.5 export, and the sentence for what they do not."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from helpers.exports import export
from helpers.prediction_weights import noise, save_plus_weights, save_weights
from utils.errors import UserError
from utils.export.check import example_images
from utils.export.folder import Plan, write_models
from utils.inference import Predictor
from utils.inference.detector import load_model

IS_OLD = int(torch.__version__.split(".")[0]) < 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("plan, version, need, newer", [
    (Plan(form="detections"), "1.8.1", "--outputs=detections", "2.0"),
    (Plan(half=True), "1.8.1", "--half", "2.0"),
    (Plan(batches=(None,)), "1.5.0", "--batch_size=dynamic", "1.8"),
    (Plan(for_atc=True), "1.8.1", "a deformable convolution", "2.0"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_an_old_pytorch_cannot_write_is_a_sentence(plan, version, need, newer, weights,
                                                        tmp_path, monkeypatch):
    if IS_OLD:
        if need == "--batch_size=dynamic" and not torch.__version__.startswith("1.5"):
            pytest.skip("this one can")
    else:
        monkeypatch.setattr(torch, "__version__", version)
    if need == "a deformable convolution":
        weights = save_plus_weights(tmp_path / "weights")
    loaded = load_model(weights)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError) as caught:
        write_models(loaded, loaded.model, plan, str(out), example_images(64, 1))
    assert str(caught.value) == (
        f"PyTorch {torch.__version__} cannot write {need}; export where PyTorch {newer} or newer "
        "is installed: it reads the same weights")
    assert os.listdir(str(out)) == []


@pytest.mark.skipif(not IS_OLD, reason="the other tests of exports say it")
@pytest.mark.parametrize("flags", [[], ["--input=uint8", "--batch_size=1,2"], ["--format=om"]],
                         ids=" ".join)
def test_raw_is_the_same_network(flags, weights, tmp_path):
    folder = export(weights, tmp_path / "out", *flags)
    one, other = (Predictor(source, device="cpu")(noise()) for source in (folder, weights))
    assert len(one) == len(other) > 0
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
