"""Precision from the command line: flags, the library of PyTorch 1.x, whole runs and resuming."""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import pytest
import torch

import train
from data.config import get_config
from helpers import rounding
from unit.utils.test_amp import CASTS
from utils import amp
from utils.amp import FIRST_SCALE, Precision, build_precision
from utils.errors import UserError
from utils.optimizer import build_optimizer
from yolact import build_yolact

CPU = torch.device("cpu")


# PyTorch 1.5 and 1.8: a library casts (test_casting_library.py); what if it is not there.

def fake_module(tmp_path, monkeypatch, text):
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    if text is None and importlib.util.find_spec("apex") is not None:
        pytest.skip("the package is installed")
    if text is not None:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(amp, "has_autocast", lambda: False)


@pytest.mark.parametrize("text, sentence", [
    (None, "need the package apex .* install Ascend's"),
    ("import pyramid_toolkit", "that on PyPI is something else .* install Ascend's"),
    ("", "that on PyPI is something else")])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_missing_or_wrong_library_is_one_sentence(tmp_path, monkeypatch, text, sentence, level):
    fake_module(tmp_path, monkeypatch, text)
    npu = type("Device", (), {"type": "npu", "index": 0})()
    with pytest.raises(UserError, match=sentence):
        build_precision(level, None, "auto", npu)


def test_no_half_precision_on_an_old_cpu(tmp_path, monkeypatch):
    fake_module(tmp_path, monkeypatch, None)
    with pytest.raises(UserError, match="no half precision on the CPU"):
        build_precision("O1", None, "auto", CPU)


# Flags.

@pytest.mark.parametrize("level, scale, kind, sentence", [
    ("O4", None, "auto", r"--opt_level is 'O4'; did you mean 'O\d'\? Known: O0, O1, O2"),
    ("half", None, "auto", "--opt_level is 'half'"),
    ("O1", "dynamc", "auto", "--loss_scale is 'dynamc', expected dynamic or a number above 0"),
    ("O1", "0", "auto", "--loss_scale is '0'"),
    ("O1", "nan", "auto", "--loss_scale is 'nan'"),
    ("O1", "1e39", "auto", "--loss_scale is '1e39'"),
    ("O1", None, "bf16", "--amp_dtype is 'bf16'; did you mean 'bfloat16'"),
    ("O0", "128", "auto", "--loss_scale means nothing at --opt_level=O0"),
    ("O0", None, "float16", "--amp_dtype means nothing at --opt_level=O0"),
])
def test_a_wrong_flag_is_one_sentence(level, scale, kind, sentence):
    with pytest.raises(UserError, match=sentence):
        build_precision(level, scale, kind, CPU)


def test_a_type_that_the_device_lacks(monkeypatch):
    monkeypatch.setattr(amp, "half_type_problem", lambda *asked: "Ascend910A has no bfloat16")
    monkeypatch.setattr(amp, "has_autocast", lambda: True)
    with pytest.raises(UserError, match="Ascend910A has no bfloat16; choose another type or O0"):
        build_precision("O1", None, "bfloat16", CPU)


@CASTS
@pytest.mark.parametrize("flags, name", [
    (("O0", None, "auto"), "O0"),
    (("O1", None, "auto"), "O1, float16, loss scale dynamic"),
    (("O1", "128", "float16"), "O1, float16, loss scale 128"),
    (("O2", None, "bfloat16"), "O2, bfloat16, loss scale none"),
    (("O2", "dynamic", "bfloat16"), "O2, bfloat16, loss scale dynamic"),
])
def test_defaults(device, flags, name):
    if "bfloat16" in flags:
        rounding.skip_where_saturated()
    assert build_precision(*flags, device=device).name == name


# Whole runs.

def run_train(shapes, folder, request, *more):
    rounding.skip_where_saturated()
    return train.main([f"--data={shapes}", "--config=yolact_shapes", "--max_size=64",
                       "--batch_size=2", "--no_autoscale", "--num_workers=0", "--max_iter=6",
                       "--no_log", "--save_interval=3", f"--save_folder={folder}",
                       "--amp_dtype=bfloat16", "--loss_scale=dynamic", "--node_device={}".format(
                           request.config.getoption("--device"))] + list(more))


@CASTS
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_resumed_run_is_the_undisturbed_one(shapes, tmp_path, request, capsys, monkeypatch,
                                              level):
    monkeypatch.setattr(amp, "GOOD_STEPS_TO_GROW", 4)  # the counter matters across the checkpoint
    last = tmp_path / "yolact_shapes_1_6"
    assert run_train(shapes, tmp_path, request, "--opt_level=" + level) == 0
    whole = {end: torch.load(str(last) + end) for end in (".pth", ".state")}
    assert all(value.dtype in (torch.float32, torch.int64) for value in whole[".pth"].values())
    assert whole[".state"]["loss_scale"] == {"scale": 2 * FIRST_SCALE, "good_steps": 2}
    for end in whole:
        os.unlink(str(last) + end)
    assert run_train(shapes, tmp_path, request, "--opt_level=" + level, "--resume=latest") == 0
    again = {end: torch.load(str(last) + end) for end in (".pth", ".state")}
    assert "Resumed" in capsys.readouterr().out
    assert all(torch.equal(whole[".pth"][name], again[".pth"][name]) for name in whole[".pth"])
    assert whole[".state"]["loss_scale"] == again[".state"]["loss_scale"]

    other = "O2" if level == "O1" else "O1"
    assert run_train(shapes, tmp_path, request, "--opt_level=" + other, "--resume=latest") == 2
    assert f"its precision is {level}, bfloat16" in capsys.readouterr().err


@CASTS
def test_validation_scores_what_is_saved(shapes, tmp_path, request, capsys):
    assert run_train(shapes, tmp_path, request, "--opt_level=O2", "--validation_epoch=1") == 0
    assert "   box |" in capsys.readouterr().out


@CASTS
def test_a_run_whose_losses_are_not_finite_stops_at_any_scale(shapes, tmp_path, request, capsys,
                                                              monkeypatch):
    real = train.train_step

    def poisoned(network, criterion, *args, **kwargs):
        def spoilt(*more):
            return {name: loss * math.nan for name, loss in criterion(*more).items()}
        return real(network, spoilt, *args, **kwargs)

    monkeypatch.setattr(train, "train_step", poisoned)
    assert run_train(shapes, tmp_path, request, "--opt_level=O1", "--max_iter=30") == 1
    assert "10 steps in a row up to iteration 10" in capsys.readouterr().err


@CASTS
def test_a_scale_that_is_too_high_finds_its_way(shapes, tmp_path, request, capsys, monkeypatch):
    monkeypatch.setattr(amp, "FIRST_SCALE", amp.HIGHEST_SCALE)
    assert run_train(shapes, tmp_path, request, "--opt_level=O1", "--max_iter=12") == 0
    assert ("iteration 0: gradient overflow at scale 1.70141e+38, the scale is now 8.50706e+37"
            in capsys.readouterr().out)


@CASTS
def test_the_recipes_parameters_are_halved_but_batch_norms():
    config = get_config("yolact_shapes")
    network = build_yolact(config)
    last = amp.batch_norm_parameters(network)
    flat = build_optimizer(config, network, last=last)
    Precision("O2", CPU, torch.bfloat16).prepare(network, flat)
    kept = {name for name, p in network.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in network.named_parameters() if ".bn" in name
                    or "downsample.1" in name} != set()
    kinds = [p.dtype for p in flat.parameters]
    assert kinds == sorted(kinds, key=lambda kind: kind == torch.float32)
