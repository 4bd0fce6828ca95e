from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from backbone import BasicBlock, DarkNet, ResNet
from utils.errors import UserError
from utils.weights.loading import load_backbone


def _resnet(base_width=8):
    return ResNet((1, 1, 1), block=BasicBlock, base_width=base_width, selected_layers=(1, 2))


def _torchvision_names(state, prefix=""):
    renamed = OrderedDict()
    for key, value in state.items():
        if key.startswith("layers."):
            stage, rest = key[len("layers."):].split(".", 1)
            key = "layer{}.{}".format(int(stage) + 1, rest)
        renamed[prefix + key] = value
    return renamed


def _save(content, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(content, path)
    return path


def _equal(first, second):
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvision_names(tmp_path, prefix):
    source, target = _resnet(), _resnet()
    source.bn1.running_mean.fill_(2.0)
    state = _torchvision_names(source.state_dict(), prefix)
    state[prefix + "fc.weight"] = torch.zeros(10, 32)
    state[prefix + "fc.bias"] = torch.zeros(10)
    state[prefix + "extra"] = torch.zeros(1)
    assert not _equal(source, target)
    path = _save(state, tmp_path)
    report = load_backbone(target, path)
    assert _equal(source, target)
    assert set(report.loaded) == set(source.state_dict())
    assert report.unused == ("extra",)
    assert report.source.path == path
    text = str(report)
    assert text.startswith(f"{path} (ResNet of basic blocks backbone; PyTorch): 54 tensors")
    assert "layer1.. -> layers.0.." in text and text.endswith("1 unused (extra)")


def test_own_names_and_nested_dictionary(tmp_path):
    source, target = DarkNet((1, 1)), DarkNet((1, 1))
    load_backbone(target, _save({"state_dict": source.state_dict()}, tmp_path))
    assert _equal(source, target)


def test_batch_counters_may_be_missing(tmp_path):
    source, target = _resnet(), _resnet()
    state = {k: v for k, v in source.state_dict().items() if "num_batches_tracked" not in k}
    report = load_backbone(target, _save(state, tmp_path))
    assert set(report.loaded) == set(state)
    assert _equal(source, target)


def test_missing_file(tmp_path):
    with pytest.raises(UserError) as caught:
        load_backbone(_resnet(), str(tmp_path / "resnet50-19c8e357.pth"))
    for part in ("'resnet50-19c8e357.pth'", str(tmp_path / "resnet50-19c8e357.pth"),
                 "--backbone_weights none"):
        assert part in str(caught.value)


def test_lacking_weights_are_named_and_nothing_is_changed(tmp_path):
    source, target = _resnet(), _resnet()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = source.state_dict()
    for key in ("layers.1.0.conv1.weight", "bn1.running_var"):
        del state[key]
    with pytest.raises(UserError, match="lacks 2 of .*layers.1.0.conv1.weight"):
        load_backbone(target, _save(state, tmp_path))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_other_shapes_are_named(tmp_path):
    path = _save(_torchvision_names(_resnet(base_width=4).state_dict()), tmp_path)
    with pytest.raises(UserError, match=r"\[4, 4, 3, 3\], expected \[8, 8, 3, 3\]"):
        load_backbone(_resnet(), path)


def test_full_state_is_not_a_backbone(tmp_path):
    with pytest.raises(UserError, match="expected tensors by name"):
        load_backbone(_resnet(), _save({"epoch": 3}, tmp_path))
