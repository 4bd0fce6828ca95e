"""Inputs of every kind that people bring, mutated with the structure of each in mind.

A kind is a function that writes one below `in` in the current folder and returns what to call.
"""

from __future__ import annotations

import base64
import collections
import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import check, convert
from data.image import read_image
from helpers.coco_files import document, write_images
from helpers.report_files import write_run
from utils import report
from utils.engine.train_flags import parse_train_flags, train_parser
from utils.inference.eval_flags import eval_parser, parse_eval_flags
from utils.weights.files import read_weights
from utils.weights.paddle import write_pdparams
from utils.weights.safetensors import write_safetensors

HUGE, DEEP = "@HUGE@", "@DEEP@"
HOSTILE = (None, True, "", "\0", "a\0b", "x" * 5000, "\ud800", "\x1b[2J", "../../x", "/dev/zero",
           "a\nb", "=1+1", -1, 0, 1e308, float("nan"), float("inf"), 2 ** 31, 2 ** 63, 10 ** 30,
           HUGE, DEEP, [], {}, [[]], [None], "1e999", "0x10", " 7 ", "<b>", "1" * 40)
TEXTS = [value for value in HOSTILE if isinstance(value, str)]
SIDE = (40, 30)


# What mutates

def places(value, path=()):
    """Paths of all parts of nested lists and dictionaries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, part in items:
        yield from places(part, path + (key,))


def mutate_tree(rng, value):
    """Change one part of nested lists and dictionaries, in place where that is possible."""
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice([value, rng.choice(HOSTILE)])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action, key = rng.randrange(6), path[-1]
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.append(parent[key])
    elif action == 2:
        parent[key] = [parent[key]]
    elif action == 3 and isinstance(parent[key], (int, float)):
        parent[key] = rng.choice([-parent[key], parent[key] * 10 ** 6, str(parent[key]), 0.5])
    else:
        parent[key] = rng.choice(HOSTILE)
    return value


def as_json(rng, value):
    """JSON of a tree after some mutations; sometimes not quite."""
    for _ in range(rng.randint(1, 3)):
        value = mutate_tree(rng, value)
    text = json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).replace(
        json.dumps(DEEP), "[" * 20000 + "]" * rng.choice([20000, 0]))
    data = text.encode("ascii")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def mutate_bytes(rng, data):
    """Flip, cut, repeat or insert some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(6)
        if action == 0:
            del data[at:]
        elif action == 1:
            data[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif action == 2:
            data[at:at] = data[at:at + rng.randrange(1, 60)] * rng.choice([1, 3])
        elif action == 3:
            data[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif at < len(data):
            data[at] = rng.randrange(256)
    return bytes(data)


def mutate_text(rng, text):
    """Replace a word of a text, or mutate its bytes."""
    if rng.random() < 0.2:
        return text.encode("utf-8")
    if rng.random() < 0.3:
        return mutate_bytes(rng, text.encode("utf-8"))
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        words[rng.randrange(len(words))] = rng.choice(TEXTS)
    return " ".join(words).replace(HUGE, "9" * 5000).replace(DEEP, "[" * 3000).encode(
        "utf-8", "surrogatepass")


def photo(path, kind=None, rng=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (SIDE[1], SIDE[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(str(path), kind)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# A kind is a function that writes a mutated input below `in` and returns what to call.

def coco(rng):
    write_images(Path("in"))
    write(Path("in/a.json"), as_json(rng, document()))
    more = ["--quick"] if rng.random() < 0.7 else ["--pictures=out/p.png"]
    return check.main, ["--train_images=in/images", "--train_info=in/a.json",
                        "--config=yolact_shapes", *more]


YAML = ("train: {images: images, annotations: a.json}\nval: {images: images, annotations: a.json}\n"
        "names: [dog, cup]\n", "path: .\ntrain: images\nval: images\nnames: {0: dog, 1: cup}\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: *c\nnames: [dog]\n")
TAGS = ("!!python/object/apply:os.system ['touch executed']", "!!timestamp 2001-99-99", "&a [*a]",
        "!!int x", "? [1, 2]\n: 3", "!!binary =", "<<: *a", "!!set {a}", "'", "{", "*none", "~",
        "|")


def data_yaml(rng):
    write_images(Path("in"))
    write(Path("in/a.json"), json.dumps(document()).encode("ascii"))
    words = rng.choice(YAML).split(" ")
    if rng.random() < 0.5:
        words[rng.randrange(len(words))] = rng.choice(TAGS)
    write(Path("in/data.yaml"), mutate_text(rng, " ".join(words)))
    return check.main, ["in/data.yaml", "--quick", "--config=yolact_shapes"]


def converted(rng, kind):
    """The command that converts, or the one that recognises the folder."""
    if rng.random() < 0.3:
        return check.main, ["in", "--quick", "--config=yolact_shapes"]
    return convert.main, [kind, "in", "--out=out", *rng.choice([[], ["--skip_bad"]]), *rng.choice(
        [[], ["--val_fraction=0"]])]


def labelme(rng):
    png = io.BytesIO()
    Image.new("L", (5, 4), 255).save(png, "PNG")
    encoded = base64.b64encode(mutate_bytes(rng, png.getvalue())).decode("ascii")
    for n in range(2):
        photo(Path(f"in/{n}.png"))
        content = {"imagePath": f"{n}.png", "imageWidth": 40, "imageHeight": 30, "shapes": [
            {"label": "a", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"},
            {"label": "b", "points": [[5, 5], [9, 9]], "shape_type": "circle", "group_id": 1},
            {"label": "b", "points": [[5, 5], [9, 9]], "shape_type": "rectangle", "group_id": 1},
            {"label": "c", "points": [[5, 5], [9, 9]], "shape_type": "mask", "mask": encoded}]}
        write(Path(f"in/{n}.json"), as_json(rng, content))
    return converted(rng, "labelme")


def voc(rng):
    text = ("<annotation> <filename>0.png</filename> <size> <width>40</width> <height>30</height> "
            "</size> <object> <name>a</name> <bndbox> <xmin>2</xmin> <ymin>2</ymin> "
            "<xmax>9</xmax> <ymax>9</ymax> </bndbox> <polygon> <x1>2</x1> <y1>2</y1> <x2>9</x2> "
            "<y2>2</y2> <x3>9</x3> <y3>9</y3> </polygon> </object> </annotation>")
    bomb = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "x"}">' for n in range(12))
    start = rng.choice(["", "", "", '<?xml version="1.0" encoding="gbk"?>', '<?xml encoding="x" ?>',
                        f"<!DOCTYPE d [{bomb}]><!-- -->", '<!DOCTYPE d SYSTEM "/dev/zero">'])
    text = start + text.replace(">a<", rng.choice([">a<"] * 4 + [">&a11;<", ">&none;<"]))
    photo(Path("in/JPEGImages/0.png"))
    write(Path("in/Annotations/0.xml"), mutate_text(rng, text))
    if rng.random() < 0.5:
        png = io.BytesIO()
        Image.fromarray(np.eye(30, 40, dtype=np.uint8) * 3).save(png, "PNG")
        write(Path("in/SegmentationObject/0.png"), mutate_bytes(rng, png.getvalue()))
    return converted(rng, "voc")


def yolo(rng):
    for n in range(2):
        photo(Path(f"in/images/{n}.png"))
        write(Path(f"in/labels/{n}.txt"),
              mutate_text(rng, "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.4 0.2 0.4 0.4 \n"))
    if rng.random() < 0.5:
        write(Path("in/data.yaml"), mutate_text(
            rng, "path: .\ntrain: images\nval: images\nnames: {0: dog, 1: cup}\n"))
    else:
        write(Path("in/classes.txt"), mutate_text(rng, "dog\ncup\n"))
    return converted(rng, "yolo")


def masks(rng):
    for n in range(2):
        photo(Path(f"in/images/{n}.png"))
        png = io.BytesIO()
        mode, fill = rng.choice([("L", 3), ("P", 2), ("1", 1), ("I;16", 400), ("RGB", (9, 9, 9)),
                                 ("RGBA", (9, 0, 0, 0)), ("LA", (5, 5))])
        mask = Image.new(mode, rng.choice([SIDE, SIDE, SIDE, (30, 40), (1, 1)]))
        mask.paste(fill, (3, 3, 20, 20))
        mask.save(png, "PNG")
        data = png.getvalue()
        name = rng.choice([f"{n}.png", f"{n}/0.png", f"{n}_1.png", f"{n}_mask.png", "9.png"])
        write(Path("in/masks") / name, mutate_bytes(rng, data) if rng.random() < 0.5 else data)
    return converted(rng, "masks")


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
    return lambda argv: read_image(argv[0]) is None, [str(path)]


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
    name, parser, parse = rng.choice([
        ("train", train_parser(), parse_train_flags), ("eval", eval_parser(), parse_eval_flags),
        ("check", check.check_parser(), check.check_parser().parse_args)])
    words = [word for word in parser._option_string_actions if word not in ("-h", "--help")]
    argv = []
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
    return report.main, ["out/" + folder.name]


KINDS = {kind.__name__: kind for kind in (coco, data_yaml, labelme, voc, yolo, masks, images,
                                          weights, flags, run_folder)}
