from __future__ import annotations

import copy

import pytest
import torch

from backbone import BatchNorm2d, build_backbone
from data.config import get_config, list_configs
from layers.heads import FPN, PredictionHead, ProtoNet
from utils.device import has_autocast
from yolact import build_yolact

# A forward pass of ResNet-50 in training mode: 77 convolutions, 53 batch normalisations, 62 ReLUs,
# 18 sums and 28 others. The number of launches is what small batches cost.
MAX_FORWARD_OPERATORS = 238


def _small(name="yolact_shapes", size=64, **overrides):
    return get_config(name, max_size=size, **overrides)


def _images(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, config.max_size, config.max_size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _check_shapes(out, config, batch):
    priors = sum(size * size for size in config.feature_sizes) * config.num_anchors
    classes, k = config.num_classes, config.num_prototypes
    assert out["loc"].shape == (batch, priors, 4)
    assert out["conf"].shape == (batch, priors, classes)
    assert out["mask"].shape == (batch, priors, k)
    assert out["proto"].shape == (batch, config.proto_size, config.proto_size, k)
    assert out["priors"].shape == (priors, 4)
    assert all(torch.isfinite(value).all() for value in out.values())
    assert out["proto"].min() >= 0
    assert out["mask"].abs().max() <= 1


@pytest.mark.parametrize("name", list_configs())
def test_shapes_of_every_recipe(name, device):
    # Mask re-scoring needs masks of 63 pixels a side.
    config = _small(name, size=249 if get_config(name).use_maskiou else 97)
    network = build_yolact(config).to(device).eval()
    with torch.no_grad():
        out = network(_images(config, 1).to(device))
    _check_shapes(out, config, 1)
    assert "segm" not in out


@pytest.mark.parametrize("name,size", [("yolact_shapes", 64), ("yolact_resnet50", 70),
                                       ("yolact_darknet53", 64)])
def test_every_weight_gets_a_gradient(name, size, device):
    config = _small(name, size)
    torch.manual_seed(0)
    network = build_yolact(config).to(device)
    out = network(_images(config).to(device))
    _check_shapes(out, config, 2)
    side = config.semantic_size
    assert out["segm"].shape == (2, config.num_classes - 1, side, side)
    sum(out[key].pow(2).mean() for key in ("loc", "conf", "mask", "proto", "segm")).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["yolact_shapes", "yolact_darknet53"])
def test_uint8_and_normalised_float_give_the_same(name, device):
    config = _small(name)
    network = build_yolact(config).to(device).eval()
    images = _images(config)
    mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
    std = torch.tensor(config.pixel_std).view(1, 3, 1, 1)
    with torch.no_grad():
        from_uint8 = network(images.to(device))
        from_float = network(((images.float() - mean) / std).to(device))
    for key, value in from_uint8.items():
        assert torch.allclose(value, from_float[key], rtol=1e-5, atol=1e-6), key


def test_input_is_left_alone(device):
    config = _small()
    network = build_yolact(config).to(device)
    images = torch.randn(2, 3, 64, 64).to(device)
    before = images.clone()
    network(images)
    assert torch.equal(images, before)


def test_other_input_size_is_an_error():
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 64\], expected \[B, 3, 64, 64\]"):
        build_yolact(_small())(torch.zeros(1, 3, 32, 64))


def test_saved_weights_load_strictly(tmp_path, device):
    config = _small()
    torch.manual_seed(1)
    first = build_yolact(config).to(device)
    first(_images(config).to(device))  # moves the running statistics
    path = str(tmp_path / "weights.pth")
    torch.save(first.state_dict(), path)
    second = build_yolact(config)
    second.load_state_dict(torch.load(path, map_location="cpu"), strict=True)
    second.to(device)
    images = _images(config, seed=2).to(device)
    with torch.no_grad():
        expected, actual = first.eval()(images), second.eval()(images)
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def _constants(network):
    return [*network.priors.values(), network.pixel_mean, network.pixel_std]


def test_constants_stay_out_of_the_state_and_in_float32():
    network = build_yolact(_small())
    assert not [key for key in network.state_dict() if "prior" in key or "pixel" in key]
    for converted in (copy.deepcopy(network).half(), copy.deepcopy(network).double()):
        for constant, wanted in zip(_constants(converted), _constants(network)):
            assert torch.equal(constant, wanted)
            assert constant.dtype == torch.float32


@pytest.mark.skipif(not hasattr(torch.nn.Module, "to_empty"), reason="no meta device")
def test_constants_follow_the_module():
    network = build_yolact(_small()).to("meta")
    for constant in _constants(network):
        assert constant.device.type == "meta"


