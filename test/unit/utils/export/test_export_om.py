"""`--format=om`: the command line of ATC, a stand-in for it, its failures, ais_bench."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import types

import cv2
import numpy as np
import pytest
import torch

from helpers.exports import export, require_onnx
from helpers.paths import ROOT
from helpers.prediction_weights import noise, plus_network, save_plus_weights, save_weights
from utils import exported
from utils.cli import run_main
from utils.errors import UserError
from utils.export import deformable
from utils.export.__main__ import main
from utils.export.check import example_images
from utils.export.run import Segmenter
from utils.exported import open_onnx, read_description
from utils.inference import Predictor

onnx, onnxruntime = require_onnx()
pytestmark = pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                                reason="exports are made with current PyTorch")

ATC = """#!{python}
import json, os, shutil, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
json.dump([sys.argv[1:], os.getcwd()], open({record!r}, "a"))
open({record!r}, "a").write(chr(10))
print("ATC start working now, please wait for a moment.", flush=True)
{body}
"""
WORKS = ("shutil.copy(flags['model'].replace('_atc', ''), flags['output'] + '.om');"
         "open('fusion_result.json', 'w');"
         "os.makedirs('kernel_meta/inner', exist_ok=True)")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def atc(tmp_path, monkeypatch):
    """Puts a stand-in on the PATH; returns what it was called with."""
    record = tmp_path / "calls"

    def install(body=WORKS):
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "atc"
        program.write_text(ATC.format(python=sys.executable, record=str(record), body=body))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return lambda: [json.loads(line) for line in record.read_text().splitlines()]
    return install


def test_atc_is_called_as_modelzoo_calls_it(weights, tmp_path, atc, capsys):
    calls = atc()
    folder = export(weights, tmp_path / "out", "--format=om", "--batch_size=1,8",
                    "--soc=310P3,Ascend910B3")
    out = capsys.readouterr().out
    assert out.count("ATC start working now") == 4  # streamed
    arguments, scratch = calls()[1]
    assert arguments == [
        "--framework=5", "--model=model_bs8.onnx", "--output=model_bs8_310P3",
        "--input_format=NCHW", "--input_shape=input.1:8,3,64,64", "--log=error",
        "--soc_version=Ascend310P3"]
    assert not os.path.exists(scratch) and "fusion_result.json" not in os.listdir(folder)
    assert sorted(name for name in os.listdir(folder) if "om" in name.split(".")[-1:]) == [
        "model_bs1_310P3.om", "model_bs1_910B3.om", "model_bs8_310P3.om", "model_bs8_910B3.om"]
    entry = read_description(folder)["models"][3]
    assert entry["command"] == "atc " + " ".join(arguments) and entry["command"] in out
    assert entry["file"] == "model_bs8_310P3.om" and len(entry["sha256"]) == 64
    assert sorted(os.listdir(str(tmp_path))) == ["bin", "calls", "out"]


@pytest.mark.parametrize("flags, expected", [
    (["--half"], "--precision_mode=force_fp16"),
    (["--precision_mode=must_keep_origin_dtype"], "--precision_mode=must_keep_origin_dtype"),
    (["--input=uint8"], "--insert_op_conf=aipp.cfg"),
])
def test_flags_reach_atc(flags, expected, weights, tmp_path, atc):
    calls = atc()
    folder = export(weights, tmp_path / "out", "--format=om", *flags)
    assert calls()[0][0][-1] == expected
    if "aipp" in expected:
        with open(os.path.join(folder, "aipp.cfg")) as stream:
            config = stream.read()
        for line in ("input_format: RGB888_U8", "src_image_size_w: 64", "min_chn_0: 123.68",
                     "min_chn_2: 103.94", "var_reci_chn_0: 0.0171232877"):
            assert line in config
        entry = read_description(folder)["models"][1]
        assert entry["input"] == {"name": "input.1", "type": "uint8", "layout": "NHWC"}


def test_without_atc_a_script_is_left(weights, tmp_path, atc, capsys, monkeypatch):
    folder = export(weights, tmp_path / "out", "--format=om", "--soc=310P3,310B4")
    out = capsys.readouterr().out
    assert "ATC is not installed here" in out and "source /usr/local/Ascend" in out
    assert not [name for name in os.listdir(folder) if name.endswith(".om")]
    atc()
    subprocess.check_call(["bash", os.path.join(folder, "atc.sh")], cwd=str(tmp_path))
    for name in ("model_310P3.om", "model_310B4.om"):
        assert os.path.exists(os.path.join(folder, name))


@pytest.mark.parametrize("body, flags, sentence", [
    ("print('E10001: no such thing'); sys.exit(3)", [], "failed with exit code 3 (ATC start"),
    ("pass", [], "left no model_310P3.om"),
    ("import time; time.sleep(60)", ["--atc_seconds=1"], "was ended after 1 s"),
])
def test_an_atc_that_fails(body, flags, sentence, weights, tmp_path, atc, capsys):
    atc(body)
    assert run_main(main, [weights, f"--out={tmp_path / 'out'}", "--format=om", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: atc ") and sentence in error and error.count("\n") == 1
    assert str(tmp_path / "out.atc.log") in error
    assert "ATC start working now" in (tmp_path / "out.atc.log").read_text()
    assert sorted(os.listdir(str(tmp_path))) == ["bin", "calls", "out.atc.log"]


def is_running(pid):
    """Whether there is such a process; one that has ended but was not waited for is none."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells of a parent's death")
