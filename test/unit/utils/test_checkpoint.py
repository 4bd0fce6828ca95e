"""Checkpoint files: names, whole pairs, what a wrong file says."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import CheckpointName
from utils.errors import UserError
from utils.weights_folder import list_checkpoints


def write(folder, iteration, interrupt=False, config="yolact_base", **state):
    name = CheckpointName(config, iteration // 100, iteration, interrupt)
    full = dict({"config": {"name": config}, "class_names": ["cat", "dog"]}, **state)
    return checkpoint.save_checkpoint(name.path(str(folder)), {"w": torch.ones(2)}, full)


def test_name_as_the_original_writes_it(tmp_path):
    path = write(tmp_path, 800000)
    assert os.path.basename(path) == "yolact_base_8000_800000.pth"
    assert CheckpointName.parse(path) == CheckpointName("yolact_base", 8000, 800000)
    interrupted = CheckpointName.parse("w/yolact_im700_1_20_interrupt.pth")
    assert interrupted == CheckpointName("yolact_im700", 1, 20, True)
    assert CheckpointName.parse("weights/resnet101_reducedfc.pth") is None


def test_plain_weights_are_a_plain_state_dict(tmp_path):
    flat = torch.arange(1000.0)
    name = CheckpointName("yolact_base", 0, 1)
    path = checkpoint.save_checkpoint(name.path(str(tmp_path)), {"w": flat[:2]}, {})
    loaded = torch.load(path)
    assert list(loaded) == ["w"] and loaded["w"].tolist() == [0.0, 1.0]
    # A view saved as it is would carry the whole buffer it looks into.
    assert os.path.getsize(path) < 3000


def test_inference_reads_config_and_names_from_the_state(tmp_path):
    path = write(tmp_path, 100)
    stored = checkpoint.load_for_inference(path)
    assert stored.class_names == ["cat", "dog"] and stored.config["name"] == "yolact_base"
    os.unlink(checkpoint.state_path(path))
    plain = checkpoint.load_for_inference(path)
    assert plain.config is None and plain.class_names is None
    assert checkpoint.recipe_of(path) == "yolact_base"


def test_state_of_another_format(tmp_path):
    path = write(tmp_path, 100)
    torch.save({"format": 999}, checkpoint.state_path(path))
    with pytest.raises(UserError, match="state format 999"):
        checkpoint.load_state(path)


def test_failed_write_leaves_no_weights_without_state(tmp_path, monkeypatch):
    real_replace = os.replace

    def fail_on_weights(source, target):
        if target.endswith(".pth"):
            raise OSError(28, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_weights)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path, 100)
    assert os.listdir(str(tmp_path)) == ["yolact_base_1_100.state"]
    assert list_checkpoints(str(tmp_path)) == []


def test_rng_state_round_trip(tmp_path):
    torch.save(checkpoint.rng_state(), str(tmp_path / "rng"))
    import random

    import numpy as np

    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    checkpoint.set_rng_state(torch.load(str(tmp_path / "rng")))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_a_pair_that_does_not_belong_together_is_refused(tmp_path):
    """Weights copied over others of the same name: the state is of the others."""
    for iteration in (3, 6):
        checkpoint.save_checkpoint(str(tmp_path / f"yolact_base_0_{iteration}.pth"),
                        {"w": torch.full((2,), float(iteration))}, {"iteration": iteration})
    mixed, right = str(tmp_path / "yolact_base_0_3.pth"), str(tmp_path / "yolact_base_0_6.pth")
    shutil.copy(right, mixed)
    with pytest.raises(UserError, match="yolact_base_0_3.pth.*do not belong together"):
        checkpoint.load_state(mixed)
    found = checkpoint.load_for_inference(mixed)
    assert "written beside other weights" in found.warnings[-1] and found.origin is None
    assert checkpoint.load_state(right)["iteration"] == 6


def test_a_state_of_before_digests_is_read(tmp_path):
    path = checkpoint.save_checkpoint(str(tmp_path / "yolact_base_0_3.pth"), {"w": torch.ones(2)},
                           {"iteration": 3})
    state = checkpoint.load_state(path)
    del state["weights_sha256"]
    torch.save(state, checkpoint.state_path(path))
    torch.save({"w": torch.zeros(2)}, path)
    assert checkpoint.load_state(path)["iteration"] == 3