def test_frozen_bn_stays_frozen(device):
    config = _small()
    network = build_yolact(config).to(device)
    layers = [module for module in network.modules() if isinstance(module, BatchNorm2d)]
    assert len(layers) == 20
    assert not network.bn_frozen
    network.freeze_bn()
    network.eval()
    network.train()
    assert network.bn_frozen
    assert network.training
    assert network.backbone.conv1.training
    before = {key: value.clone() for key, value in network.state_dict().items()}
    out = network(_images(config).to(device))
    sum(out[key].mean() for key in ("loc", "conf", "mask", "proto")).backward()
    assert not any(layer.training for layer in layers)
    for layer in layers:
        assert layer.weight.grad is None
        assert layer.bias.grad is None
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert network.backbone.conv1.weight.grad is not None


def test_unfrozen_bn_learns_its_statistics(device):
    config = _small()
    network = build_yolact(config).to(device)
    before = network.backbone.bn1.running_mean.clone()
    network(_images(config).to(device))
    assert not torch.equal(network.backbone.bn1.running_mean, before)


def test_start_values():
    torch.manual_seed(0)
    network = build_yolact(_small())
    for key, parameter in network.named_parameters():
        if key.endswith("bias"):
            assert parameter.abs().sum() == 0, key
        elif not key.startswith("backbone"):
            fan_in = parameter[0].numel()
            fan_out = parameter.numel() // parameter.shape[1]
            bound = (6 / (fan_in + fan_out)) ** 0.5  # Xavier, uniform
            assert 0.9 * bound < parameter.abs().max() <= bound, key
        elif parameter.dim() == 4:
            fan_out = parameter.numel() // parameter.shape[1]
            assert abs(parameter.std() * (fan_out / 2) ** 0.5 - 1) < 0.1, key
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), key


def test_head_equals_its_convolutions_one_by_one(device):
    torch.manual_seed(0)
    head = PredictionHead(8, 16, num_anchors=2, num_classes=5, num_prototypes=3).to(device)
    levels = [torch.randn(2, 8, 5, 4, device=device), torch.randn(2, 8, 3, 2, device=device)]
    loc, conf, mask = head(levels)

    def plain(layer, last):
        rows = [layer(head.upfeature(level)).permute(0, 2, 3, 1).reshape(2, -1, last)
                for level in levels]
        return torch.cat(rows, 1)

    assert loc.shape == (2, (5 * 4 + 3 * 2) * 2, 4)
    assert torch.allclose(loc, plain(head.bbox_layer, 4), atol=1e-5)
    assert torch.allclose(conf, plain(head.conf_layer, 5), atol=1e-5)
    assert torch.allclose(mask, torch.tanh(plain(head.mask_layer, 3)), atol=1e-5)


def test_fpn_and_proto_shapes(device):
    fpn = FPN([4, 8], features=6, num_downsample=2).to(device)
    maps = [torch.randn(1, 4, 9, 7, device=device), torch.randn(1, 8, 5, 4, device=device)]
    levels = fpn(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(6, 9, 7), (6, 5, 4), (6, 3, 2),
                                                            (6, 2, 1)]
    assert ProtoNet(6, 8, 3).to(device)(levels[0]).shape == (1, 18, 14, 3)


@pytest.mark.parametrize("name", list_configs())
def test_channels_and_strides_of_backbones(name):
    config = _small(name, size=75, use_maskiou=False)
    backbone = build_backbone(config).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 75, 75))
    channels = [backbone.channels[stage] for stage in config.selected_layers]
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[-1] for m in maps] == list(config.feature_sizes[:len(maps)])


@pytest.mark.skipif(not has_autocast(), reason="older than the layout")
@pytest.mark.parametrize("threads", [1, 2])
def test_channels_last_change_rounding_alone_and_all_is_done_by_onednn(threads):
    network, images = build_yolact(_small()), _images(_small())
    plain = network(images)
    network.use_channels_last()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autograd.profiler.profile() as profile:
            found = network(images)
    finally:
        torch.set_num_threads(before)
    kinds = [event.name for event in profile.function_events]
    if torch.backends.mkl.is_available():  # on x86
        assert "aten::mkldnn_convolution" in kinds and "aten::_slow_conv2d_forward" not in kinds
    assert not found["proto"].permute(0, 3, 1, 2).is_contiguous()
    for name, values in plain.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)


def test_operators_of_a_forward_pass():
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        pytest.skip("this torch cannot count operators")

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # What autograd keeps for itself launches nothing.
            self.count += str(func) not in ("aten.detach.default", "aten.empty.memory_format")
            return func(*args, **(kwargs or {}))

    config = _small("yolact_resnet50", 70)
    network = build_yolact(config)
    images = _images(config)
    with Counter() as counter:
        network(images)
    assert counter.count <= MAX_FORWARD_OPERATORS
