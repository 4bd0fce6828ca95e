from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.weights.files import load_tensors, read_weights


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _state():
    tied = torch.arange(6, dtype=torch.float32).view(2, 3)
    return {
        "weights": OrderedDict([("a", tied), ("b", tied.t()), ("h", tied.half())]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "integers": [torch.tensor(3), torch.zeros(2, dtype=torch.uint8), torch.tensor([True])],
        "plain": {"lr": 1e-3, "step": 7, "names": ("person", None, True), "big": 2 ** 70},
        3: [],
    }


def _save(content, path, legacy):
    torch.save(content, str(path), _use_new_zipfile_serialization=not legacy)


def _refused(path, *words):
    with pytest.raises(UserError) as caught:
        load_tensors(str(path))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_full_state_comes_back(tmp_path, legacy):
    path = tmp_path / "state.pth"
    _save(_state(), path, legacy)
    loaded = load_tensors(str(path))
    expected = _state()
    assert list(loaded["weights"]) == ["a", "b", "h"]
    for key, value in expected["weights"].items():
        assert loaded["weights"][key].dtype == value.dtype
        assert torch.equal(loaded["weights"][key].float(), value.float())
    assert torch.equal(loaded["parameter"], expected["parameter"])
    assert [t.tolist() for t in loaded["integers"]] == [3, [0, 0], [True]]
    assert loaded["plain"] == expected["plain"]
    assert loaded[3] == []


def test_states_of_random_numbers_may_lie_beside_weights(tmp_path):
    _save({"model": {"w": torch.ones(2)}, "rng": np.random.get_state(),
           "other": np.ones(1, np.uint64)}, tmp_path / "a.pth", False)
    assert set(read_weights(str(tmp_path / "a.pth")).tensors) == {"w"}


def test_module_weights_come_back(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    torch.save(network.state_dict(), str(tmp_path / "net.pth"))
    network.load_state_dict(load_tensors(str(tmp_path / "net.pth")), strict=True)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("function,arguments,name", [
    (os.system, ("touch '{}'",), "system"),
    (eval, ("open('{}', 'w')",), "eval"),
    (os.mkdir, ("{}",), "mkdir"),
])
def test_code_is_named_and_not_run(tmp_path, legacy, nested, function, arguments, name):
    trace = tmp_path / "was_run"
    hostile = Calls(function, *(argument.format(trace) for argument in arguments))
    content = {"a": torch.ones(1), "b": [(1, {"c": hostile})] if nested else hostile}
    _save(content, tmp_path / "hostile.pth", legacy)
    _refused(tmp_path / "hostile.pth", "hostile.pth", name, "nothing was run")
    assert not trace.exists()


def test_code_in_place_of_the_legacy_header_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    path = tmp_path / "header.pth"
    path.write_bytes(pickle.dumps(Calls(os.mkdir, str(trace)), protocol=2))
    _refused(path, "header.pth")
    assert not trace.exists()


def test_advice_to_switch_the_check_off_is_not_passed_on(tmp_path):
    trace = tmp_path / "was_run"
    path = tmp_path / "protocol4.pth"
    torch.save({"a": Calls(os.mkdir, str(trace))}, str(path), pickle_protocol=4)
    with pytest.raises(UserError) as caught:
        load_tensors(str(path))
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("target", ["torch._utils _rebuild_tensor_v2", "torch FloatStorage"])
def test_functions_of_torch_cannot_be_altered(tmp_path, target):
    module, name = target.split()
    # GLOBAL, then BUILD with (None, {"altered": 1}): sets an attribute on what was named.
    body = ("c{}\n{}\n".format(module, name).encode() + b"(N}X\x07\x00\x00\x00alteredK\x01stb.")
    path = tmp_path / "alter.pth"
    with zipfile.ZipFile(str(path), "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body)
        archive.writestr("archive/version", "3\n")
    _refused(path, "altered")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "altered")
    assert not hasattr(torch.FloatStorage, "altered")


def test_pickled_module_is_refused(tmp_path):
    torch.save({"net": torch.nn.Linear(2, 2)}, str(tmp_path / "module.pth"))
    _refused(tmp_path / "module.pth", "Linear", "state_dict()")


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pth"))
    _refused(tmp_path / "script.pth", "TorchScript")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [3, 40, 0.5, 0.99])
def test_truncated(tmp_path, legacy, kept):
    path = tmp_path / "cut.pth"
    _save({"a": torch.zeros(1000), "b": torch.ones(50)}, path, legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept if kept > 1 else int(len(whole) * kept)])
    _refused(path, "cut.pth")


@pytest.mark.parametrize("text", [b"<!DOCTYPE html><html>", b"\n <html lang=en>",
                                  b"<!doctype HTML"])
def test_web_page(tmp_path, text):
    (tmp_path / "page.pth").write_bytes(text + b" " * 600)
    _refused(tmp_path / "page.pth", "page.pth", "web page", "download it again")


def test_other_files(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    _refused(tmp_path / "empty.pth", "empty.pth", "is empty")
    (tmp_path / "text.pth").write_bytes(b"hello")
    _refused(tmp_path / "text.pth", "not a PyTorch checkpoint", "hello")
    (tmp_path / "lfs.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    _refused(tmp_path / "lfs.pth", "git lfs pull")
    with zipfile.ZipFile(str(tmp_path / "photos.zip"), "w") as archive:
        archive.writestr("a/b.txt", "x")
    _refused(tmp_path / "photos.zip", "photos.zip")
    _refused(tmp_path, "is a folder")
    _refused(tmp_path / "absent.pth", str(tmp_path / "absent.pth"), "no file")


def test_not_a_dictionary(tmp_path):
    torch.save([torch.ones(2)], str(tmp_path / "list.pth"))
    _refused(tmp_path / "list.pth", "holds a list", "dictionary")
