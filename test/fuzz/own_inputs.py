"""Inputs of programs other than datasets: images, video, weights, exports, flags, run folders."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import pickle
import shutil
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from data import check, convert
from data.config import Config, get_config
from data.image import read_header, read_image
from fuzz.mutations import (
    DEEP,
    HUGE,
    SIDE,
    TEXTS,
    as_json,
    mutate_bytes,
    mutate_tree,
    photo,
    write,
)
from helpers.report_files import write_run
from utils import plots, report
from utils.checkpoint import load_for_inference, save_checkpoint
from utils.engine.train_flags import parse_train_flags, train_parser
from utils.export.__main__ import export_parser, plan_of
from utils.export.folder import PRIORS
from utils.inference.detector import load_model
from utils.inference.eval_flags import eval_parser, parse_eval_flags
from utils.inference.predict import PredictionOptions, PredictionRun
from utils.inference.predictor import Prediction
from utils.inference.video import VideoWriter
from utils.weights.files import read_weights
from utils.weights.paddle import write_pdparams
from utils.weights.safetensors import write_safetensors

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "TGA", "ICO", "PCX",
           "SGI", "DIB", "IM", "MPO", "PDF")


def images(rng):
    path = Path("in/a.img")
    photo(path, rng.choice([name for name in FORMATS if name in Image.SAVE or not Image.init()]))
    data = path.read_bytes()
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:  # a header that promises gigabytes
        header = data[12:16] + b"\0\1\0\0\0\1\0\0" + data[24:29]
        data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    path.write_bytes(mutate_bytes(rng, data))
    return lambda argv: read_image(argv[0]) is None or look(argv[0]), [str(path)]


def look(path):
    """What converters and checks do with an image: read its header alone."""
    with contextlib.suppress(OSError):
        read_header(path)


class Executes:
    """Runs a command when it is unpickled by who trusts it."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def weights(rng):
    path, kind = Path("in/w.bin"), rng.randrange(6)
    path.parent.mkdir(exist_ok=True)
    tensors = collections.OrderedDict((f"backbone.{n}.weight", torch.ones(2, 3)) for n in range(3))
    with open(str(path), "wb") as stream:
        if kind < 2:
            content = rng.choice([tensors, {"state_dict": tensors}, {"model": {"ema": tensors}}])
            torch.save(content, stream, _use_new_zipfile_serialization=bool(kind))
        elif kind == 2:
            write_pdparams(stream, tensors)
        elif kind == 3:
            write_safetensors(stream, tensors, {"a": "b"})
        elif kind == 4:
            value = Executes()
            for _ in range(rng.choice([0, 3, 200])):
                value = rng.choice([(value, value), [value], {"a": value}])
            stream.write(pickle.dumps({"backbone.weight": value}, rng.choice([0, 2, 4])))
        else:
            header = as_json(rng, {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}})
            stream.write(len(header).to_bytes(8, "little") + header + b"\0" * 24)
    if rng.random() < 0.9:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return lambda argv: read_weights(argv[0]) is None, [str(path)]


VALUES = TEXTS + ["nan", "-inf", "1e999", "-1", "0", "1e-400", "auto", "1,2", "[1", "{a: b}", "--",
                  "=", "a=b", "9" * 5000, "True", "none", "1.5", "\r", "\u202e", "~none/x"]


def flags(rng):
    converter, exporter = convert.parser_of("labelme"), export_parser()
    parser, parse, argv = rng.choice([
        (train_parser(), parse_train_flags, []), (eval_parser(), parse_eval_flags, []),
        (check.check_parser(), check.check_parser().parse_args, []),
        (converter, converter.parse_args, ["in", "--out=out"]),
        (exporter, lambda given: plan_of(exporter.parse_args(given)), ["in/w.pth"])])
    words = [word for word in parser._option_string_actions if word not in ("-h", "--help")]
    for _ in range(rng.randint(1, 3)):
        value = rng.choice(VALUES).replace(HUGE, "9" * 5000).replace(DEEP, "[" * 3000)
        argv += rng.choice([[f"{rng.choice(words)}={value}"], [rng.choice(words), value]])
    return lambda given: parse(given) is None, argv


