"""Choosing a device: what is there is used, what is not there is said, nothing is changed silently.

An NPU host is imitated by a stand-in for `torch.npu` with the same interface.
"""

from __future__ import annotations

import importlib.machinery
import logging
import random

import numpy as np
import pytest
import torch

from utils import device as device_module
from utils.ascend_versions import Versions
from utils.device import (
    DEVICE_NAMES,
    NpuModes,
    cards_of_host,
    describe,
    distributed_backend,
    memory_reserved,
    pin_memory_supported,
    seed_everything,
    select_device,
    synchronize,
)
from utils.errors import UserError
from utils.memory import memory_info, peak_memory, release_memory, reset_peak_memory

CPU = torch.device("cpu")
GOOD_VERSIONS = Versions("2.9.0", "2.9.0", "8.5.0", "25.5.0")


class WriteOnlyConfig:
    """Like torch_npu's: takes options, has no attributes to read."""

    def __init__(self, calls):
        object.__setattr__(self, "_calls", calls)

    def __setattr__(self, name, value):
        self._calls.append((name, value))


class FakeNpu:
    """As much of `torch.npu` as is used, recording what is asked of it."""

    def __init__(self, count=8):
        self.count = count
        self.calls = []
        self.config = WriteOnlyConfig(self.calls)

    def device_count(self):
        return self.count

    def get_device_name(self, index):
        return "Ascend910B1"

    def set_device(self, device):
        self.calls.append(("set_device", str(device)))

    def synchronize(self, device):
        self.calls.append(("synchronize", str(device)))

    def memory_reserved(self, device):
        return 1024

    def manual_seed_all(self, seed):
        self.calls.append(("manual_seed_all", seed))

    def set_compile_mode(self, jit_compile):
        self.calls.append(("set_compile_mode", jit_compile))


class FakeDevice:
    """`torch.device('npu')` needs the plugin; this one has its type, index and name."""

    def __init__(self, kind, index=None):
        self.type, self.index = kind, index

    def __str__(self):
        return self.type if self.index is None else f"{self.type}:{self.index}"


@pytest.fixture
def npu(monkeypatch):
    fake = FakeNpu()
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(torch, "device", FakeDevice)
    monkeypatch.setattr(device_module, "_npu_versions", lambda: GOOD_VERSIONS)
    monkeypatch.setattr(device_module, "_plugin_version", lambda: None)
    return fake


@pytest.fixture
def no_npu(monkeypatch):
    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def broken_plugin(monkeypatch):
    """torch_npu lies in the environment, CANN does not."""
    monkeypatch.delattr(torch, "npu", raising=False)
    spec = importlib.machinery.ModuleSpec("torch_npu", None)
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: spec)

    def fail(name):
        raise ImportError("libascendcl.so: cannot open shared object file\nand more lines")

    monkeypatch.setattr(device_module.importlib, "import_module", fail)


def test_cpu_is_always_there():
    assert select_device("cpu") == CPU
    assert select_device("CPU", index=5) == CPU
    assert cards_of_host("cpu") is None
    assert distributed_backend(CPU) == "gloo"
    assert memory_reserved(CPU) == 0
    assert pin_memory_supported(CPU) is False
    synchronize(CPU)


def test_auto_falls_to_the_cpu_without_a_word(no_npu, no_cuda, caplog):
    assert select_device("auto") == CPU
    assert caplog.records == []


def test_unknown_name_lists_the_known(no_npu):
    with pytest.raises(UserError, match="unknown device 'cdua'; did you mean 'cuda'"):
        select_device("cdua")
    assert DEVICE_NAMES == ("auto", "npu", "cuda", "cpu", "gpu", "card")


@pytest.mark.parametrize("name", ["cuda", "gpu"])
def test_missing_cuda_is_an_error_not_a_fallback(name, no_cuda):
    with pytest.raises(UserError, match=f"device '{name}' was asked for, but"):
        select_device(name)


def test_missing_plugin_is_an_error(no_npu):
    with pytest.raises(UserError, match="'npu' was asked for, but torch_npu is not installed"):
        select_device("npu")


def test_unusable_plugin_is_an_error_with_its_reason(broken_plugin):
    with pytest.raises(UserError) as caught:
        select_device("npu")
    sentence = str(caught.value)
    assert "installed but unusable (libascendcl.so: cannot open shared object file)" in sentence
    assert "set_env.sh" in sentence
    assert "\n" not in sentence