def test_atc_and_all_it_started_end_with_a_killed_export(weights, tmp_path, atc):
    started = tmp_path / "started"
    # As the real one does: a script that starts a program and waits for it.
    atc("import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
        f"with open({str(started)!r} + '_', 'w') as stream: "
        "stream.write('%d %d' % (os.getpid(), child.pid))\n"
        f"os.rename({str(started)!r} + '_', {str(started)!r}); child.wait()")
    exporting = subprocess.Popen([sys.executable, "-m", "utils.export", weights, "--format=om",
                                  f"--out={tmp_path / 'out'}"], cwd=str(ROOT),
                                 stdout=subprocess.DEVNULL)
    assert eventually(started.exists)
    pids = [int(word) for word in started.read_text().split()]
    assert all(map(is_running, pids))
    exporting.kill()
    exporting.wait()
    assert eventually(lambda: not any(map(is_running, pids)))
    assert not (tmp_path / "out").exists()
    with open(str(tmp_path / "bin" / "atc"), "w") as program:
        program.write(ATC.format(python=sys.executable, record=str(tmp_path / "calls"), body=WORKS))
    export(weights, tmp_path / "out", "--format=om")
    assert sorted(os.listdir(str(tmp_path))) == ["bin", "calls", "out", "started"]


def eventually(condition, seconds=60.0):
    """Whether a condition comes true in this time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("flags, sentence", [
    (["--soc=310P4"], "--soc names '310P4', which is no known chip; did you mean '310P"),
    (["--soc="], "--soc names '', which is no known chip"),
    (["--half", "--precision_mode=force_fp32"], "--half is --precision_mode=force_fp16, but"),
    (["--batch_size=dynamic"], "a model for Ascend has a fixed one"),
    (["--format=caffe"], "--format is 'caffe', expected one of onnx, om"),
    (["--precision_mode=half"], "--precision_mode is 'half', expected one of force_fp16"),
])
def test_bad_input(flags, sentence, weights, tmp_path, capsys):
    assert run_main(main, [weights, f"--out={tmp_path / 'out'}", "--format=om", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("flag", ["--soc=910B3", "--precision_mode=force_fp16",
                                  "--atc_seconds=9"])
def test_flags_of_atc_are_not_left_aside(flag, weights, tmp_path, capsys):
    assert run_main(main, [weights, f"--out={tmp_path / 'out'}", flag]) == 2
    name = flag.split("=")[0]
    assert f"{name} is for Ascend's models; add --format=om" in capsys.readouterr().err


@pytest.mark.parametrize("soc", ["Ascend910B4-1", "ascend910_9382", "310P3,310P3"])
def test_chips_as_their_hosts_name_them(soc, weights, tmp_path):
    folder = export(weights, tmp_path / "out", "--format=om", f"--soc={soc}")
    models = read_description(folder)["models"]
    chip = soc.split(",")[0][6:] if "," not in soc else "310P3"
    assert [entry.get("soc") for entry in models] == [None, chip]
    assert models[1]["command"].endswith(f"--soc_version=Ascend{chip}")


def test_deformable_convolutions_are_written_as_modelzoo_writes_them(tmp_path, atc):
    calls = atc(WORKS)
    folder = export(save_plus_weights(tmp_path / "weights"), tmp_path / "out", "--format=om",
                    "--batch_size=2")
    assert calls()[0][0][1] == "--model=model_atc.onnx"
    model = onnx.load(os.path.join(folder, "model_atc.onnx"))
    assert [entry.version for entry in model.opset_import] == [11]
    assert [value.name for value in [*model.graph.input, *model.graph.output]] == [
        "input.1", "mask", "conf", "loc", "proto"]
    kinds = [node.op_type for node in model.graph.node]
    # deformable_conv2d_plugin.cc and sigmoid_plugin.cc there; the others are those of test_export.
    assert set(kinds) == {"Add", "Concat", "Conv", "DeformableConv2D", "MaxPool", "Relu", "Reshape",
                          "Resize", "Sigmoid", "Softmax", "Split", "Tanh", "Transpose"}
    nodes = [node for node in model.graph.node if node.op_type == "DeformableConv2D"]
    assert len(nodes) == 13
    assert {attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in nodes[0].attribute} == {
        "strides": [2, 2], "pads": [1, 1], "dilations": [1, 1], "groups": 1,
        "defomable_groups": 1}
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert [sizes[nodes[0].input[n]] for n in (1, 3)] == [[128, 128, 3, 3], [128]]
    # All values have been computed before they are used: the nodes are back in their places.
    known = {value.name for value in model.graph.input} | set(sizes)
    for node in model.graph.node:
        assert set(node.input) - {""} <= known
        known |= set(node.output)


def test_another_operator_is_noticed(tmp_path, monkeypatch):
    config, network = plus_network()
    right, node = deformable._convolve, deformable._Node.symbolic

    def refused():
        with pytest.raises(UserError) as caught:
            deformable.write_for_atc(network, str(tmp_path / "x.onnx"), config, "raw", 1,
                                     example_images(config.max_size, 1))
        return str(caught.value)

    with monkeypatch.context() as patch:  # a file that does not say what PyTorch computes
        patch.setattr(deformable._Node, "symbolic",
                      lambda g, *given: node(g, *given[:-1], 0))
        assert "differs from PyTorch: DeformableConv2D" in refused()
    with monkeypatch.context() as patch:  # y before x
        patch.setattr(deformable, "_convolve", lambda x, weight, offsets, *more: right(
            x, weight, torch.cat([offsets.chunk(3, 1)[n] for n in (1, 0, 2)], 1), *more))
        assert "differs from PyTorch: conf" in refused()


class InferSession:
    """Stands for ais_bench's: runs the ONNX model that the stand-in `atc` took for an OM."""

    def __init__(self, device_id, path):
        with open(path, "rb") as stream:
            self.session = onnxruntime.InferenceSession(stream.read(),
                                                        providers=["CPUExecutionProvider"])

    def infer(self, feeds):
        if feeds[0].dtype == np.uint8:  # as AIPP does
            mean, std = (np.array(values, np.float32) for values in (
                (123.68, 116.78, 103.94), (58.40, 57.12, 57.38)))
            feeds = [((feeds[0] - mean) / std).transpose(0, 3, 1, 2)]
        return self.session.run(None, {"input.1": feeds[0]})


