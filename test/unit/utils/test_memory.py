"""What a training needs and what a host has, in bytes; which exceptions mean that it ran out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data.config import get_config
from layers.deform_conv import DeformConv2d
from utils.engine.batch_size import _side_at, estimate
from utils.memory import (
    MemoryNeed,
    activations,
    held_by_others,
    host_available,
    in_gib,
    is_out_of_memory,
    process_peak,
    round_down,
)
from utils.optimizer import build_optimizer
from yolact import build_yolact

MIB = 1 << 20
GIB = 1 << 30


def test_need_follows_from_the_peaks_of_one_and_two_images():
    need = MemoryNeed.from_peaks(one=300, two=500, update=250)
    assert need == MemoryNeed(fixed=100, per_image=200, update=250)
    assert [need.of_batch(n) for n in (0, 1, 2, 8)] == [250, 300, 500, 1700]
    assert [need.largest_batch(n) for n in (249, 299, 300, 499, 500, 1700)] == [0, 0, 1, 1, 2, 8]


def test_a_batch_of_any_size_fits_where_images_take_nothing():
    assert MemoryNeed.from_peaks(one=300, two=290, update=0).largest_batch(10 ** 6) > 10 ** 5


def test_need_in_words():
    assert MemoryNeed(GIB // 2, GIB, 0).sentence(2) == (
        "2.5 GiB for 2 images (512 MiB + 1.0 GiB per image)")
    assert MemoryNeed(GIB // 2, GIB, 3 * GIB).sentence(2) == (
        "3.0 GiB for 2 images (512 MiB + 1.0 GiB per image; the optimiser 3.0 GiB)")
    assert MemoryNeed(0, GIB, 0).sentence(1).startswith("1.0 GiB for 1 image (")
    assert in_gib(0.95 * GIB) == "0.9 GiB" or in_gib(0.95 * GIB) == "1.0 GiB"


def test_chosen_batches_are_even():
    assert [round_down(n) for n in (0, 1, 2, 3, 7, 8)] == [0, 1, 2, 2, 6, 8]


def test_what_goes_through_modules_counts_once_and_only_where_something_is_trained():
    frozen, trained = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    model = nn.Sequential(frozen, trained, nn.ReLU(inplace=True), nn.Sigmoid())
    found = activations(model, lambda: model(torch.zeros(1, 3, 10, 10)))
    # The input of the trained weights, their output that becomes the ReLU's, the sigmoid's.
    assert [(item.single, item.half, item.side) for item in found] == [
        (channels * 400, channels * 200, 10) for channels in (4, 8, 8)]
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_computed_between_modules_counts():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return {"sum": self.second(torch.tanh(self.first(x))) + x}

    model = Residual()
    found = activations(model, lambda: model(torch.zeros(1, 1, 10, 10)))
    assert len(found) == 5  # the input, first's output, tanh's, second's, the sum


def test_deformable_convolution_keeps_what_it_samples():
    layer = DeformConv2d(4, 8, stride=2)
    found = activations(layer, lambda: layer(torch.zeros(1, 4, 10, 10)))
    assert (9 * (4 + 3) * 25 * 4, 9 * (4 + 3) * 25 * 4 + 4 * 400, 5) in found


MEASURED = [
    ("yolact_resnet50", 400, "O0", 2, 948, 8, 3000),
    ("yolact_resnet50", 550, "O1", 2, 1028, 6, 2453),
    ("yolact_base", 550, "O0", 2, 2224, 6, 5772),
    ("yolact_base", 400, "O1", 2, 1000, 8, 2516),
    ("yolact_darknet53", 400, "O0", 2, 1116, 8, 3276),
    ("yolact_darknet53", 550, "O0", 2, 1759, 6, 4475),
    ("yolact_plus_resnet50", 400, "O0", 2, 1228, 8, 4044),
    ("yolact_plus_resnet50", 550, "O1", 2, 1649, 6, 4291),
]
"""Peaks in MiB of two batches, by torch_npu's allocator over the emulator."""


@pytest.mark.parametrize("name, side, level, few, few_mib, many, many_mib", MEASURED)
def test_estimate_of_the_recipes(name, side, level, few, few_mib, many, many_mib):
    config = get_config(name)
    scales = tuple(tuple(s * side / config.max_size for s in level_scales)
                   for level_scales in config.pred_scales)
    config = config.replace(max_size=side, pred_scales=scales)
    model = build_yolact(config)
    need = estimate(config, model, build_optimizer(config, model), level)
    assert 0.97 * many_mib <= need.of_batch(many) / MIB <= 1.05 * many_mib
    assert 0.97 * few_mib <= need.of_batch(few) / MIB <= 1.05 * few_mib


@pytest.mark.parametrize("size, small, side, expected", [
    (550, 138, 69, 275), (550, 138, 35, 138), (550, 138, 18, 69), (550, 138, 36, 138),
    (550, 138, 2, 5), (160, 138, 138, 160), (500, 100, 7, 32), (500, 100, 33, 165)])
def test_a_map_grows_as_its_level_does(size, small, side, expected):
    assert _side_at(size, small, side) == pytest.approx(expected)


def test_a_frozen_backbone_needs_less():
    config = get_config("yolact_resnet50")
    needs = []
    for trained in (True, False):
        model = build_yolact(config)
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(trained)
        needs.append(estimate(config, model, build_optimizer(config, model)))
    assert needs[1].per_image < 0.6 * needs[0].per_image and needs[1].fixed < needs[0].fixed


def test_a_device_s_own_software_is_nobody_else():
    assert held_by_others(60 * GIB, 64 * GIB) == 0
    assert held_by_others(50 * GIB, 64 * GIB) == 14 * GIB


def test_the_peak_of_this_process_grows_with_what_it_holds():
    before = process_peak()
    if before is None:
        pytest.skip("no /proc here")
    held = torch.ones(max(before, 100 * MIB) // 4)
    assert process_peak() > before and len(held)


@pytest.fixture
def host(tmp_path):
    """A stand-in for /proc and the control group: 8 GiB free, no limits."""
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    group.mkdir()
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (proc / "self" / "status").write_text("VmPeak:\t 900 kB\nVmSize:\t 1048576 kB\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(str(GIB))

    def available(limit=0):
        return host_available(limit or (1 << 60), str(proc), str(group))

    return available, group


def test_the_host_has_the_least_of_its_limits(host, tmp_path):
    available, group = host
    assert available() == 8 * GIB
    assert available(limit=4 * GIB) == 3 * GIB
    (group / "memory.max").write_text(str(3 * GIB))
    assert available() == 2 * GIB
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    assert available() == 2 * GIB + GIB // 2
    assert host_available(None, str(tmp_path / "nowhere"), str(group)) is None


@pytest.mark.parametrize("error", [
    RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 32.00 GiB total"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("NPU function error: aclrtMalloc, error code is 207001"),
    MemoryError(),
])
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("shape mismatch"), ValueError("out of memory"),
    RuntimeError("NPU function error, error code is 507015")])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_the_cpu_allocator_s_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
