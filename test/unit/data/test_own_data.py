"""Own data from the command line: any ids and names train, score and predict; defects are said.

Every program runs in this process: what is tested is its behaviour, not that it starts.
"""

from __future__ import annotations

import csv
import json
import math
import re

import cv2
import numpy as np
import pytest

import eval as eval_program
import train
from data.description import format_dataset_file
from utils import checkpoint
from utils.weights_folder import find_checkpoint

SIDE = 96
CLASSES = {
    "zero_based": [(0, "ant"), (1, "bee"), (2, "cow")],
    "gaps": [(3, "ant"), (70, "bee"), (900, "cow")],
    "shuffled": [(9, "cow"), (2, "ant"), (5, "bee")],
    "one_class": [(1, "person")],
    "200_classes": [(n, f"kind {n}") for n in range(1, 201)],
    "unicode": [(1, "\u732b"), (2, "chat noir, \u00e9t\u00e9"), (3, "\u043a\u043e\u0442 \"x\"")],
}


def square(number, image_id, category_id, x, y, side, crowd=False):
    outline = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    if crowd:
        start = x * SIDE + y
        outline = {"size": [SIDE, SIDE], "counts": [start, side, SIDE * SIDE - start - side]}
    return {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": int(crowd),
            "area": side * side, "bbox": [x, y, side, side], "segmentation": outline}