@pytest.fixture
def ais_bench(monkeypatch):
    interface = types.ModuleType("ais_bench.infer.interface")
    interface.InferSession = InferSession
    for name in ("ais_bench", "ais_bench.infer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "ais_bench.infer.interface", interface)


@pytest.mark.parametrize("kind", ["float32", "uint8", "plus"])
def test_ais_bench_takes_the_place_of_onnxruntime(kind, weights, tmp_path, atc, ais_bench,
                                                  monkeypatch):
    atc()
    if kind == "plus":
        weights = save_plus_weights(tmp_path / "weights")
    folder = export(weights, tmp_path / "out", "--format=om",
                    f"--input={'uint8' if kind == 'uint8' else 'float32'}")
    opened = []

    def record(path, device="cpu", options=None):
        opened.append((os.path.basename(path), device))
        return open_onnx(path, device, options)

    monkeypatch.setattr(exported, "open_onnx", record)
    image = noise()
    om, pytorch = (Predictor(source, device="cpu")(image) for source in (
        os.path.join(folder, "model_310P3.om"), weights))
    np.testing.assert_allclose(om.scores, pytorch.scores, atol=1e-4)
    np.testing.assert_allclose(np.sort(om.boxes, 0), np.sort(pytorch.boxes, 0), atol=1e-2)
    for device in ("auto", "npu"):  # what run.py does on a card
        alone = Segmenter(folder, device)(image)
        np.testing.assert_allclose(alone.scores, pytorch.scores, atol=1e-4)
    # The card has the network; what scores the masks of YOLACT++ runs beside it on the CPU.
    assert opened == [("mask_iou.onnx", "cpu")] * 3 * (kind == "plus")


def test_a_missing_runtime_is_a_sentence(weights, tmp_path, atc, capsys):
    import eval as evaluation

    atc()
    folder = export(weights, tmp_path / "out", "--format=om")
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    assert evaluation.main([f"--trained_model={folder}/model_310P3.om", "--eval_device=cpu",
                            f"--image={tmp_path}/a.png:{tmp_path}/b.png"]) == 2
    error = capsys.readouterr().err
    assert "ais_bench is needed for exported models" in error and error.count("\n") == 1
