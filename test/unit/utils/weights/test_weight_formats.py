"""Every weights file users have is recognised by its content and read under the same names."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT

from backbone import BasicBlock, DarkNet, ResNet
from data.config import get_config
from helpers.weight_files import network, other_python, renamed, same, save, write_darknet
from utils.errors import UserError
from utils.weights import darknet
from utils.weights.files import load_tensors, read_weights
from utils.weights.loading import load_backbone, load_network
from utils.weights.names import identify, own_names
from utils.weights.paddle import read_pdparams, write_pdparams
from utils.weights.safetensors import read_safetensors, write_safetensors
from yolact import build_yolact

TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
         "bool")


def _of_all_types():
    tensors = OrderedDict()
    for name in TYPES:
        values = torch.arange(-3.0, 3.0).view(2, 3)
        tensors[name] = (values.abs() if name == "uint8" else values).to(getattr(torch, name))
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["strided"] = torch.arange(6.0).view(2, 3).t()
    return tensors


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_types(tmp_path, legacy):
    tensors = _of_all_types()
    assert same(load_tensors(save(tensors, tmp_path / "t.pth", legacy)), tensors, order=True)


def test_safetensors_types_and_metadata(tmp_path):
    path, tensors = str(tmp_path / "t.safetensors"), _of_all_types()
    with open(path, "wb") as stream:
        write_safetensors(stream, tensors, {"a": "b"})
    found, metadata = read_safetensors(path)
    assert same(found, tensors, order=True) and metadata == {"a": "b"}
    with open(path, "rb") as stream:
        assert struct.unpack("<Q", stream.read(8))[0] % 8 == 0


def test_pdparams_types(tmp_path):
    path, tensors = str(tmp_path / "t.pdparams"), _of_all_types()
    with open(path, "wb") as stream:
        write_pdparams(stream, tensors)
    found = read_pdparams(path)
    tensors["bfloat16"] = tensors["bfloat16"].float()
    assert same(found, tensors, order=True)
    with open(path, "rb") as stream:  # NumPy itself agrees
        arrays = pickle.load(stream)
    assert np.array_equal(arrays["strided"], tensors["strided"].numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_as_paddle_pickles_them(tmp_path, protocol):
    path = tmp_path / "net.pdparams"
    content = {
        "a": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "b": np.arange(3, dtype=">f4"),
        "StructuredToParameterName@@": {"a": "conv2d_0.w_0"}}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pdparams(str(path))
    assert sorted(found) == ["a", "b"]
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].tolist() == [0, 1, 2]


def test_network_in_every_format(tmp_path):
    state = network().state_dict()
    paths = {"PyTorch": save(state, tmp_path / "net.bin")}
    for kind, write in (("safetensors", lambda s: write_safetensors(s, state, {})),
                        ("Paddle", lambda s: write_pdparams(s, state))):
        paths[kind] = str(tmp_path / (kind + ".bin"))  # the ending does not matter
        with open(paths[kind], "wb") as stream:
            write(stream)
    for kind, path in paths.items():
        found = read_weights(path)
        assert found.kind == kind and not found.unused and not found.warnings
        assert str(found.contents) == "YOLACT, ResNet of basic blocks, 4 classes"
        assert same(found.tensors, state, order=True)


@pytest.mark.parametrize("wrap,rule", [
    (lambda s: renamed(s, lambda key: "module." + key), "'module.' removed"),
    (lambda s: renamed(s, lambda key: "_orig_mod.module." + key), "'_orig_mod.' removed"),
    (lambda s: {"state_dict": renamed(s, lambda key: "model." + key), "epoch": 3}, "'model.'"),
    (lambda s: {"model": dict(s), "optimizer": {"lr": 1.0}}, ""),
    (lambda s: renamed(s, lambda key: key.replace("running_mean", "_mean").replace(
        "running_var", "_variance")), "_mean, _variance"),
])
def test_wrapped_and_renamed_networks(tmp_path, wrap, rule):
    source, target = network(), network(seed=1)
    report = load_network(target, read_weights(save(wrap(source.state_dict()), tmp_path / "n.pth")))
    assert same(target.state_dict(), source.state_dict(), order=True)
    assert rule in str(report) and len(report.loaded) == len(source.state_dict())


@pytest.mark.parametrize("wrap, left", [
    (lambda state: {"ema": {"module": state, "updates": 3}, "epoch": 1}, 2),
    (lambda state: {"model_ema": state}, 0),
    (lambda state: {"ema_state_dict": state, "model": None}, 1),
    (lambda state: {"model": state, "ema": {key: value + 1 for key, value in state.items()}}, 1),
    (lambda state: {"state_dict": dict(renamed(state, lambda key: "model." + key), **{
        "criterion.weight": torch.ones(3), "ema_model.backbone.x": torch.ones(1)})}, 2),
    (lambda state: {"state_dict": dict(renamed(state, lambda key: "module.model." + key), **{
        "module.criterion.weight": torch.ones(3)})}, 1),
])
def test_averages_and_criteria_beside_the_network(tmp_path, wrap, left):
    state = network().state_dict()
    found = own_names(load_tensors(save(wrap(state), tmp_path / "w.pth")), "w.pth")
    assert same(found.tensors, state) and len(found.unused) == left


def test_early_files_of_the_original(tmp_path):
    """They hold every stage a second time as `layer1`.., and pyramid levels that are dropped."""
    source, target = network(), network(seed=1)
    state = source.state_dict()
    for key in list(state):
        if key.startswith("backbone.layers."):
            stage, rest = key[len("backbone.layers."):].split(".", 1)
            state["backbone.layer{}.{}".format(int(stage) + 1, rest)] = state[key] * 0
    for n in range(4):
        state["fpn.downsample_layers.{}.weight".format(n)] = torch.zeros(4)
    report = load_network(target, read_weights(save(state, tmp_path / "old.pth", legacy=True)))
    assert same(target.state_dict(), source.state_dict())
    assert "fpn.downsample_layers.3.weight" in report.unused
    assert any(name.startswith("backbone.layer1.") for name in report.unused)
    assert " unused (" in str(report)


@pytest.mark.parametrize("name", ["yolact_base", "yolact_darknet53", "yolact_plus_resnet50"])
def test_published_names_are_recognised(name):
    keys = json.loads((ROOT / "test" / "golden" / "state_dict_keys.json").read_text())[name]["keys"]
    state = {key: torch.zeros(()) for key in keys}
    state["semantic_seg_conv.weight"] = torch.zeros(80, 256, 1, 1)
    expected = {"yolact_base": "YOLACT, ResNet-101, 80 classes",
                "yolact_darknet53": "YOLACT, DarkNet, 80 classes",
                "yolact_plus_resnet50": "YOLACT++, ResNet-50, 80 classes"}
    assert str(identify(state)) == expected[name]
    found = own_names({"module." + key: value for key, value in state.items()}, "x")
    assert list(found.tensors) == list(keys) and not found.unused


def test_torchvision_backbone(tmp_path):
    source = ResNet((3, 4, 6, 3), base_width=4)
    state = renamed(source.state_dict(), lambda key: (
        "layer{}.{}".format(int(key[7]) + 1, key[9:]) if key.startswith("layers.") else key))
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 128), torch.zeros(10)
    found = read_weights(save(state, tmp_path / "resnet50-19c8e357.pth", legacy=True))
    assert str(found.contents) == "ResNet-50 backbone"
    target = ResNet((3, 4, 6, 3), base_width=4)
    report = load_backbone(target, found.path)
    assert same(target.state_dict(), source.state_dict()) and not report.unused


def test_backbone_of_a_whole_network(tmp_path):
    source = network()
    target = network(seed=1).backbone
    report = load_backbone(target, save(source.state_dict(), tmp_path / "whole.pth"))
    assert same(target.state_dict(), source.backbone.state_dict())
    assert "backbone of YOLACT" in str(report)


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5)])
def test_darknet_binary(tmp_path, version, monkeypatch):
    """With two stages instead of five."""
    monkeypatch.setattr(darknet, "DARKNET53", (1, 2))
    source, target = DarkNet((1, 2)), DarkNet((1, 2))
    for buffer in source.buffers():
        if buffer.dim():
            buffer.uniform_(0.5, 1.5)
    path = write_darknet(tmp_path / "darknet53.conv.74", source, version, tail=7)
    report = load_backbone(target, path)
    assert same(target.state_dict(), source.state_dict())
    assert report.unused == ("7 numbers behind the backbone",) and "DarkNet" in str(report)


def test_darknet53_has_the_size_of_the_published_file():
    layers = darknet.convolutions()
    assert len(layers) == 52
    assert 20 + 4 * sum(layer.numbers for layer in layers) == 162482580
    names = {layer.name for layer in layers}
    state = build_yolact(get_config("yolact_darknet53")).backbone.state_dict()
    assert names == {key[:-len(".0.weight")] for key in state if state[key].dim() == 4}


def test_darknet_of_another_network_is_refused(tmp_path):
    path = write_darknet(tmp_path / "yolov3-tiny.weights", DarkNet((1,)))
    with pytest.raises(UserError, match="52 convolutions of DarkNet-53 need 40620640"):
        read_weights(path)


def test_tensors_saved_on_an_ascend_card(tmp_path):
    """The plugin of PyTorch 1.8 names its own function; the elements lie as on the CPU."""
    state = network().state_dict()
    path = save(state, tmp_path / "cpu.pth", legacy=True)
    with open(path, "rb") as stream:
        data = stream.read()
    module = b"torch" + b"_npu.utils.storage"
    if b"X\x0c\x00\x00\x00torch._utils" in data:
        pytest.skip("names are not written as plain text")
    data = data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n",
                        b"c" + module + b"\n_rebuild_npu_tensor\n")
    assert module in data
    with open(path, "wb") as stream:
        stream.write(data)
    assert same(read_weights(path).tensors, state)


def test_files_of_the_first_pytorch_versions(tmp_path):
    """Their own function for tensors, text of Python 2, and storages that look into others."""
    class Storage:
        pid = ("storage", torch.FloatStorage, b"1", b"cpu", 8, (b"2", 2, 4))

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def persistent_id(self, value):
            return value.pid if isinstance(value, Storage) else None

        def save_bytes(self, value):  # SHORT_BINSTRING, as Python 2 writes its text
            self.write(b"U" + bytes([len(value)]) + value)

        dispatch[bytes] = save_bytes

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor, (Storage(), 1, (3,), (1,))

    path = tmp_path / "resnet50-19c8e357.pth"
    with open(str(path), "wb") as stream:
        for part in (0x1950a86a20f9469cfc6c, 1001, {b"little_endian": True},
                     OrderedDict([(b"conv1.weight", Tensor())]), [b"1"]):
            Pickler(stream, 2).dump(part)
        stream.write(struct.pack("<q8f", 8, *range(8)))
    assert read_weights(str(path)).tensors["conv1.weight"].tolist() == [3, 4, 5]


def test_class_names_in_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    with open(str(path), "wb") as stream:
        write_safetensors(stream, network().state_dict(), {"class_names": '["a", "b"]',
                                                           "config": '{"name": "x"}'})
    found = read_weights(str(path))
    assert found.class_names == ["a", "b"] and found.config == {"name": "x"}


@pytest.mark.parametrize("content,words", [
    ({"conv1.weight": torch.zeros(2, 2, dtype=torch.int8)}, "conv1.weight of type int8, expected"),
    ({"format": 1, "config": {}, "class_names": [], "rng": {}}, "state of a training run"),
    ({"epoch": 3}, "holds a int under 'epoch', expected tensors"),
    ({}, "expected tensors by name"),
])
def test_what_is_no_network(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        read_weights(save(content, tmp_path / "x.pth"))


def test_unknown_kind(tmp_path):
    (tmp_path / "x.caffemodel").write_bytes(b"\n\x07ResNet-")
    with pytest.raises(UserError, match="no known kind of weights file.*expected PyTorch's"):
        read_weights(str(tmp_path / "x.caffemodel"))


def test_not_finite_weights_are_named_and_loaded(tmp_path):
    source, target = network(), network(seed=1)
    with torch.no_grad():
        source.fpn.lat_layers[0].bias[0] = float("nan")
        source.semantic_seg_conv.bias[0] = float("inf")
    report = load_network(target, read_weights(save(source.state_dict(), tmp_path / "nan.pth")))
    warning = str(report).splitlines()[1]
    assert warning.startswith("Warning: 2 of ") and "first: fpn.lat_layers.0.bias" in warning
    assert torch.isnan(target.fpn.lat_layers[0].bias[0])


def test_deformable_convolutions_keep_what_plain_ones_lack(tmp_path):
    class Net(ResNet):
        def __init__(self):
            super().__init__((1, 1), block=BasicBlock, base_width=4, selected_layers=(1,))

    target = Net()
    target.layers[1][0].conv2.conv_offset_mask = torch.nn.Conv2d(8, 27, 3)
    before = target.layers[1][0].conv2.conv_offset_mask.weight.clone()
    report = load_backbone(target, save(Net().state_dict(), tmp_path / "plain.pth"))
    assert report.reinitialised == ("layers.1.0.conv2.conv_offset_mask.weight",
                                    "layers.1.0.conv2.conv_offset_mask.bias")
    assert torch.equal(target.layers[1][0].conv2.conv_offset_mask.weight, before)


_PADDLE = """
import sys, warnings
warnings.simplefilter("ignore")
import paddle
from safetensors.numpy import load_file, save_file
ours, theirs, nested, safe_in, safe_out = sys.argv[1:]
state = paddle.load(ours)
net = paddle.nn.Sequential(paddle.nn.Conv2D(3, 32, 7, bias_attr=False), paddle.nn.BatchNorm2D(32))
part = {"0.weight": state["backbone.conv1.weight"]}
for name in ("weight", "bias", "_mean", "_variance"):
    part["1." + name] = state["backbone.bn1." + name]
assert set(part) == set(net.state_dict())
net.set_state_dict(part)
assert (net[1]._variance.numpy() == state["backbone.bn1._variance"].numpy()).all()
paddle.save(state, theirs)
paddle.save({"model": state, "epoch": 3}, nested)
save_file(load_file(safe_in), safe_out)
"""


@pytest.mark.skipif(other_python() is None, reason="set YOLACT_FORMATS_PYTHON to a Python with "
                    "paddlepaddle and safetensors")
def test_against_the_real_paddle_and_safetensors(tmp_path):
    state = network().state_dict()
    paths = [str(tmp_path / name) for name in ("ours.pdparams", "theirs.pdparams",
                                               "nested.pdparams", "in.st", "out.st")]
    from utils.weights.names import paddle_names
    with open(paths[0], "wb") as stream:
        write_pdparams(stream, paddle_names(state))
    with open(paths[3], "wb") as stream:
        write_safetensors(stream, state, {})
    done = subprocess.run([other_python(), "-c", _PADDLE] + paths, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout
    for path in paths[1:3] + paths[4:]:
        assert same(read_weights(path).tensors, state)
