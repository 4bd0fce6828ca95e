"""Inputs of every kind that people bring, mutated with the structure of each in mind.

A kind is a function that writes one below `in` in the current folder and returns what to call.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data import check, convert
from fuzz.mutations import SIDE, as_json, mutate_bytes, mutate_text, photo, write
from fuzz.own_inputs import checkpoints, export, flags, images, run_folder, video, weights
from helpers.coco_files import document, write_images
from helpers.foreign_layouts import LAYOUTS, mat_file
from helpers.foreign_layouts import SIDE as SIDE_OF_LAYOUTS


def coco(rng):
    write_images(Path("in"))
    write(Path("in/a.json"), as_json(rng, document()))
    more = ["--quick"] if rng.random() < 0.7 else ["--pictures=out/p.png"]
    return check.main, ["--train_images=in/images", "--train_info=in/a.json",
                        "--config=yolact_shapes", *more]


YAML = ("train: {images: images, annotations: a.json}\nval: {images: images, annotations: a.json}\n"
        'names: ["chat noir \\u732b", dog, cup]\n',
        "path: .\ntrain: images\nval: images\nnames: {0: dog, 1: cup}\n",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntrain: *c\nnames: [dog]\n")
TAGS = ("!!python/object/apply:os.system ['touch executed']", "!!timestamp 2001-99-99", "&a [*a]",
        "!!int x", "? [1, 2]\n: 3", "!!binary =", "<<: *a", "!!set {a}", "'", "{", "*none", "~",
        "|")


def data_yaml(rng):
    write_images(Path("in"))
    write(Path("in/a.json"), json.dumps(document()).encode("ascii"))
    write(Path("in/labels/a.txt"), b"0 .1 .1 .5 .1 .5 .5")
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


def sbd(rng):
    for name, data in (("a", mat_file()), ("b", mutate_bytes(rng, mat_file()))):
        photo(Path(f"in/img/{name}.png"), size=(SIDE_OF_LAYOUTS,) * 2)
        packed = zlib.compress(data)
        data = rng.choice([data, struct.pack("<II", 15, len(packed)) + packed])
        data = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + data
        write(Path(f"in/inst/{name}.mat"), mutate_bytes(rng, data) if rng.random() < 0.1 else data)
    if rng.random() < 0.3:
        write(Path("in/train.txt"), mutate_text(rng, "a \nb \n"))
    return converted(rng, "sbd")


def folders(rng):
    """Every layout that --data=FOLDER recognises, with some of its files changed, gone or moved."""
    rng.choice(list(LAYOUTS))(Path("in"))
    files = sorted(path for path in Path("in").rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    for path in rng.sample(files, rng.randint(1, 3)):
        data, action = whole[path], rng.randrange(8)
        path.unlink()
        if action == 0:
            path.mkdir()
        elif action == 1:
            path.symlink_to(rng.choice(["..", path.name, "/dev/zero", "nowhere"]))
        elif action == 2:
            path.with_name(rng.choice(["a b", "x" * 200, "\udcb2", "-o", "a\nb", "\u732b"])
                           + path.suffix).write_bytes(data)
        elif action == 3 and path.suffix != ".json":
            path.write_bytes(whole[rng.choice(files)])
        elif action > 3:
            is_json = path.suffix == ".json" and rng.random() < 0.7
            path.write_bytes(as_json(rng, json.loads(data)) if is_json else mutate_bytes(rng, data))
    return check.main, ["in", "--quick", "--config=yolact_shapes"]


KINDS = {kind.__name__: kind for kind in (
    coco, data_yaml, labelme, voc, yolo, masks, sbd, folders, images, video, weights, checkpoints,
    export, flags, run_folder)}