def test_auto_warns_of_an_unusable_plugin_and_goes_on(broken_plugin, no_cuda, caplog):
    with caplog.at_level(logging.WARNING):
        assert cards_of_host("auto") is None
        assert select_device("auto") == CPU
    assert len(caplog.records) == 1
    assert "installed but unusable (libascendcl.so" in caplog.text


def test_auto_warns_of_a_plugin_without_devices(npu, no_cuda, caplog):
    npu.count = 0
    with caplog.at_level(logging.WARNING):
        assert select_device("auto").type == "cpu"
    assert "finds no device" in caplog.text


@pytest.mark.parametrize("sign", ["a card (", "the driver of a card (",
                                  "CANN (ASCEND_HOME_PATH=/cann)"])
@pytest.mark.parametrize("plugin", ["no_npu", "broken_plugin"])
def test_auto_is_never_the_cpu_beside_a_card_or_cann(request, no_cuda, monkeypatch, tmp_path,
                                                     sign, plugin):
    request.getfixturevalue(plugin)
    names = {"a card (": ["davinci0", "davinci_manager"],
             "the driver of a card (": ["davinci_manager"]}
    if sign in names:
        for name in names[sign]:
            (tmp_path / name).touch()
        monkeypatch.setattr(device_module, "_CARDS", str(tmp_path / "davinci*"))
    else:
        monkeypatch.setenv("ASCEND_HOME_PATH", "/cann")
    for choose in (select_device, cards_of_host):
        with pytest.raises(UserError) as caught:
            choose("auto")
        sentence = str(caught.value)
        assert f"device 'auto' is not the CPU where there is {sign}" in sentence
        assert "torch_npu is" in sentence and "\n" not in sentence
    assert select_device("cpu") == CPU


