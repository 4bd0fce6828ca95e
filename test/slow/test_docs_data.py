"""docs/data.md by itself: from raw files to a trained network and drawn predictions, on a CPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import cv2
import pytest
from conftest import ROOT
from PIL import Image

from data.shape_scene import CLASS_NAMES, annotate, draw_scene

DOCUMENT = ROOT / "docs" / "data.md"
TUTORIAL = "From labelme to predictions"
SHAPES = ("circle", "square", "triangle")
IMAGES = 160


def commands(heading=None):
    """Lines of the document's bash blocks, in order; continued lines as one."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if heading is not None:
        text = re.split(r"(?m)^## ", text.split("\n## {}\n".format(heading))[1])[0]
    blocks = re.findall(r"(?s)```bash\n(.*?)```", text)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def write_labelme(folder, count=IMAGES):
    """Drawn scenes of three classes in labelme's form, some rectangles and circles among them."""
    folder.mkdir()
    index = written = 0
    while written < count:
        scene = draw_scene(11, "train", index)
        index += 1
        objects = annotate(scene)
        names = [CLASS_NAMES[item["category_id"] - 1] for item in objects]
        if not objects or set(names) - set(SHAPES) or any(
                isinstance(item["segmentation"], dict) for item in objects):
            continue
        stem = "{:03d}".format(written)
        cv2.imwrite(str(folder / (stem + ".png")), scene.image)
        shapes = [{"label": name, "points": [part[k:k + 2] for k in range(0, len(part), 2)],
                   "shape_type": "polygon", "group_id": n}
                  for n, (name, item) in enumerate(zip(names, objects))
                  for part in item["segmentation"]]
        (folder / (stem + ".json")).write_text(json.dumps({
            "version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": stem + ".png",
            "imageData": None, "imageHeight": scene.image.shape[0],
            "imageWidth": scene.image.shape[1]}))
        written += 1


def write_yolo(folder):
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for n in range(5):
        Image.new("RGB", (40, 30), (50 * n, 9, 9)).save(str(folder / "images" / "{}.png".format(n)))
        (folder / "labels" / "{}.txt".format(n)).write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")


def write_voc(folder):
    for name in ("Annotations", "JPEGImages", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for n in range(5):
        picture = folder / "JPEGImages" / "{}.jpg".format(n)
        Image.new("RGB", (40, 30), (50 * n, 9, 9)).save(str(picture))
        mask = Image.new("P", (40, 30))
        mask.paste(1, (5, 5, 20, 20))
        mask.save(str(folder / "SegmentationObject" / "{}.png".format(n)))
        (folder / "Annotations" / "{}.xml".format(n)).write_text(
            "<annotation><filename>{}.jpg</filename><object><name>cat</name><bndbox><xmin>6</xmin>"
            "<ymin>6</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>".format(n))


def prepare(folder):
    """A folder that looks like the project's, with nothing of a run in it."""
    for name in ("data", "layers", "utils", "train.py", "eval.py", "yolact.py", "backbone.py"):
        os.symlink(str(ROOT / name), str(folder / name))


def execute(line, folder):
    words = shlex.split(line)
    assert words[0] == "python", line
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable] + words[1:], cwd=str(folder), env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, "{}\n{}".format(line, done.stdout)
    return done.stdout


@pytest.mark.slow
def test_from_labelme_to_predictions(tmp_path):
    prepare(tmp_path)
    write_labelme(tmp_path / "raw")
    outputs = {line: execute(line, tmp_path) for line in commands(TUTORIAL)}
    scores = [line for line in "\n".join(outputs.values()).splitlines()
              if re.match(r"  mask \| +[\d.]+ \|", line)]
    assert float(scores[-1].split("|")[1]) > 15
    assert all(name in "\n".join(outputs.values()) for name in SHAPES)
    for name in ("results/first_batch.png", "drawn.png"):
        assert cv2.imread(str(tmp_path / name)) is not None, name


@pytest.mark.slow
def test_other_commands_of_the_document(tmp_path):
    prepare(tmp_path)
    write_labelme(tmp_path / "raw", 5)
    write_yolo(tmp_path / "yolo_data")
    write_voc(tmp_path / "VOC2012")
    execute(commands(TUTORIAL)[0], tmp_path)
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        os.symlink(str(tmp_path / "raw"), str(tmp_path / "images" / split))
        shutil.copy(str(tmp_path / "mydata" / (split + ".json")), str(tmp_path))
    others = [line for line in commands() if line not in commands(TUTORIAL)]
    assert len(others) > 5
    for line in others:
        execute(line, tmp_path)
