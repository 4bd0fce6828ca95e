"""Checkpoint files: names, whole pairs, what a wrong file says."""

from __future__ import annotations

import os

import pytest
import torch

from utils import checkpoint
from utils.checkpoint import CheckpointName
from utils.errors import UserError


def write(folder, iteration, interrupt=False, config="yolact_base", **state):
    name = CheckpointName(config, iteration // 100, iteration, interrupt)
    full = dict({"config": {"name": config}, "class_names": ["cat", "dog"]}, **state)
    return checkpoint.save_checkpoint(name, str(folder), {"w": torch.ones(2)}, full)


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
    path = checkpoint.save_checkpoint(name, str(tmp_path), {"w": flat[:2]}, {})
    loaded = torch.load(path)
    assert list(loaded) == ["w"] and loaded["w"].tolist() == [0.0, 1.0]
    # A view saved as it is would carry the whole buffer it looks into.
    assert os.path.getsize(path) < 3000


def test_latest_of_any_configuration_is_of_the_one_trained_last(tmp_path):
    names = ["yolact_base_54_800000.pth", "mine_2_200.pth", "mine_1_100.pth"]
    for age, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x")
        os.utime(str(tmp_path / name), (1000 + age, 1000 + age))
    assert checkpoint.find_checkpoint("latest", str(tmp_path)).endswith("mine_2_200.pth")
    os.utime(str(tmp_path / names[0]), (2000, 2000))
    assert checkpoint.find_checkpoint("latest", str(tmp_path)).endswith(names[0])


def test_latest_and_interrupt(tmp_path):
    write(tmp_path, 900, config="yolact_im700")
    write(tmp_path, 100)
    stopped = write(tmp_path, 150, interrupt=True)
    newest = write(tmp_path, 200)
    (tmp_path / "yolact_base_9_999.pth.tmp").write_bytes(b"")
    folder = str(tmp_path)
    assert checkpoint.find_checkpoint("latest", folder, "yolact_base") == newest
    assert checkpoint.find_checkpoint("interrupt", folder, "yolact_base") == stopped
    assert checkpoint.find_checkpoint(newest, "elsewhere") == newest
    with pytest.raises(UserError, match="no interrupt checkpoint of 'yolact_im700'"):
        checkpoint.find_checkpoint("interrupt", folder, "yolact_im700")
    with pytest.raises(UserError, match="no weights file 'missing.pth'"):
        checkpoint.find_checkpoint("missing.pth", folder)


def test_inference_reads_config_and_names_from_the_state(tmp_path):
    path = write(tmp_path, 100)
    stored = checkpoint.load_for_inference(path)
    assert stored.class_names == ["cat", "dog"] and stored.config["name"] == "yolact_base"
    os.unlink(checkpoint.state_path(path))
    plain = checkpoint.load_for_inference(path)
    assert plain.config is None and plain.class_names is None
    assert plain.config_name == "yolact_base"


def test_state_of_another_format(tmp_path):
    path = write(tmp_path, 100)
    torch.save({"format": 999}, checkpoint.state_path(path))
    with pytest.raises(UserError, match="state format 999"):
        checkpoint.load_state(path)


def test_failed_write_leaves_no_weights_without_state(tmp_path, monkeypatch):
    real_save = torch.save

    def fail_on_weights(value, stream):
        if "format" not in value:
            raise OSError(28, "No space left on device")
        real_save(value, stream)

    monkeypatch.setattr(torch, "save", fail_on_weights)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path, 100)
    assert os.listdir(str(tmp_path)) == ["yolact_base_1_100.state"]
    assert checkpoint.list_checkpoints(str(tmp_path)) == []


def test_rng_state_round_trip(tmp_path):
    torch.save(checkpoint.rng_state(), str(tmp_path / "rng"))
    import random

    import numpy as np

    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    checkpoint.set_rng_state(torch.load(str(tmp_path / "rng")))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
