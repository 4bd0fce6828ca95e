"""A short run of the fuzzer, and inputs that once ended otherwise than right or in a sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from unittest import mock

import cv2
import pytest
import torch
from PIL import Image

from data import convert
from data.annotations.packed import load_annotations
from data.config_file import read_recipe
from data.description import parse_description
from data.image import load_pil, read_header, read_image
from data.tools.conversion import Conversion
from data.tools.yolo import read_yolo
from fuzz import fuzz
from fuzz.inputs import KINDS
from fuzz.mutations import SIDE, photo, write
from fuzz.own_inputs import Nothing, clip
from helpers.coco_files import document
from helpers.paths import ROOT
from helpers.report_files import write_run
from utils import plots, report
from utils.checkpoint import load_for_inference, save_checkpoint
from utils.cli import ArgumentParser, run_main, split_device
from utils.distributed.processes import Processes
from utils.engine.train_flags import parse_train_flags
from utils.errors import UserError
from utils.exported import ExportedModel
from utils.files import digest, read_text
from utils.inference.predict import PredictionOptions, PredictionRun
from utils.parsing import parse_yaml

ROUNDS = 6


def test_a_few_inputs_of_every_kind():
    done = subprocess.run(
        [sys.executable, str(ROOT / "test" / "fuzz" / "fuzz.py"), f"--rounds={ROUNDS}"],
        env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("{") == len(KINDS) and "BAD" not in done.stdout


def run_for_ever():
    while True:
        pass


@pytest.mark.parametrize("command, outcome", [
    (lambda: 0, "right"),
    (lambda: {}["key"], "BAD traceback: KeyError: 'key'"), (run_for_ever, "BAD hang"),
    (lambda: os.mkdir("executed"), "BAD executed"), (lambda: 3, "BAD exit code 3"),
    (lambda: os.remove("keep/user.txt"), "BAD files"), (lambda: 2, "BAD exit code 2")])
def test_bad_outcomes_are_noticed(tmp_path, monkeypatch, command, outcome):
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setitem(fuzz.KINDS, "planted", lambda rng: (lambda argv: command(), []))
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, fuzz.too_long)
    try:
        assert fuzz.attempt("planted", 0).startswith(outcome)
    finally:
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("text", [
    "names: !!timestamp x", "names: " + "[" * 3000, "names: [" + "a, " * 200000 + "]"])
def test_yaml_that_its_reader_stumbles_over(text):
    with pytest.raises(UserError, match="^a.yaml: "):
        parse_yaml(text, "a.yaml")


BOMB = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))


@pytest.mark.parametrize("text", [
    BOMB + "train: *a11\nnames: [a]", BOMB + "train: images\nnames: *a11",
    "train: " + "x" * 5000 + "\nnames: [a]", "train: images\nnames: {0: {1: 2}}"])
def test_descriptions_of_yolo_that_explode(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_yolo(tmp_path, Conversion())
    assert len(str(error.value)) < 11000


@pytest.mark.parametrize("value, said", [
    ("a\nb\x1b[2J", r"a\nb\x1b[2J"), ("\u732b", "\u732b"), ("9" * 5000, "99 ... 99"), ("--", "--")])
def test_an_error_is_one_line_whatever_was_given(capsys, value, said):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--n", type=int)
    assert run_main(lambda argv: parser.parse_args(argv) is None, [f"--n={value}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert said in message and len(message) < 2100


def refused(main, *words):
    """The sentence that a command ends with, whatever is in its way."""
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        assert run_main(main, [str(word) for word in words]) == 2
    return streams[1].getvalue().splitlines()[-1]


def test_a_category_id_of_more_than_64_bits(tmp_path):
    content = document()
    content["categories"][1]["id"] = 10 ** 30
    write(tmp_path / "a.json", json.dumps(content).encode("ascii"))
    with pytest.raises(UserError, match="needs an integer id"):
        load_annotations(tmp_path / "a.json")


def test_a_circle_of_endless_radius_is_the_image(tmp_path):
    photo(tmp_path / "0.png")
    (tmp_path / "0.json").write_text(json.dumps({"imagePath": "0.png", "shapes": [
        {"label": "a", "points": [[1, 1], [1e308, 9]], "shape_type": "circle"}]}))
    assert run_main(convert.main, ["labelme", str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    made, = json.loads((tmp_path / "out" / "train.json").read_text())["annotations"]
    assert made["bbox"] == [0, 0, *SIDE]


def test_a_mask_with_a_damaged_chunk():
    png = io.BytesIO()
    Image.new("L", (40, 30), 1).save(png, "PNG")
    with pytest.raises(OSError, match="is not an image that can be read"):
        load_pil(png.getvalue().replace(b"IDAT", b"\0{\xb6\x03"))


def test_a_mask_whose_last_chunk_promises_gigabytes(tmp_path):
    photo(tmp_path / "images" / "a.png")
    png = io.BytesIO()
    Image.new("L", SIDE, 3).save(png, "PNG")
    write(tmp_path / "masks" / "a.png",
          png.getvalue().replace(b"\0\0\0\0IEND", b"\x7f\xff\xff\xffIEND"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (fuzz.used_memory() + fuzz.MEMORY, before[1]))
    try:
        assert run_main(convert.main, ["masks", str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("number", ["9" * 5000, "\u00b2"])
def test_digits_that_are_no_number(tmp_path, number):
    assert split_device(f"npu:{number}") == (f"npu:{number}", None)
    with pytest.raises(UserError, match="RANK is "):
        Processes.from_env({"RANK": number, "WORLD_SIZE": "2"})
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text(
        f"train: images\nnames: {{'{number}': a}}", encoding="utf-8")
    with pytest.raises(UserError, match="the keys of names are|not YAML"):
        read_yolo(tmp_path, Conversion())


@pytest.mark.parametrize("flag, said", [
    ("--max_iter", "expected a whole number above 0"), ("--seed", "from 0 to 2147483647"),
    ("--set=max_iter", "expected a whole number, at most 2147483647"),
    ("--lr", "expected a number above 0"), ("--set=lr_steps", "expected a list")])
def test_numbers_beyond_what_counts_them(flag, said):
    assert said in refused(parse_train_flags, f"{flag}={10 ** 40}")


@pytest.mark.parametrize("read", [
    read_image, load_annotations, parse_description, read_text,
    lambda path: read_recipe(str(path))])
def test_files_of_gigabytes_without_content(tmp_path, read):
    with open(str(tmp_path / "a.yaml"), "wb") as stream:
        stream.truncate(1 << 36)
    with pytest.raises(UserError, match="expected at most|not JSON"):
        read(tmp_path / "a.yaml")


@pytest.mark.parametrize("start", [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x75\x30\0\0\x75\x30\x08\2\0\0\0",
    b"\xff\xd8\xff\xc0\0\x11\x08\x75\x30\x75\x30\3"])
def test_a_header_that_promises_gigabytes(tmp_path, start):
    write(tmp_path / "a.png", start + b"\0" * 40 + b"IEND\xaeB`\x82\xff\xda\0\2\xff\xd9")
    with pytest.raises(UserError, match="too large: 30000 x 30000 pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name, content", [
    ("environment.json", "[" * 20000), ("environment.json", '{"sessions": "x"}'),
    ("evaluation/evaluation.json", '{"box": 1}'),
    ("log.jsonl", '{"type": "train", "iteration": "x"}\n')])
def test_a_damaged_run_folder(tmp_path, name, content):
    folder = write_run(tmp_path, steps=2, validations=1)
    (tmp_path / "run" / name).write_text(content, encoding="utf-8")
    with mock.patch.object(plots, "is_available", lambda: False):
        assert folder.path in refused(report.main, folder.path)


@pytest.mark.parametrize("side", [15000, 60000])
def test_a_bitmap_that_promises_gigabytes_is_not_given_to_opencv(tmp_path, monkeypatch, side):
    head = struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, *[0] * 6)
    write(tmp_path / "a.bmp", b"BM" + head + b"\0" * 64)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(UserError, match="the image is too large: "):
        read_image(tmp_path / "a.bmp")


@pytest.mark.parametrize("read", [
    read_image, read_header, load_annotations, parse_description, read_text, digest,
    lambda path: read_recipe(str(path))])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_never_ends_is_not_read(tmp_path, read, kind):
    path = tmp_path / "a.yaml"
    if kind == "pipe":
        os.mkfifo(str(path))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((OSError, UserError), match="a device or a FIFO, expected a file"):
        read(path)


def test_aliases_that_multiply(tmp_path):
    with pytest.raises(UserError, match="99 aliases"):
        parse_yaml(BOMB, "a.yaml")


@pytest.mark.parametrize("name, value, found", [
    ("class_names", 5, "5"), ("class_names", 2 ** 40, "a int"),
    ("category_ids", ["a"], "a list"), ("iteration", "x", "'x'"), ("run_folder", [1], "a list")])
def test_a_damaged_state(tmp_path, name, value, found):
    path = save_checkpoint(str(tmp_path / "w.pth"), {"a.weight": torch.ones(2)}, {name: value})
    with pytest.raises(UserError, match=f"is damaged: {name} is {found};"):
        load_for_inference(path)


def test_priors_whose_header_never_ends(tmp_path):
    model = object.__new__(ExportedModel)
    model.folder, model.facts = str(tmp_path), {"priors": "priors.npy"}
    write(tmp_path / "priors.npy", b"\x93NUMPY\x01\0\x10\0{'descr': ('<f4'\n")
    with pytest.raises(UserError, match="priors.npy' cannot be read"):
        model.priors()


def test_a_video_without_a_frame(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / "out").mkdir()
    write(tmp_path / "v.avi", clip(".avi")[:4096])
    write(tmp_path / "out" / "v.avi", b"the result of before")
    run = PredictionRun(Nothing(), PredictionOptions(show_progress=False), print, print, sys.stderr)
    assert "v.avi" in refused(lambda words: run.video(words[0]), "v.avi:out/v.avi")
    assert (tmp_path / "out" / "v.avi").read_bytes() == b"the result of before"
