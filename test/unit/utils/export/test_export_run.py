"""run.py of an exported folder finds alone what eval.py does: NumPy, OpenCV, ONNX Runtime."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch

import eval as evaluation
from helpers.exports import export, require_onnx
from helpers.prediction_weights import noise, save_plus_weights, save_weights
from utils.errors import UserError
from utils.export import run
from utils.export.folder import new_folder
from utils.export.run import Segmenter, run_lengths

require_onnx()
pytestmark = pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                                reason="exports are made with current PyTorch")

ALONE = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "yaml", "onnx", "pycocotools", "PIL", "matplotlib",
                                  "utils", "data", "layers", "yolact"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(folder, cwd, *arguments):
    """Run the folder's run.py where nothing else can be imported; exit code, output, errors."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, os.path.join(folder, "run.py"), *arguments],
                          cwd=str(cwd), env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("kind", ["raw", "detections", "plus"])
def test_run_py_finds_and_draws_what_eval_does(kind, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "plus":
        weights, flags = save_plus_weights(tmp_path / "weights"), []
    else:
        flags = [f"--outputs={kind}"]
    folder = export(weights, tmp_path / "out", *flags)
    (tmp_path / "elsewhere").mkdir()
    cv2.imwrite("a.png", noise(111, 150))
    code, out, errors = run_alone(folder, tmp_path / "elsewhere", "../a.png", "--out=drawn",
                                  "--top_k=9")
    assert code == 0, errors
    assert evaluation.main([f"--trained_model={weights}", "--image=a.png:b.png", "--top_k=9",
                            "--output_json", "--eval_device=cpu"]) == 0
    ours, theirs = json.loads(out), json.loads((tmp_path / "b.json").read_text())
    assert len(ours) == len(theirs) == 9
    for one, other in zip(ours, theirs):
        assert one["category_name"] == other["category_name"]
        assert one["category_id"] == other["category_id"]
        assert abs(one["score"] - other["score"]) < 1e-4
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.05)
        masks = [pycocotools.mask.decode(record["segmentation"]) for record in (one, other)]
        assert (masks[0] != masks[1]).sum() <= 2
    drawn = cv2.imread("elsewhere/drawn/a.png").astype(int)
    assert (np.abs(drawn - cv2.imread("b.png")).max(2) > 0).mean() < 1e-3


def test_run_py_is_one_file_of_ours(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    with open(os.path.join(folder, "run.py"), encoding="utf-8") as stream:
        tree = ast.parse(stream.read())
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in tree.body if isinstance(node, ast.Import)
                for name in node.names}
    assert modules <= {"__future__", "argparse", "colorsys", "contextlib", "cv2", "dataclasses",
                       "difflib", "errno", "hashlib", "importlib", "json", "numpy", "os", "pathlib",
                       "re", "stat", "struct", "sys", "typing"}
    assert ast.get_docstring(tree).startswith("Find objects with an exported YOLACT")
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(defined) == len(set(defined)) and {"UserError", "draw_instances",
                                                  "ExportedModel"} <= set(defined)


def test_run_py_is_imported(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    code = ("import cv2, numpy, run; found = run.Segmenter()(numpy.zeros((50, 60, 3), 'uint8'));"
            "print(found.masks.shape, found.draw().shape, len(found.class_names))")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE,
                          timeout=120, universal_newlines=True)
    shape, drawn = done.stdout.rsplit("(", 1)
    assert shape.startswith("(100, 50, 60)") and drawn.startswith("50, 60, 3) 100")


