"""`python -m utils.export`: every recipe equals PyTorch to the last detection; refusals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch
import yaml

import eval as evaluation
from data.config import list_configs
from data.shapes import main as write_shapes
from helpers.deterministic import load_deterministic_weights
from helpers.exports import export, require_onnx, small
from helpers.paths import ROOT
from helpers.prediction_weights import IDS, NAMES, full_disk, noise, save_weights
from layers.detection import Detect
from utils import exported
from utils.checkpoint import CheckpointName, save_checkpoint
from utils.cli import run_main
from utils.errors import UserError
from utils.export import check
from utils.export.__main__ import main
from utils.export.run import Segmenter
from utils.exported import open_onnx, read_description
from utils.inference import Predictor
from utils.inference.detector import load_model
from yolact import build_yolact

onnx, onnxruntime = require_onnx()
pytestmark = pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                                reason="exports are made with current PyTorch")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


def pixels(rle):
    return pycocotools.mask.decode(rle).astype(bool)


def assert_same_objects(one, other, tolerance=1e-3):
    """Equal to the last detection.

    Scores that are equal but for their last bits may come in another order, and a mask may differ
    in pixels whose value is the threshold.
    """
    assert len(one) == len(other) > 0
    np.testing.assert_allclose(one.scores, other.scores, atol=tolerance)
    left = list(range(len(other)))
    for n in range(len(one)):
        apart = [np.abs(one.boxes[n] - other.boxes[k]).max() / max(one.image.shape)
                 + np.abs(one.scores[n] - other.scores[k])
                 + (one.class_ids[n] != other.class_ids[k]) for k in left]
        assert min(apart) < tolerance
        match = left.pop(int(np.argmin(apart)))
        assert (pixels(one.rles[n]) != pixels(other.rles[match])).mean() < 1e-4


SLOW = ("yolact_base", "yolact_im400", "yolact_im700", "yolact_plus_base")
"""The others with more layers; a run without --slow leaves them out."""


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in list_configs()])
def test_every_recipe_finds_what_pytorch_finds(name, tmp_path):
    config = small(name)
    network = load_deterministic_weights(build_yolact(config))
    with torch.no_grad():  # else nothing is above the threshold
        network.prediction_layers[0].conf_layer.weight.mul_(6)
    path = save_checkpoint(CheckpointName(name, 1, 20).path(str(tmp_path / "weights")),
                           network.state_dict(), {"config": config.to_dict(), "class_names": None})
    folder = export(path, tmp_path / "out")
    image = noise(300, 200)
    assert_same_objects(Predictor(folder, device="cpu")(image),
                        Predictor(path, device="cpu")(image))


@pytest.mark.parametrize("flags", [
    ["--batch_size=1,4"],
    ["--batch_size=dynamic", "--input=uint8"],
    ["--batch_size=2", "--outputs=detections"],
    ["--outputs=detections", "--input=uint8"],
    ["--opset=17", "--outputs=detections"],
], ids=" ".join)
def test_forms_of_a_model_are_the_same_network(flags, weights, tmp_path):
    folder = export(weights, tmp_path / "out", *flags)
    images = [noise(90, 120, seed) for seed in range(5)]
    for batch_size in (1, 5):
        found = Predictor(folder, device="cpu", batch_size=batch_size)(images)
        for one, other in zip(found, Predictor(weights, device="cpu")(images)):
            assert_same_objects(one, other)
            assert one.category_ids == IDS and one.all_class_names == NAMES


@pytest.mark.parametrize("form", ["raw", "detections"])
def test_half_precision_is_near(form, weights, tmp_path, capsys):
    full, half = (export(weights, tmp_path / name, f"--outputs={form}", *more)
                  for name, more in (("full", []), ("half", ["--half"])))
    sizes = [os.path.getsize(os.path.join(folder, "model.onnx")) for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    facts = read_description(half)
    assert facts["models"][0]["half"] and 1e-5 < facts["differences"]["proto"] < 2e-2


def test_what_follows_the_network_keeps_single_precision(weights, tmp_path):
    image = noise(300, 200)
    inside, outside = (Predictor(export(weights, tmp_path / form, "--half", f"--outputs={form}"),
                                 device="cpu")(image) for form in ("detections", "raw"))
    assert_same_objects(inside, outside, 1e-6)


def test_detections_of_one_side_alone_are_noticed(weights):
    loaded = load_model(weights)
    with torch.no_grad():
        predictions = loaded.model(torch.from_numpy(check.example_images(64, 2)))
        wanted = Detect.from_config(loaded.config)(predictions)
    found = {name: getattr(wanted, name).clone()
             for name in ("boxes", "scores", "classes", "coefficients", "count")}
    found["proto"] = predictions["proto"]
    assert check.compare(predictions, found, loaded.config) == {"proto": 0, "detections": 0}
    found["classes"][0, 0] += 1  # of a class that is not found there, and one is missing
    assert check.compare(predictions, found, loaded.config)["detections"] > 0.1
    nothing = dict(found, count=torch.zeros_like(found["count"]))
    assert check.compare(predictions, nothing, loaded.config)["detections"] == float("inf")
    silent = dict(predictions, conf=predictions["conf"].clone())
    silent["conf"][:, :, 0] = 100.0
    assert check.compare(silent, nothing, loaded.config) == {"proto": 0}
    for value in (float("inf"), float("nan")):
        with pytest.raises(UserError, match="differs from PyTorch: detections by"):
            check.refuse_apart({"proto": 0.0, "detections": value}, 1e-3)


@pytest.mark.parametrize("batch, passes", [("1", 6), ("4", 2), ("dynamic", 1)])
def test_every_model_is_checked_with_drawn_random_and_own_images(batch, passes, weights, tmp_path,
                                                                 capsys, monkeypatch):
    for n in range(7):
        cv2.imwrite(str(tmp_path / f"{n}.png"), np.full((9, 9, 3), 10 * n, np.uint8))
    seen = []
    run = exported.ExportedModel._run

    def record(model, file, values):
        seen.append(values)
        return run(model, file, values)

    monkeypatch.setattr(exported.ExportedModel, "_run", record)
    export(weights, tmp_path / "out", f"--batch_size={batch}", "--input=uint8",
           f"--images={tmp_path}/*.png")
    images = np.concatenate(seen)[:6]
    assert len(seen) == passes and "6 images; " in capsys.readouterr().out
    assert images[1].std() > 70 and [image.std() > 0 for image in images[:4]] == [
        True, True, True, False]
    assert images[3:, 0, 0, 0].tolist() == [0, 30, 60]


def test_the_folder_describes_itself(weights, tmp_path):
    folder = export(weights, tmp_path / "out", "--batch_size=1,8")
    assert sorted(os.listdir(folder)) == ["model.yaml", "model_bs1.onnx", "model_bs8.onnx",
                                          "priors.npy", "run.py"]
    with open(os.path.join(folder, "model.yaml"), encoding="utf-8") as stream:
        facts = yaml.safe_load(stream)
    assert facts == read_description(folder)
    assert facts["class_names"] == NAMES and facts["category_ids"] == IDS
    assert facts["thresholds"] == {"score": 0.05, "iou": 0.5, "top_k": 200, "max_detections": 100}
    assert max(facts["differences"].values()) < 1e-4
    for entry in facts["models"]:
        graph = onnx.load(os.path.join(folder, entry["file"])).graph
        shape_of = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
                    for value in [*graph.input, *graph.output]}
        assert shape_of == {"input.1": [entry["batch"], 3, 64, 64], **{
            output["name"]: [entry["batch"], *output["shape"][1:]] for output in facts["outputs"]}}
        assert list(shape_of)[1:] == ["mask", "conf", "loc", "proto"]  # ModelZoo's order


def test_eval_scores_an_export_as_its_weights(weights, tmp_path, capsys):
    data = tmp_path / "shapes"
    assert write_shapes([str(data), "--train=1", "--val=6"]) == 0
    named = save_weights(tmp_path / "weights", ["circle", "square", "triangle", "star"],
                         [1, 2, 3, 4])
    rows = []
    for which in (named, export(named, tmp_path / "raw", "--batch_size=4"),
                  export(named, tmp_path / "found", "--outputs=detections"),
                  str(tmp_path / "raw" / "model.onnx")):
        capsys.readouterr()
        assert evaluation.main([
            f"--trained_model={which}", f"--val_data={data}", "--eval_device=cpu",
            "--num_workers=0", "--per_class_file=", "--output_coco_json",
            f"--bbox_det_file={tmp_path / 'box.json'}",
            f"--mask_det_file={tmp_path / 'mask.json'}"]) == 0
        out = capsys.readouterr().out
        table = [line for line in out.splitlines() if line.lstrip().startswith(("box |", "mask |"))]
        assert len(table) == 2
        rows.append([table, len(json.loads((tmp_path / "mask.json").read_text()))])
    assert rows[1:] == [rows[0]] * 3 and rows[0][1] == 600


REFUSED = [
    (["--batch_size=0"], "--batch_size is '0', expected different numbers from 1 to 1024"),
    (["--batch_size=1,x"], "--batch_size is '1,x'"),
    (["--batch_size=1025"], "expected different numbers from 1 to 1024"),
    (["--batch_size=dynamic", "--outputs=detections"], "has fixed shapes; give numbers"),
    (["--outputs=boxes"], "--outputs is 'boxes', expected one of raw, detections"),
    (["--opset=99"], "cannot write this network with opset 99"),
    (["--opset=9"], "--opset is '9', expected a whole number from 11 to"),
    (["--config=yolact_base"], "does not hold this network"),
    (["--images=/absent"], "--images: no folder '/absent'"),
    (["--images=/dev/null"], "none of the 0 files of '/dev/null' is an image"),
]


@pytest.mark.parametrize("flags, sentence", REFUSED, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_a_sentence_and_leaves_nothing(flags, sentence, weights, tmp_path, capfd):
    assert run_main(main, [weights, f"--out={tmp_path / 'out'}", *flags]) == 2
    out, error = capfd.readouterr()
    assert "graph(" not in out  # PyTorch prints a network that it cannot write
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert os.listdir(str(tmp_path)) == []


def refused(capsys, *argv):
    assert run_main(main, [str(argument) for argument in argv]) == 2
    return capsys.readouterr().err


def test_the_commands_that_follow_can_be_pasted(weights, tmp_path, capsys):
    folder = export(weights, tmp_path / "my 'export'")
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert shlex.split(shown[0])[3] == os.path.join(folder, "run.py")
    assert shlex.split(shown[1])[2] == f"--trained_model={folder}"


def test_files_in_the_way_stay(weights, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert "--out is empty, expected a folder" in refused(capsys, weights, "--out=")
    assert "exists and is not an empty folder" in refused(capsys, weights, f"--out={tmp_path}")
    assert os.listdir(str(tmp_path)) == ["mine.txt"]


@pytest.mark.parametrize("out", [".", "../link", "absent/../../cwd"])
def test_an_empty_folder_is_filled_and_stays(out, weights, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    os.symlink("cwd", "../link")
    export(weights, out)  # the current folder would be gone if another took its place
    assert sorted(os.listdir(".")) == ["model.onnx", "model.yaml", "priors.npy", "run.py"]


def test_folders_made_for_an_export_that_fails_go_with_it(weights, tmp_path, capsys):
    refused(capsys, weights, f"--out={tmp_path / 'a' / 'b' / 'c'}", "--opset=99")
    assert os.listdir(str(tmp_path)) == []


def test_a_killed_export_leaves_no_folder_and_the_next_removes_its_files(weights, tmp_path):
    code = ("import os, signal, sys; from utils.export import folder, __main__ as command;"
            "folder.write_description = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
            "command.main(sys.argv[1:])")
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, weights, f"--out={out}"], cwd=str(ROOT))
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(str(tmp_path)) == [".out.export"]
    export(weights, out)
    assert os.listdir(str(tmp_path)) == ["out"] and "model.onnx" in os.listdir(str(out))


def test_a_full_disk(weights, tmp_path, capsys):
    with full_disk(1 << 20):
        assert "cannot write" in refused(capsys, weights, f"--out={tmp_path / 'out'}")
    assert os.listdir(str(tmp_path)) == []


def test_weights_that_are_no_network(tmp_path, capsys):
    path = tmp_path / "yolact_shapes_1_2.pth"
    path.write_bytes(b"nothing")
    assert "is no known kind of weights file" in refused(capsys, path, f"--out={tmp_path / 'o'}")
    assert "no weights file" in refused(capsys, tmp_path / "absent.pth", f"--out={tmp_path / 'o'}")


def test_an_export_is_no_source_of_another(weights, tmp_path, capsys):
    folder = export(weights, tmp_path / "out")
    assert "is an export already" in refused(capsys, folder, f"--out={tmp_path / 'o'}")


def test_a_model_that_differs_is_not_kept(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "TOLERANCE", 1e-12)
    error = refused(capsys, weights, f"--out={tmp_path / 'out'}")
    assert "the exported model differs from PyTorch" in error
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_library_is_named_with_its_command(name, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    error = refused(capsys, weights, f"--out={tmp_path / 'out'}")
    assert f"{name} is needed for exported models" in error and f"pip install {name}" in error


def test_a_runtime_too_old_for_an_operator_is_a_sentence(tmp_path):
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, single, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("OfTomorrow", ["x"], ["y"])], "g", values[:1],
                              values[1:])
    path = str(tmp_path / "model.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8),
              path)
    with pytest.raises(UserError) as caught:
        open_onnx(path)
    sentence = str(caught.value)
    assert f"onnxruntime {onnxruntime.__version__} cannot run" in sentence
    assert "OfTomorrow" in sentence and "install a newer one" in sentence and "\n" not in sentence


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_the_runtime_does_not_have_is_never_the_cpu(device, weights, tmp_path):
    if exported.PROVIDERS[device] in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime runs on {device}")
    path = os.path.join(export(weights, tmp_path / "out"), "model.onnx")
    with pytest.raises(UserError, match=f"{device} was asked for, .* choose the CPU"):
        open_onnx(path, device)
    assert open_onnx(path, "auto")[1].endswith("CPUExecutionProvider")


def predict(capsys, tmp_path, *flags):
    code = evaluation.main([*flags, "--eval_device=cpu", f"--image={tmp_path}/a.png:{tmp_path}/b"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "model.yaml").unlink(), "is a folder without weights/best.pth"),
    (lambda folder: (folder / "model.yaml").write_text(""), "cannot be read"),
    (lambda folder: (folder / "model.onnx").unlink(), "is missing or not the file that"),
    (lambda folder: (folder / "model.onnx").write_bytes(b"x"), "is missing or not the file that"),
], ids=["no description", "empty description", "no model", "another model"])
def test_a_damaged_folder_is_a_sentence(damage, sentence, weights, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    folder = export(weights, tmp_path / "out")
    damage(Path(folder))
    code, error = predict(capsys, tmp_path, f"--trained_model={folder}")
    assert code == 2 and sentence in error and error.count("\n") == 1


def edited(folder, change):
    """Change what model.yaml of a folder says."""
    facts = read_description(folder)
    change(facts)
    with open(os.path.join(folder, "model.yaml"), "w", encoding="utf-8") as stream:
        json.dump(facts, stream)


@pytest.mark.parametrize("change, sentence", [
    (lambda facts: facts["models"][0].update(batch=-1), "models[0].batch is -1"),
    (lambda facts: facts["models"][0].update(batch=3), "does not run with float32 [3, 3, 64, 64]"),
    (lambda facts: facts["models"][0]["input"].pop("mean"), "models[0].input is a dict"),
    (lambda facts: facts["models"][0]["input"].update(std=[0, 1, 1]), "models[0].input is a dict"),
    (lambda facts: facts["image"].update(size=65), "image.size is 65, config.max_size 64"),
    (lambda facts: facts.update(form="detections"), "its outputs are not those of form detections"),
    (lambda facts: facts["outputs"].reverse(), "its outputs are not those of form raw"),
    (lambda facts: facts["outputs"][0].update(shape=[1, 2, 3]), "gives other outputs than"),
    (lambda facts: facts["class_names"].pop(), "there are 3 class_names, config.num_classes is 5"),
    (lambda facts: facts["thresholds"].update(top_k=1.5), "thresholds.top_k is 1.5"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_an_edited_description_is_a_sentence(change, sentence, weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    edited(folder, change)
    for find in (lambda: Segmenter(folder)(noise()), lambda: Predictor(folder, "cpu")(noise())):
        with pytest.raises(UserError) as caught:
            find()
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_edited_thresholds_are_those_of_eval_and_run_py(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    before = Predictor(folder, device="cpu")(noise())
    edited(folder, lambda facts: facts["thresholds"].update(score=0.3, iou=0.2))
    after, alone = Predictor(folder, device="cpu")(noise()), Segmenter(folder)(noise())
    assert 0 < len(after) < len(before) and after.scores.min() > 0.3
    np.testing.assert_allclose(after.scores, alone.scores, atol=1e-5)


@pytest.mark.parametrize("flags, sentence", [
    (["--fast_nms=False"], "has its suppression inside"),
    (["--max_num_detections=5"], "has its suppression inside (fast, 100 detections)"),
    (["--config=yolact_base"], "was exported from yolact_shapes"),
])
def test_flags_that_an_export_cannot_follow(flags, sentence, weights, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    folder = export(weights, tmp_path / "out", "--outputs=detections")
    code, error = predict(capsys, tmp_path, f"--trained_model={folder}", *flags)
    assert code == 2 and sentence in error
