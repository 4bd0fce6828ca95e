"""`python -m utils.convert_weights`: round trips, reports, refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from backbone import DarkNet, ResNet
from helpers.weight_files import NAMES, network, renamed, same, save, write_darknet
from utils import convert_weights
from utils.checkpoint import CheckpointName, load_for_inference, save_checkpoint
from utils.cli import run_main
from utils.weights import darknet
from utils.weights.files import load_tensors


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as training leaves it, with counters that count."""
    state = network().state_dict()
    state["backbone.bn1.num_batches_tracked"] += 7
    path = save_checkpoint(CheckpointName("yolact_shapes", 1, 20).path(str(tmp_path / "weights")),
                           state, {"config": {"name": "yolact_shapes"}, "class_names": NAMES})
    return path, state


def convert(capsys, *argv):
    code = run_main(convert_weights.main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_round_trip_through_every_format_is_equal_to_the_bit(trained, tmp_path, capsys):
    path, state = trained
    for target in ("a.safetensors", "b.pdparams", "c.safetensors", "d.pth", "e.pdparams", "f.pt"):
        code, out, _ = convert(capsys, path, tmp_path / target)
        assert code == 0 and "YOLACT, ResNet of basic blocks, 4 classes" in out
        path = str(tmp_path / target)
    found = load_tensors(path)
    assert same(found, state, order=True)
    assert not [name for name in os.listdir(str(tmp_path)) if name.endswith(".tmp")]


def test_report_of_a_paddle_file(trained, tmp_path, capsys):
    path, state = trained
    _, out, _ = convert(capsys, path, tmp_path / "x.pdparams")
    counters = sum(name.endswith("num_batches_tracked") for name in state)
    assert f"Left out: {counters - 1} batch counters at 0" in out
    assert "Class names and configuration do not fit" in out
    _, out, _ = convert(capsys, tmp_path / "x.pdparams", tmp_path / "y.pth")
    assert "Renamed : _mean, _variance -> running_mean, running_var" in out
    assert f"{len(state)} tensors" in out


def test_class_names_travel_in_safetensors(trained, tmp_path, capsys):
    convert(capsys, trained[0], tmp_path / "x.safetensors")
    stored = load_for_inference(str(tmp_path / "x.safetensors"))
    assert stored.class_names == NAMES and stored.config == {"name": "yolact_shapes"}


def test_prefixes_go_and_to_names_the_kind(tmp_path, capsys):
    state = network().state_dict()
    source = save(renamed(state, lambda key: "module." + key), tmp_path / "ddp.pth")
    code, out, _ = convert(capsys, source, tmp_path / "weights.bin", "--to=pth")
    assert code == 0 and "'module.' removed" in out
    assert same(load_tensors(str(tmp_path / "weights.bin")), state, order=True)


def test_resnet_keeps_torchvisions_names(tmp_path, capsys):
    """The original's loader understands these and not its own."""
    state = renamed(ResNet((1, 1), base_width=4).state_dict(), lambda key: (
        f"layer{int(key[7]) + 1}.{key[9:]}" if key.startswith("layers.") else key))
    state["fc.weight"] = torch.zeros(3, 32)
    source = save(state, tmp_path / "resnet.pth")
    convert(capsys, source, tmp_path / "a.safetensors")
    convert(capsys, tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert same(load_tensors(str(tmp_path / "b.pth")), state, order=True)


def test_darknet_binary_becomes_a_backbone(tmp_path, capsys, monkeypatch):
    """With the two stages of a small DarkNet instead of DarkNet-53's five."""
    monkeypatch.setattr(darknet, "DARKNET53", (1, 1))
    source = DarkNet((1, 1))
    path = write_darknet(tmp_path / "d.conv.74", source)
    code, out, _ = convert(capsys, path, tmp_path / "darknet.pth")
    assert code == 0 and "DarkNet backbone" in out
    assert same(load_tensors(str(tmp_path / "darknet.pth")), source.state_dict())


def test_half_precision_stays_and_bfloat16_is_widened_for_paddle(tmp_path, capsys):
    state = network().state_dict()
    half = {name: value.half() if value.is_floating_point() else value
            for name, value in state.items()}
    half["semantic_seg_conv.bias"] = half["semantic_seg_conv.bias"].to(torch.bfloat16)
    source = save(half, tmp_path / "half.pth")
    _, out, _ = convert(capsys, source, tmp_path / "half.pdparams")
    assert "1 bfloat16 tensors to float32" in out
    convert(capsys, source, tmp_path / "half.safetensors")
    convert(capsys, tmp_path / "half.safetensors", tmp_path / "again.pth")
    assert same(load_tensors(str(tmp_path / "again.pth")), half, order=True)


def test_refusals(trained, tmp_path, capsys):
    path, state = trained
    before = Path(path).read_bytes()
    os.symlink(path, str(tmp_path / "link.pth"))
    other = save({"a.weight": torch.ones(2)}, tmp_path / "other.pth")
    for flags, words in [
            ((path, path), "is there already"), ((path, other), "is there already"),
            ((path, tmp_path / "link.pth"), "is there already"),
            ((path, tmp_path / "x.onnx"), "cannot tell from"),
            ((path, tmp_path), "cannot tell from"),
            ((path, tmp_path, "--to=pth"), "is a folder"),
            ((path, tmp_path / "x.pth", "--to=onnx"), "expected one of pth"),
            ((tmp_path / "absent.pth", tmp_path / "x.pth"), "no file"),
            ((path.replace(".pth", ".state"), tmp_path / "x.pth"), "state of a training run"),
            ((other, tmp_path / "x.pth"), "neither a YOLACT network nor")]:
        code, out, err = convert(capsys, *flags)
        assert code == 2 and out == "" and words in err and err.count("\n") == 1, flags
    assert Path(path).read_bytes() == before
    assert not os.path.exists(str(tmp_path / "x.pth"))


def test_failed_write_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def fail(stream, tensors):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.weights.paddle.write_pdparams", fail)
    code, _, err = convert(capsys, trained[0], tmp_path / "x.pdparams")
    assert code == 2 and "No space left" in err
    assert not list(tmp_path.glob("**/*pdparams*"))