@pytest.mark.parametrize("arguments, sentence", [
    (["a.png", "--model=/absent"], "no exported model '/absent'"),
    (["a.png", "--out=a.png"], "cannot write 'a.png': File exists"),
])
def test_run_py_says_what_is_wrong(arguments, sentence, weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    code, out, errors = run_alone(folder, tmp_path, *arguments)
    assert code == 2 and out == ""
    assert errors.startswith("error: ") and sentence in errors and errors.count("\n") == 1


def test_a_name_that_no_library_of_onnx_takes_is_said(weights, tmp_path):
    other = str(tmp_path / "gbk\udcd6")
    with pytest.raises(UserError, match="not in UTF-8"), new_folder(other):
        pass
    os.rename(export(weights, tmp_path / "out"), other)
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    code, out, errors = run_alone(other, tmp_path, "a.png")
    assert code == 2 and out == "" and "a name that is not in UTF-8" in errors


def test_run_py_keeps_the_others_where_an_image_is_bad(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    (tmp_path / "drawn" / "taken.png").mkdir(parents=True)
    for name in ("a.png", "b.png", "taken.png"):
        cv2.imwrite(str(tmp_path / name), noise())
    (tmp_path / "text.png").write_text("no image")
    cv2.imwrite(str(tmp_path / "whole.jpg"), noise())
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    header = (tmp_path / "a.png").read_bytes()
    sizes = struct.pack(">4sII5B", b"IHDR", 60000, 60000, 8, 2, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(
        header[:12] + sizes + struct.pack(">I", zlib.crc32(sizes)) + header[33:])
    (tmp_path / "c.avif").write_bytes(b"\0\0\0\x20ftypavif")
    code, out, errors = run_alone(
        folder, tmp_path, "text.png", "a.png", "taken.png", "absent.png", "huge.png", "b.png",
        "half.jpg", "c.avif", "--out=drawn", "--top_k=1")
    assert code == 2
    assert [(record["image_id"], record["file_name"]) for record in json.loads(out)] == [
        (2, "a.png"), (3, "taken.png"), (6, "b.png")]
    reason = "is missing or no image that OpenCV can read"
    large = "is too large: 60000 x 60000 pixels, at most 178956970 are read"
    assert errors.splitlines() == [
        f"error: 'text.png' {reason}", "error: cannot write 'drawn/taken.png': Is a directory",
        f"error: 'absent.png' {reason}", f"error: 'huge.png' {large}",
        "error: 'half.jpg' is truncated, the end of the image is missing; copy it again",
        "error: 'c.avif' is an AVIF image, which is not read here; save it as JPEG or PNG"]
    assert sorted(os.listdir(str(tmp_path / "drawn"))) == ["a.png", "b.png", "taken.png"]


def test_run_py_draws_images_of_one_name_apart(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/a.png", "a_1.jpg"):
        cv2.imwrite(str(tmp_path / name), noise())
    code, _, errors = run_alone(folder, tmp_path, "a.png", "b/a.png", "a_1.jpg", "--out=drawn")
    assert code == 0, errors
    assert sorted(os.listdir(str(tmp_path / "drawn"))) == ["a_1.png", "a_1_3.png", "a_2.png"]


def test_run_py_replaces_no_image(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    before = (tmp_path / "a.png").read_bytes()
    code, out, errors = run_alone(folder, tmp_path, "a.png", "--out=.")
    assert code == 2 and out == "" and "'.' is both the folder of 'a.png' and" in errors
    assert (tmp_path / "a.png").read_bytes() == before


def test_run_py_reports_its_use_to_nobody(weights, tmp_path, monkeypatch):
    folder = export(weights, tmp_path / "out")
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    for name in ("HOME", "XDG_CACHE_HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    assert run_alone(folder, tmp_path, "a.png")[0] == 0
    assert os.listdir(str(tmp_path / "HOME")) == os.listdir(str(tmp_path / "XDG_CACHE_HOME")) == []


def test_run_py_takes_pixels_as_eval_does(weights, tmp_path):
    folder = export(weights, tmp_path / "out")
    dark = noise().astype(np.uint16)
    for name, pixels in (("full.png", dark * 256), ("dark.png", dark), ("half.png", noise())):
        cv2.imwrite(str(tmp_path / name), pixels)
    code, out, errors = run_alone(folder, tmp_path, "full.png", "half.png", "--top_k=1")
    first, second = json.loads(out)
    assert code == 0 and dict(first, image_id=2, file_name="half.png") == second
    code, out, errors = run_alone(folder, tmp_path, "dark.png")
    assert code == 2 and "'dark.png': the image is uint16 up to 255, expected values up" in errors


@pytest.mark.parametrize("flag", ["--top_k=-1", "--score_threshold=nan", "--score_threshold=2"])
def test_run_py_takes_no_senseless_numbers(flag, weights, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    folder = export(weights, tmp_path / "out")
    code, out, errors = run_alone(folder, tmp_path, "a.png", flag)
    assert code == 2 and out == "" and "--top_k has to be at least 0" in errors


@pytest.mark.parametrize("image, found", [
    (None, "a NoneType"), (np.zeros((5, 5), np.uint8), "uint8 [5, 5]"),
    (np.zeros((5, 5, 4), np.uint8), "uint8 [5, 5, 4]"),
    (np.zeros((5, 5, 3), np.float32), "float32 [5, 5, 3]"),
    (np.zeros((0, 5, 3), np.uint8), "uint8 [0, 5, 3]")], ids=str)
def test_an_array_that_is_no_image_is_a_sentence(image, found, weights, tmp_path):
    segmenter = Segmenter(export(weights, tmp_path / "out"))
    with pytest.raises(UserError) as caught:
        segmenter(image)
    assert f"image is {found}, expected an array uint8" in str(caught.value)


def test_run_py_ends_at_an_interrupt_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "find", interrupted)
    assert run.main(["a.png"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_run_lengths_are_those_of_coco():
    rng = np.random.RandomState(0)
    masks = [rng.rand(20 + n, 30) < share for n, share in enumerate((0.0, 0.01, 0.5, 0.99, 1.0))]
    rows = np.arange(300)[:, None]
    masks.append((rows - 150) ** 2 + (np.arange(400) - 90) ** 2 < 80 ** 2)
    for mask in masks:
        encoded = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert run_lengths(mask) == encoded["counts"].decode("ascii")