def run_folder(rng):
    folder = Path(str(write_run(Path("in").resolve(), steps=5, validations=2).path))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(2, len(files))):
        data = path.read_bytes()
        path.write_bytes(as_json(rng, json.loads(data)) if path.suffix == ".json"
                         and rng.random() < 0.7 else mutate_bytes(rng, data))
    shutil.move(str(folder), "out")
    draws = rng.random() < 0.02  # a hundred times slower than reading

    def command(argv):
        with mock.patch.object(plots, "is_available", lambda: draws):
            return report.main(argv)

    return command, ["out/" + folder.name]


@functools.lru_cache(maxsize=None)
def clip(ending):
    """Bytes of a video of six frames."""
    with VideoWriter("out/clip" + ending, 5, SIDE) as writer:
        for number in range(6):
            writer.write(np.full((SIDE[1], SIDE[0], 3), 40 * number, np.uint8))
    return Path("out/clip" + ending).read_bytes()


class Nothing:
    """A predictor that finds no object."""

    batch_size = 2

    def find(self, batches, times, progress=None):
        none = np.zeros((0, 4), np.float32)
        for batch in batches:
            for item, pixels in batch:
                times.images += 1
                yield item, Prediction(pixels, none, none[:, 0], none[:, 0].astype(int), [], [],
                                       ["a"], [1])


def video(rng):
    ending = rng.choice([".mp4", ".avi", ".mkv"])
    data = clip(ending)
    at, count = rng.randrange(len(data)), rng.randrange(1, 4000)
    data = rng.choice([data, mutate_bytes(rng, data), data[:at], data[:at] + data[at + count:],
                       data[:at] + b"\0" * count, rng.choice(TEXTS).encode("utf-8", "replace")])
    write(Path("in") / ("v" + rng.choice([ending, ending, ".mp4", ".webm", ".gif"])), data)
    write(Path("out/v.avi"), b"the result of before")
    run = PredictionRun(Nothing(), PredictionOptions(show_progress=False), print, print, sys.stderr)
    # Exit code 1: some frames failed, and it was said.
    return lambda argv: run.video(argv[0]) > 1, [f"{next(Path('in').iterdir())}:out/v.avi"]


def checkpoints(rng):
    state = {"config": get_config("yolact_shapes").to_dict(), "class_names": ["a", "b"],
             "category_ids": [1, 2], "iteration": 5, "run_folder": {"path": "out", "id": "x"}}
    for _ in range(rng.randint(0, 3)):
        state = mutate_tree(rng, state)
    state = state if isinstance(state, dict) else {"config": state}
    save_checkpoint("in/w.pth", {"backbone.0.weight": torch.ones(2)},
                    {str(key): value for key, value in state.items()})
    victim = Path(rng.choice(["in/w.pth", "in/w.state"]))
    if rng.random() < 0.3:
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))

    def load(argv):
        found = load_for_inference(argv[0])
        return found.config is not None and Config.from_dict(found.config) is None

    return load, ["in/w.pth"]


def export(rng):
    write(Path("in/model.onnx"), b"no model")
    np.save("in/priors.npy", np.zeros((9, 4), np.float32))
    known = hashlib.sha256(b"no model").hexdigest()
    facts = {
        "format": 1, "class_names": ["a", "b", "c", "d"], "category_ids": [1, 2, 3, 4],
        "form": "raw", "priors": PRIORS, "image": {"size": 160}, "weights": {"file": "w.pth"},
        "mask_iou": rng.choice([None, {"file": "m.onnx", "sha256": known}]),
        "outputs": [{"name": name, "shape": ["batch", 9, 4] + [4] * (name == "proto")}
                    for name in ("mask", "conf", "loc", "proto")],
        "thresholds": {"score": 0.05, "iou": 0.5, "top_k": 200, "max_detections": 100},
        "models": [{"file": "model.onnx", "batch": 1, "sha256": known, "half": False, "input": {
            "name": "images", "type": "uint8", "layout": "NCHW"}}],
        "config": get_config("yolact_shapes").to_dict()}
    write(Path("in/model.yaml"), b"# comment\n" + as_json(rng, facts))
    victim = Path(rng.choice(["in/priors.npy", "in/model.onnx"]))
    if rng.random() < 0.3:
        victim.write_bytes(mutate_bytes(rng, victim.read_bytes()))
    return lambda argv: load_model(argv[0]) is None, ["in"]
