"""What a training needs and what a host has, in bytes; which exceptions mean that it ran out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data.config import get_config
from training.memory import estimate
from utils.memory import (
    MemoryNeed,
    host_available,
    in_gib,
    is_out_of_memory,
    output_bytes,
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
    assert MemoryNeed(0, GIB, 0).sentence(1).startswith("1.0 GiB for 1 image (")
    assert in_gib(0.95 * GIB) == "0.9 GiB" or in_gib(0.95 * GIB) == "1.0 GiB"


def test_chosen_batches_are_even():
    assert [round_down(n) for n in (0, 1, 2, 3, 7, 8)] == [0, 1, 2, 2, 6, 8]


def test_outputs_count_once_and_only_where_something_is_trained():
    frozen, trained = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    model = nn.Sequential(frozen, trained, nn.ReLU(inplace=True), nn.Sigmoid())
    found = output_bytes(model, lambda: model(torch.zeros(1, 3, 10, 10)))
    assert found == 2 * 8 * 100 * 4
    assert not any(module._forward_hooks for module in model.modules())


def test_estimate_of_the_recipes():
    """Against the peaks that torch_npu's allocator showed at 550 px (emulated)."""
    for name, fixed, per_image, update in [("yolact_resnet50", 249, 648, 495),
                                           ("yolact_base", 396, 903, 799)]:
        config = get_config(name)
        model = build_yolact(config)
        need = estimate(config, model, build_optimizer(config, model))
        assert need.fixed == pytest.approx(fixed * MIB, rel=0.1)
        assert need.per_image == pytest.approx(per_image * MIB, rel=0.05)
        assert need.update == pytest.approx(update * MIB, rel=0.05)


def test_a_frozen_backbone_needs_less():
    config = get_config("yolact_resnet50")
    needs = []
    for trained in (True, False):
        model = build_yolact(config)
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(trained)
        needs.append(estimate(config, model, build_optimizer(config, model)))
    assert needs[1].per_image < 0.6 * needs[0].per_image and needs[1].fixed < needs[0].fixed


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
    (group / "memory.stat").write_text("anon 5\ninactive_file {}\n".format(GIB // 2))
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
