"""A folder in which the documents' commands find what they name: data, weights, pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import torch
from documents import OWN_WEIGHTS, ROOT, SMALL
from PIL import Image

from data.config import get_config
from data.shapes import CLASS_NAMES, annotate, draw_scene
from yolact import build_yolact

NOT_LINKED = ("test", "weights", "runs", "logs", "results")
SHAPES = ("circle", "square", "triangle")
TIMEOUT = 300


def environment():
    """Variables under which `python` is the one that runs the tests, without cards or ranks."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {key: value for key, value in os.environ.items() if key not in (
        "ASCEND_DEVICE_ID", "RANK_ID", "RANK_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK",
        "YOLACT_RUNS")}
    return dict(env, PATH=path, PYTHON=sys.executable, PYTHONDONTWRITEBYTECODE="1",
                OMP_NUM_THREADS="1")


def run(line, folder, timeout=TIMEOUT):
    """Type `line` in a shell in `folder`; returns exit code and output."""
    done = subprocess.run(["bash", "-c", line], cwd=str(folder), env=environment(),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=timeout)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def link_project(folder):
    """The project's programs, without the results of any run; launchers write below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in NOT_LINKED:
            os.symlink(str(path), str(folder / path.name))
    (folder / "test").mkdir()
    for path in list((ROOT / "test").glob("*.*")):
        shutil.copy(str(path), str(folder / "test"))
    os.symlink(str(ROOT / "test" / "benchmark"), str(folder / "test" / "benchmark"))


def write_coco(folder, source, train=8, val=3):
    """A few images of `source` in COCO's layout, with all 80 categories."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train2017", train), ("val2017", val)):
        name = f"instances_{split}.json"
        content = json.loads((source / "annotations" / name).read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [item for item in content["annotations"]
                                  if item["image_id"] in kept]
        (folder / "annotations" / name).write_text(json.dumps(content))
        os.symlink(str(source / split), str(folder / split))


def write_pictures(folder):
    """in.jpg, cat.jpg, in_folder, in.mp4."""
    (folder / "in_folder").mkdir()
    pictures = [cv2.resize(draw_scene(3, "val", n).image, (160, 120)) for n in range(4)]
    for name, picture in zip(("in.jpg", "cat.jpg", "in_folder/1.png", "in_folder/2.jpg"), pictures):
        cv2.imwrite(str(folder / name), picture)
    video = cv2.VideoWriter(str(folder / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 120))
    for picture in pictures:
        video.write(picture)
    video.release()


def write_weights(folder):
    """Weights of the paper's network under the original's name: no state beside them."""
    (folder / "weights").mkdir(exist_ok=True)
    torch.manual_seed(0)
    torch.save(build_yolact(get_config("yolact_base")).state_dict(),
               str(folder / "weights" / "yolact_base_54_800000.pth"))


def train_briefly(folder, coco):
    """A training on `coco` that is stopped, for what needs weights of an earlier one."""
    code, output = run(f"python train.py --data='{coco}' {SMALL} --max_iter=1000 --save_interval=2 "
                       "--no_log > log & until grep -q Saved log; do sleep 0.1; done; kill %1; "
                       "wait %1", folder)
    assert code == 130, output + (folder / "log").read_text()
    assert (folder / OWN_WEIGHTS).exists()
    shutil.copy(str(folder / OWN_WEIGHTS), str(folder / "weights" / "last.pth"))
    shutil.copy(str(folder / OWN_WEIGHTS).replace(".pth", ".state"),
                str(folder / "weights" / "last.state"))


def write_labelme(folder, count):
    """Drawn scenes of three classes in labelme's form."""
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
        stem = f"{written:03d}"
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
    """Five images with one triangle each, in YOLO's form."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for n in range(5):
        Image.new("RGB", (40, 30), (50 * n, 9, 9)).save(str(folder / "images" / f"{n}.png"))
        (folder / "labels" / f"{n}.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")


def write_voc(folder):
    """Five images with one object each, in Pascal VOC's form."""
    for name in ("Annotations", "JPEGImages", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for n in range(5):
        picture = folder / "JPEGImages" / f"{n}.jpg"
        Image.new("RGB", (40, 30), (50 * n, 9, 9)).save(str(picture))
        mask = Image.new("P", (40, 30))
        mask.paste(1, (5, 5, 20, 20))
        mask.save(str(folder / "SegmentationObject" / f"{n}.png"))
        (folder / "Annotations" / f"{n}.xml").write_text(
            f"<annotation><filename>{n}.jpg</filename><object><name>cat</name><bndbox><xmin>6</xmin><ymin>6</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>")


def write_masks(folder):
    """Five images with one object each, in the Data Science Bowl's form."""
    for n in range(5):
        for part in ("images", "masks"):
            (folder / str(n) / part).mkdir(parents=True)
        Image.new("RGB", (40, 30), (50 * n, 9, 9)).save(str(folder / f"{n}/images/{n}.png"))
        mask = Image.new("L", (40, 30))
        mask.paste(255, (5, 5, 20, 20))
        mask.save(str(folder / f"{n}/masks/0a.png"))


def write_own_data(folder):
    """raw/ in labelme's form, mydata/ made of it, the same by hand, and the other forms."""
    write_labelme(folder / "raw", 25)
    code, output = run("python -m data.convert labelme raw --out=mydata", folder)
    assert code == 0, output
    (folder / "images").mkdir()
    for split in ("train", "val"):
        os.symlink(str(folder / "raw"), str(folder / "images" / split))
        shutil.copy(str(folder / "mydata" / (split + ".json")), str(folder))
    write_yolo(folder / "yolo_data")
    write_voc(folder / "VOC2012")
    write_masks(folder / "stage1_train")


class World:
    """The folder; `copy` gives a document one of its own."""

    def __init__(self, folder, coco_mini):
        self.folder = folder
        link_project(folder)
        write_coco(folder / "coco", coco_mini)
        write_pictures(folder)
        write_weights(folder)
        write_own_data(folder)
        train_briefly(folder, folder / "coco")

    def copy(self, folder):
        """Everything once more as `folder`, where commands may replace files (none is changed)."""
        shutil.copytree(str(self.folder), str(folder), symlinks=True, copy_function=os.link)
        return Path(folder)