def content_of(classes, first_image):
    """Four images: two with objects, one of a crowd alone, one of nothing."""
    images = [{"id": first_image + n, "file_name": f"{n}.png", "width": SIDE,
               "height": SIDE} for n in range(4)]
    chosen = [classes[n % len(classes)][0] for n in (0, len(classes) // 2, len(classes) - 1)]
    objects = [square(1, first_image, chosen[0], 10, 10, 40),
               square(2, first_image, chosen[1], 50, 40, 30),
               square(3, first_image + 1, chosen[2], 20, 30, 50),
               square(4, first_image + 2, chosen[0], 5, 5, 40, crowd=True)]
    return {"images": images, "annotations": objects,
            "categories": [{"id": number, "name": name} for number, name in classes]}


def write(folder, classes, change=None):
    """Both splits with pictures, and their description; returns its path."""
    splits = {}
    for n, split in enumerate(("train", "val")):
        content = content_of(classes, 100 * n)
        if change is not None and split == "train":
            change(content)
        (folder / split).mkdir(parents=True)
        for image in content["images"]:
            pixels = np.random.RandomState(n).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
            cv2.imwrite(str(folder / split / str(image["file_name"])), pixels)
        (folder / (split + ".json")).write_text(json.dumps(content), encoding="utf-8")
        splits[split] = (split, split + ".json")
    names = [name for _, name in sorted(classes)]
    (folder / "my.yaml").write_text(format_dataset_file(splits, names), encoding="utf-8")
    return folder / "my.yaml"


def train_flags(path, weights):
    return [f"--data={path}", "--config=yolact_shapes", "--batch_size=2", "--max_iter=2",
            "--no_autoscale", "--num_workers=0", "--no_log", "--node_device=cpu",
            f"--save_folder={weights}"]


@pytest.mark.parametrize("kind", CLASSES)
def test_train_evaluate_predict(tmp_path, capsys, kind):
    classes = CLASSES[kind]
    names = [name for _, name in sorted(classes)]
    path = write(tmp_path / "data", classes)

    assert train.main(train_flags(path, tmp_path / "weights")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    losses = [float(number) for line in lines for number in re.findall(r"[BCMST]: (\S+)", line)]
    assert len(losses) == 10 and all(math.isfinite(loss) for loss in losses)

    weights = find_checkpoint("latest", str(tmp_path / "weights"), "yolact_shapes")
    assert checkpoint.load_for_inference(weights).class_names == names
    shared = [f"--trained_model={weights}", "--eval_device=cpu"]
    results = tmp_path / "results"
    assert eval_program.main(shared + [
        f"--data={path}", "--num_workers=0", "--output_coco_json",
        "--bbox_det_file={}".format(results / "b.json"),
        "--mask_det_file={}".format(results / "m.json"),
        "--per_class_file={}".format(results / "c.csv")]) == 0
    with open(str(results / "c.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [next(iter(set(row.values()) & {name}), None) for row, name in zip(rows, names)] == names
    for name in ("b.json", "m.json"):
        found = json.loads((results / name).read_text())
        # After two steps of 200 classes no score reaches the threshold.
        assert found or kind == "200_classes"
        assert {item["category_id"] for item in found} <= {n for n, _ in classes}
        assert {item["image_id"] for item in found} <= {100, 101, 102, 103}
        assert all(math.isfinite(item["score"]) for item in found)

    source = tmp_path / "data" / "val" / "0.png"
    target = tmp_path / "drawn.png"
    assert eval_program.main(shared + [f"--image={source}:{target}"]) == 0
    assert cv2.imread(str(target)).shape[:2] == (SIDE, SIDE)


def annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


def lose(key):
    return lambda content: content["annotations"][0].pop(key)


DEFECTS = {
    "unknown category": (annotation(category_id=7),
                         "annotation 1 (image 0) has category_id 7, which is not in 'categories'"),
    "unknown image": (annotation(image_id=7), "annotation 1 refers to image id 7"),
    "text as image id": (annotation(image_id="0"), "annotation 1"),
    "repeated image": (lambda c: c["images"].append(c["images"][0]), "image id"),
    "repeated annotation": (lambda c: c["annotations"].append(c["annotations"][0]), "id 1"),
    "repeated class": (lambda c: c["categories"].append({"id": 50, "name": "ant"}), "'ant'"),
    "no classes": (lambda c: c.update(categories=[]), "'categories' is empty"),
    "no images": (lambda c: c.update(images=[]), "'images' is empty"),
    "image of no file": (lambda c: c["images"].append(
        {"id": 77, "file_name": "sub/none.png", "width": 9, "height": 9}), None),
    "no outline": (annotation(segmentation=[]), "dropped 1 annotation with no segmentation: id 1"),
    "zero width": (annotation(bbox=[5, 5, 0, 9]),
                   "dropped 1 annotation with a bbox of zero or negative size: id 1"),
    "box not finite": (annotation(bbox=[5, 5, float("nan"), 9]), "with a bbox that is not "
                                                                 "four finite numbers: id 1"),
    "box outside": (annotation(bbox=[500, 5, 9, 9]),
                    "dropped 1 annotation with a bbox outside the image: id 1"),
    "corners for sizes": (
        lambda c: [item.update(bbox=[30, 30, 60, 60], segmentation=[
            [30, 30, 60, 30, 60, 60, 30, 60]]) for item in c["annotations"][:3]],
        "only when read as x1, y1, x2, y2"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_stop_training_with_a_sentence(tmp_path, capsys, name):
    change, expected = DEFECTS[name]
    path = write(tmp_path, CLASSES["gaps"], change)
    if expected is None:
        expected = "sub/none.png (image 77)"
    assert train.main(train_flags(path, tmp_path / "weights") + ["--strict"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert expected in message and "train" in message
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("flags,expected", [
    (["--batch_size=5"], "the training set has 4 images, fewer than one step of batch size 5"),
    (["--batch_size=1", "--accumulate=5"], "on 1 card x 5 parts; lower --accumulate"),
    (["--pred_scales=24,48"], "a list of sides for each of the 3 pyramid levels"),
    (["--data=nowhere.yaml"], "dataset file not found: looked for"),
    (["--train_images=x"], "--train_images and --train_info belong together"),
])
def test_mistakes_in_flags(tmp_path, capsys, flags, expected):
    path = write(tmp_path, CLASSES["gaps"])
    assert train.main(train_flags(path, tmp_path / "weights") + flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and expected in message


def test_an_image_that_breaks_during_training(tmp_path, capsys):
    path = write(tmp_path, CLASSES["one_class"])
    for image in (tmp_path / "train").iterdir():
        image.write_bytes(image.read_bytes()[:-40])
    assert train.main(train_flags(path, tmp_path / "weights")) == 2
    message = capsys.readouterr().err
    assert "is truncated" in message and "train.json" in message


def test_a_class_list_for_other_data_is_refused_before_training(tmp_path, capsys):
    path = write(tmp_path, CLASSES["gaps"])
    path.write_text(path.read_text().replace('"bee"', '"wasp"'))
    assert train.main(train_flags(path, tmp_path / "weights")) == 2
    assert "class 2 of names is 'wasp', but category 2 of" in capsys.readouterr().err