def test_auto_takes_cuda_where_cann_is_unusable(no_npu, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", "/cann")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cards_of_host("auto") == 2


def test_auto_prefers_the_npu(npu):
    chosen = select_device("auto", index=3)
    assert str(chosen) == "npu:3"
    assert ("set_device", "npu:3") in npu.calls
    assert ("allow_internal_format", False) in npu.calls
    assert ("set_compile_mode", False) in npu.calls  # one tested mode, on every card
    assert cards_of_host("npu") == 8


def test_modes_are_set_and_warned_of(npu, caplog):
    select_device("npu", 0, NpuModes(jit_compile=True, internal_format=True))
    assert ("set_compile_mode", True) in npu.calls and ("allow_internal_format", True) in npu.calls
    assert "--jit_compile and --internal_format are not tested on any card" in caplog.text


def test_modes_that_are_not_there_are_a_sentence(npu, monkeypatch):
    with pytest.raises(UserError, match="--internal_format is a mode of Ascend NPUs, but this "
                                        "device is cpu; leave it out"):
        select_device("cpu", 0, NpuModes(internal_format=True))

    def refuse(jit_compile):
        raise RuntimeError("Current device only support jit_compile=False,\nand more")

    monkeypatch.setattr(npu, "set_compile_mode", refuse)
    with pytest.raises(UserError, match=r"Ascend910B1 has no such mode \(Current device only"):
        select_device("npu", 0, NpuModes(jit_compile=True))
    monkeypatch.delattr(npu, "set_compile_mode")
    monkeypatch.delattr(FakeNpu, "set_compile_mode")
    with pytest.raises(UserError, match="--jit_compile: this torch_npu has no such switch"):
        select_device("npu", 0, NpuModes(jit_compile=True))


@pytest.mark.parametrize("index", [8, -1])
def test_wrong_index_names_the_number_of_devices(npu, index):
    with pytest.raises(UserError, match=rf"device {index} was asked for, but this host has 8"):
        select_device("npu", index)
    assert npu.calls == []


@pytest.mark.parametrize("name, index, chosen", [
    ("npu:5", 0, "npu:5"), ("NPU:5", 5, "npu:5"), ("5", 0, "npu:5"), ("card", 2, "npu:2"),
    ("npu", 2, "npu:2"), ("", 1, "npu:1")])
def test_a_card_is_named_with_its_number(npu, name, index, chosen):
    assert str(select_device(name, index)) == chosen
    assert cards_of_host(name) == 8


def test_a_number_is_never_the_cpu(no_npu, no_cuda):
    for name in ("0", "card"):
        with pytest.raises(UserError, match=f"device '{name}' is a card, but there is none: torch_"
                                            "npu is not installed.*; .*--device=cpu does without"):
            select_device(name)
    assert select_device("cpu:0") == CPU
    with pytest.raises(UserError, match="'0,1' is a list, but one process drives one card"):
        select_device("0,1")
    with pytest.raises(UserError, match="unknown device 'tpu:0'; did you mean .npu.*or 0."):
        select_device("tpu:0")


def test_npu_questions_go_to_its_runtime(npu):
    device = select_device("npu", 1)
    synchronize(device)
    assert npu.calls[-1] == ("synchronize", "npu:1")
    assert memory_reserved(device) == 1024
    assert distributed_backend(device) == "hccl"
    assert describe(device).startswith(
        "device npu:1 (Ascend910B1), torch 2.9.0, torch_npu 2.9.0, CANN 8.5.0, driver 25.5.0, "
        "Python")


def test_an_untested_combination_is_one_warning(npu, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        select_device("npu")
        assert caplog.records == []
        monkeypatch.setattr(device_module, "_npu_versions",
                            lambda: GOOD_VERSIONS._replace(cann="8.3.RC1"))
        select_device("npu")
    assert len(caplog.records) == 1
    assert "CANN 8.3.RC1, driver 25.5.0: not a combination that Ascend lists" in caplog.text
    assert "the nearest is torch 2.9.0, torch_npu 2.9.0, CANN 8.5.0" in caplog.text


def test_mixed_versions_are_an_error_before_the_plugin_is_imported(broken_plugin, monkeypatch):
    monkeypatch.setattr(device_module, "_plugin_version", lambda: "1.11.0.post3")
    with pytest.raises(UserError, match="'npu' was asked for, but torch_npu 1.11.0.post3 is made "
                                        "for torch 1.11.0, and torch .* is installed"):
        select_device("npu")


@pytest.mark.parametrize("text, meaning", [
    ("Initialize: NPU function error: aclInit, error code is 507899\n[Error]: An internal error\n"
     "Resource_Busy(EL0005): The resources are busy.", "another process or container holds it"),
    ("NPU function error: c10_npu::SetDevice(device_id_), error code is 507033\n[Error]: Failed to "
     "start the device.", "it did not start"),
    ("NPU function error: aclrtMalloc, error code is 207001", "its memory is full"),
    ("NPU function error: aclInit, error code is 507899", "the driver failed"),
    ("open device 7 failed, runtime result = 107001.", "ASCEND_RT_VISIBLE_DEVICES show"),
    ("something new\nand more", r"something new \(npu-smi info shows its state\)"),
])
def test_a_card_that_does_not_start_is_one_sentence(npu, monkeypatch, text, meaning):
    def fail(device):
        raise RuntimeError(text)

    monkeypatch.setattr(npu, "synchronize", fail)
    sentence = "Ascend NPU device 3 cannot be used: .*" + meaning
    with pytest.raises(UserError, match=sentence) as caught:
        select_device("npu", 3)
    assert "\n" not in str(caught.value)


def test_memory_of_a_device(npu, monkeypatch):
    device = select_device("npu", 1)
    assert memory_info(device) == (0, 0) and peak_memory(device) == 0
    monkeypatch.setattr(npu, "mem_get_info", lambda device: (500, 2000), raising=False)
    assert memory_info(device) == (500 + 1024, 2000)  # what the allocator holds can be used again
    assert memory_info(CPU)[1] == 0
    for question in (reset_peak_memory, release_memory):
        question(device)
        question(CPU)


def test_old_plugins_without_newer_switches_work(npu, monkeypatch):
    monkeypatch.delattr(npu, "config")
    monkeypatch.delattr(FakeNpu, "set_compile_mode")
    monkeypatch.delattr(FakeNpu, "memory_reserved")
    device = select_device("npu")
    assert memory_reserved(device) == 0


def test_describe_is_one_line():
    line = describe(CPU)
    assert line.startswith("device cpu (")
    assert f"torch {torch.__version__}" in line
    assert "\n" not in line


def test_seed_everything_repeats_all_sources(device):
    def draw():
        return (random.random(), np.random.rand(), torch.rand(3).tolist(),
                torch.rand(3, device=device).tolist())

    seed_everything(7)
    first = draw()
    assert draw() != first
    seed_everything(7)
    assert draw() == first


def test_seed_reaches_the_npu(npu):
    seed_everything(2 ** 32 + 1)
    assert ("manual_seed_all", 2 ** 32 + 1) in npu.calls


def test_the_device_under_test_answers(device):
    assert describe(device).startswith(f"device {device}")
    assert distributed_backend(device) in ("hccl", "nccl", "gloo")
    torch.ones(8, device=device).sum()
    synchronize(device)
    assert memory_reserved(device) >= 0
    assert pin_memory_supported(device) is (device.type != "cpu")
