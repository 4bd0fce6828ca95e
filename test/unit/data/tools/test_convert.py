"""Converters: what comes out is what was drawn, the same every time; broken input is a sentence."""

from __future__ import annotations

import base64
import json
import os

import cv2
import numpy as np
import pytest

from data import convert
from data.convert import recognise
from data.tools import source_files
from data.tools.conversion import Conversion
from helpers.convert_files import HEIGHT, WIDTH, drawn, iou, masks_of, opened, picture, run
from utils.cli import run_main
from utils.errors import UserError


def shape(label, points, kind="polygon", group=None, **more):
    return dict({"label": label, "points": points, "shape_type": kind, "group_id": group}, **more)


def labelme(folder, stem, shapes, image=True, **changes):
    if image:
        picture(folder / (stem + ".jpg"))
    content = dict({"imagePath": stem + ".jpg", "imageWidth": WIDTH, "imageHeight": HEIGHT,
                    "shapes": shapes}, **changes)
    (folder / (stem + ".json")).write_text(json.dumps(content), encoding="utf-8")


# labelme

SQUARE = [[4, 4], [20, 4], [20, 20], [4, 20]]


def test_labelme_shapes(tmp_path, capsys):
    raw = tmp_path / "raw"
    ok, png = cv2.imencode(".png", np.full((6, 9), 255, np.uint8))
    labelme(raw, "a", [
        shape("b\u00e4r", SQUARE), shape("cup", [[40, 30], [30, 10]], "rectangle"),
        shape("cup", [[50, 20], [50, 30]], "circle"),
        shape("dog", [[0, 0], [5, 0], [5, 5], [0, 5]], group=1),
        shape("dog", [[10, 40], [20, 40], [20, 45], [10, 45]], group=1),
        shape("fox", [[50, 40], [58, 45]], "mask", mask=base64.b64encode(png).decode()),
        shape("__ignore__", SQUARE)])
    labelme(raw, "empty", [])
    (raw / "other.json").write_text("[1]")
    code, out = run(capsys, "labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert code == 0
    assert "2 images (1 without objects), 5 objects" in out
    dataset = opened(tmp_path / "out")
    assert dataset.class_names == ["b\u00e4r", "cup", "dog", "fox"]
    found = masks_of(dataset, 0)
    assert [name for name, _ in found] == ["b\u00e4r", "cup", "cup", "dog", "fox"]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = [drawn(4, 4, 20, 20), drawn(30, 10, 40, 30),
             (x + 0.5 - 50) ** 2 + (y + 0.5 - 20) ** 2 <= 100,
             drawn(0, 0, 5, 5) | drawn(10, 40, 20, 45), drawn(50, 40, 59, 46)]
    for (name, mask), expected in zip(found, truth):
        assert iou(mask, expected) > 0.95, name
    assert dataset.report.dropped == 0 and not dataset.report.notes


def test_same_input_gives_the_same_files(tmp_path, capsys):
    raw = tmp_path / "raw"
    for n in range(10):
        labelme(raw, f"i{n}", [shape("ab"[n % 2], SQUARE)])
    texts = []
    for seed in (0, 0, 1):
        code, out = run(capsys, "labelme", raw, "--out", tmp_path / "my out", "--seed", seed)
        assert code == 0 and out.endswith("my out/data.yaml'\n")  # a command to paste
        texts.append([(tmp_path / "my out" / name).read_bytes()
                      for name in ("train.json", "val.json", "data.yaml")])
    assert texts[0] == texts[1] != texts[2]
    parts = [opened(tmp_path / "my out", split) for split in ("train", "val")]
    assert [len(part) for part in parts] == [8, 2]
    assert not set(parts[0].image_ids) & set(parts[1].image_ids)


def test_json_and_images_in_different_folders(tmp_path, capsys):
    raw = tmp_path / "raw"
    for folder in ("a", "b"):
        picture(raw / "images" / folder / "x.jpg")
        (raw / "labels" / folder).mkdir(parents=True)
        labelme(raw / "labels" / folder, "x", [shape("cat", SQUARE)], image=False,
                imagePath=f"..\\..\\images\\{folder}\\x.jpg")
    assert run(capsys, "labelme", raw, "--out", tmp_path / "o", "--val_fraction=0")[0] == 0
    dataset = opened(tmp_path / "o")
    assert [dataset.image_info(n)[0] for n in range(2)] == ["a/x.jpg", "b/x.jpg"]
    assert dataset[1].image.shape == (HEIGHT, WIDTH, 3)


BROKEN_SHAPES = {
    "two points": (shape("a", [[1, 1], [5, 5]]), "an outline of 2 points"),
    "a line": (shape("a", [[1, 1], [5, 5]], "line"), "shape_type 'line' of 2 points has no area"),
    "no area": (shape("a", [[1, 1], [5, 5], [9, 9]]), "an outline without area"),
    "outside": (shape("a", [[100, 1], [120, 1], [120, 9]]), "outside the image of 64 x 48"),
    "text": (shape("a", [["1", "2"]] * 3), "points are not a list of x, y pairs"),
    "infinite": (shape("a", [[1, 1], [float("inf"), 5], [3, 9]]), "not finite"),
    "no label": (shape("", SQUARE), "has no label"),
    "no mask": (shape("a", [[1, 1], [5, 5]], "mask", mask="?"), "not a PNG in base64"),
    "not a mapping": ([], "has no label"),
}


@pytest.mark.parametrize("name", BROKEN_SHAPES)
def test_broken_shapes_are_named(tmp_path, capsys, name):
    broken, expected = BROKEN_SHAPES[name]
    raw = tmp_path / "raw"
    labelme(raw, "a", [shape("cat", SQUARE), broken])
    code, message = run(capsys, "labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert code == 2 and message.count("\n") == 1
    assert message.startswith("error: {}: shape 2".format(raw / "a.json"))
    assert expected in message and message.count("--skip_bad") == 1
    assert not (tmp_path / "out").exists()
    code, out = run(capsys, "labelme", raw, "--out", tmp_path / "out", "--val_fraction=0",
                    "--skip_bad")
    assert code == 0 and "left out: " in out and expected in out and "1 objects" in out


def test_images_without_a_labelme_file_are_counted(tmp_path, capsys):
    raw = tmp_path / "raw"
    labelme(raw, "a", [shape("cat", SQUARE)])
    flags = ("labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert "without a labelme file" not in run(capsys, *flags)[1]
    picture(raw / "b.jpg")
    assert "left out: 1 image without a labelme file; save one" in run(capsys, *flags)[1]


BROKEN_FILES = {
    "not JSON": (lambda raw: (raw / "a.json").write_text("{"), "not JSON"),
    "no image": (lambda raw: (raw / "a.jpg").unlink(), "does not exist"),
    "not an image": (lambda raw: (raw / "a.jpg").write_text("x"), "not an image"),
    "other size": (lambda raw: labelme(raw, "a", [], imageWidth=10), "says 10 x 48 pixels"),
    "same image": (lambda raw: labelme(raw, "b", [], imagePath="a.jpg"), "an annotation file"),
    "no imagePath": (lambda raw: labelme(raw, "a", [], imagePath=None), "'imagePath'"),
    "no objects": (lambda raw: labelme(raw, "a", []), "nothing to learn from"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named(tmp_path, capsys, name):
    change, expected = BROKEN_FILES[name]
    labelme(tmp_path / "raw", "a", [shape("cat", SQUARE)])
    change(tmp_path / "raw")
    code, message = run(capsys, "labelme", tmp_path / "raw", "--out", tmp_path / "out",
                        "--val_fraction=0")
    assert code == 2 and expected in message and message.count("\n") == 1


def test_labelme_writes_sizes_and_labels_as_numbers_or_text(tmp_path, capsys):
    labelme(tmp_path / "raw", "a", [shape(7, SQUARE), shape("7", SQUARE)],
            imageWidth=str(WIDTH), imageHeight=float(HEIGHT))
    code, out = run(capsys, "labelme", tmp_path / "raw", "--out", tmp_path / "out",
                    "--val_fraction=0")
    assert code == 0 and "2 objects" in out and opened(tmp_path / "out").class_names == ["7"]


@pytest.mark.parametrize("encoding", ["gbk", "utf-8-sig", "utf-16"])
def test_labelme_files_of_a_windows(tmp_path, capsys, encoding):
    labelme(tmp_path / "raw", "a", [])
    text = json.dumps({"imagePath": "a.jpg", "shapes": [shape("\u88c2\u7f1d", SQUARE)]},
                      ensure_ascii=False)
    (tmp_path / "raw" / "a.json").write_bytes(text.encode(encoding))
    code, out = run(capsys, "labelme", tmp_path / "raw", "--out", tmp_path / "out",
                    "--val_fraction=0")
    assert code == 0 and ("a.json: not UTF-8, read as GB18030" in out) == (encoding == "gbk")
    assert opened(tmp_path / "out").class_names == ["\u88c2\u7f1d"]


def test_circles_of_any_radius(tmp_path, capsys):
    labelme(tmp_path / "raw", "a", [shape("sun", [[30, 20], [1e9, 20]], "circle"),
                                    shape("cat", SQUARE)])
    flags = ("labelme", tmp_path / "raw", "--out", tmp_path / "out", "--val_fraction=0")
    assert run(capsys, *flags)[0] == 0
    assert dict(masks_of(opened(tmp_path / "out"), 0))["sun"].all()
    labelme(tmp_path / "raw", "a", [shape("sun", [[30, 20], [float("nan"), 20]], "circle")])
    code, message = run(capsys, *flags)
    assert code == 2 and "not finite" in message


def test_links_are_followed_and_archives_of_macos_and_hidden_folders_left_alone(tmp_path, capsys):
    raw = tmp_path / "raw"
    labelme(tmp_path / "elsewhere", "a", [shape("cat", SQUARE)])
    raw.mkdir()
    (raw / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(raw, target_is_directory=True)
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (raw / name).mkdir()
    for name in ("__MACOSX/a.json", ".ipynb_checkpoints/a.json", "._a.json", "._a.jpg"):
        (raw / name).write_bytes(b"\0\5\x16\7")
    code, out = run(capsys, "labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert code == 0 and "1 images (0 without objects), 1 objects" in out and "left out" not in out


def test_a_folder_of_too_many_files_is_looked_through_no_further(tmp_path, capsys, monkeypatch):
    """Someone names his home, or a whole disk."""
    monkeypatch.setattr(source_files, "MOST_FILES", 10)
    for folder in "abc":
        (tmp_path / folder).mkdir()
        for number in range(5):
            (tmp_path / folder / f"{number}.txt").touch()
    with pytest.raises(UserError, match="holds more than 10 files, .* name the dataset's own"):
        recognise(tmp_path)


def test_only_files_of_a_conversion_are_replaced(tmp_path, capsys):
    yolo(tmp_path / "y")
    own = (tmp_path / "y" / "data.yaml").read_text()
    code, message = run(capsys, "yolo", tmp_path / "y", "--out", tmp_path / "y")
    assert code == 2 and "data.yaml is there and was not written by a conversion" in message
    assert (tmp_path / "y" / "data.yaml").read_text() == own
    for stem in ("bus", "car", "train", "val"):
        labelme(tmp_path / "raw", stem, [shape("cat", SQUARE)])
    own = (tmp_path / "raw" / "train.json").read_text()
    code, message = run(capsys, "labelme", tmp_path / "raw", "--out", tmp_path / "raw")
    assert code == 2 and "train.json is there" in message
    assert (tmp_path / "raw" / "train.json").read_text() == own
    for _ in range(2):
        assert run(capsys, "labelme", tmp_path / "raw", "--out", tmp_path / "out")[0] == 0


def test_class_order_and_unknown_classes(tmp_path, capsys):
    raw = tmp_path / "raw"
    labelme(raw, "a", [shape("dog", SQUARE), shape("cat", SQUARE)])
    flags = ("labelme", raw, "--out", tmp_path / "out", "--val_fraction=0")
    assert run(capsys, *(flags + ("--classes=dog,cat,eel",)))[0] == 0
    assert opened(tmp_path / "out").class_names == ["dog", "cat", "eel"]
    code, message = run(capsys, *(flags + ("--classes=dog,cats",)))
    assert code == 2 and "shape 2 ('cat')" in message and "did you mean 'cats'?" in message


@pytest.mark.parametrize("flags,expected", [
    ((), "usage"), (("yolov8", "x"), "unknown format 'yolov8'; did you mean 'yolo'?"),
    (("labelme", "x"), "--out"), (("labelme", "x", "--out=y"), "not found"),
    (("labelme", "x", "--out="), "--out is empty, expected a folder"),
    (("labelme", "x", "--out=y", "--val_fracton=1"), "did you mean --val_fraction?"),
    (("yolo", "x", "--out=y", "--seed=-1"), "--seed is '-1', expected a whole number from 0"),
    (("yolo", "x", "--out=y", "--classes=a,,b"), "--classes is 'a,,b', expected different"),
    (("masks", "x", "--out=y", "--classes=a,a"), "--classes is 'a,a', expected different"),
    (("voc", "x", "--out=y"), "no folder Annotations"), (("yolo", "x", "--out=y"), "not found"),
])
def test_command_line_mistakes(capsys, flags, expected):
    code = run_main(convert.main, list(flags))
    shown = capsys.readouterr()
    assert code == 2 and expected in shown.out + shown.err


def test_split():
    parts = Conversion(val_fraction=0.01).divided(list(range(7)))
    assert [len(part) for part in parts.values()] == [6, 1]
    assert sorted(sum(parts.values(), [])) == list(range(7))
    assert list(Conversion(val_fraction=0).divided([1, 2])) == ["train"]
    assert list(Conversion().divided([1])) == ["train"]


def test_problems_are_shown_in_part():
    problems = Conversion(skip_bad=True)
    for n in range(25):
        with problems.left_out():
            raise UserError(str(n))
    assert problems.lines()[-1] == "... and 5 more"


# YOLO

def yolo(folder, text="0 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5\n", yaml=None):
    for split in ("train", "val"):
        for stem in "ab":
            picture(folder / split / "images" / (split + stem + ".png"))
        (folder / split / "labels").mkdir(exist_ok=True)
        (folder / split / "labels" / (split + "a.txt")).write_text(text)
    (folder / "data.yaml").write_text(yaml or (
        "train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n"))


def test_yolo(tmp_path, capsys):
    yolo(tmp_path / "raw")
    code, out = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 0 and out.count("2 images (1 without objects), 1 objects") == 2
    for split in ("train", "val"):
        dataset = opened(tmp_path / "out", split)
        assert dataset.class_names == ["cat", "dog"]
        (name, mask), = masks_of(dataset, 0)
        assert name == "cat" and iou(mask, drawn(16, 12, 32, 24)) > 0.95


def test_yolo_lists_names_by_number_and_path(tmp_path, capsys):
    yolo(tmp_path / "raw", yaml="path: .\ntrain: [list.txt]\nval: val/images\n"
                                "names: {0: cat, 1: dog}\n")
    (tmp_path / "raw" / "list.txt").write_text("./train/images/traina.png\n")
    code, out = run(capsys, "yolo", tmp_path / "raw" / "data.yaml", "--out", tmp_path / "out")
    assert code == 0 and len(opened(tmp_path / "out")) == 1


@pytest.mark.parametrize("names", ["{'0': cat, '1': dog}", "{1: dog, 0: cat}"])
def test_yolo_names_by_number(tmp_path, capsys, names):
    yolo(tmp_path / "raw", yaml="train: train/images\nval: val/images\nnames: " + names)
    assert run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")[0] == 0
    assert opened(tmp_path / "out").class_names == ["cat", "dog"]


@pytest.mark.parametrize("more, expected", [
    ("names: [cat, no]", "names is ['cat', False], expected a list of class names"),
    ("names: [cat]\nkpt_shape: [2, 2]", "its lines are boxes with keypoints"),
])
def test_yolo_descriptions_that_mean_something_else(tmp_path, capsys, more, expected):
    yolo(tmp_path / "raw", yaml="train: train/images\nval: val/images\n" + more)
    code, message = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and expected in message


def test_file_names_that_are_not_text(tmp_path, capsys):
    """A Chinese Windows' archive unpacked on Linux."""
    yolo(tmp_path / "raw")
    name = os.fsdecode("\u88c2\u7f1d".encode("gbk"))
    try:
        for folder, suffix in (("images", ".png"), ("labels", ".txt")):
            (tmp_path / "raw" / "train" / folder / ("traina" + suffix)).rename(
                tmp_path / "raw" / "train" / folder / (name + suffix))
    except (OSError, ValueError):
        pytest.skip("this file system takes only text")
    code, _ = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 0
    dataset = opened(tmp_path / "out")
    assert sorted(len(dataset[n].labels) for n in range(2)) == [0, 1]
    assert name + ".png" in [dataset.image_info(n)[0] for n in range(2)]


def test_skip_bad_leaves_out_every_kind_of_bad_file(tmp_path, capsys):
    yolo(tmp_path / "raw")
    (tmp_path / "raw" / "train" / "images" / "trainb.png").write_bytes(b"x")
    (tmp_path / "raw" / "val" / "labels" / "valb.txt").write_bytes(b"\xff\xff")
    code, message = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and "not an image" in message
    code, out = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out", "--skip_bad")
    assert code == 0 and out.count("left out: ") == 2


def test_yolo_without_yaml(tmp_path, capsys):
    raw = tmp_path / "raw"
    for stem in "abcde":
        picture(raw / "images" / (stem + ".png"))
    (raw / "labels").mkdir()
    (raw / "labels" / "a.txt").write_text("1 0.5 0.5 0.25 0.25")
    code, message = run(capsys, "yolo", raw, "--out", tmp_path / "out")
    assert code == 2 and "classes.txt" in message
    (raw / "classes.txt").write_text("cat\ndog\n")
    code, message = run(capsys, "yolo", raw, "--out", tmp_path / "out")
    assert code == 2 and "a.txt: line 1: a box" in message and "--boxes_as_masks" in message
    code, _ = run(capsys, "yolo", raw, "--out", tmp_path / "out", "--boxes_as_masks",
                  "--val_fraction=0")
    assert code == 0
    (name, mask), = masks_of(opened(tmp_path / "out"), 0)
    assert name == "dog" and iou(mask, drawn(24, 18, 40, 30)) == 1


@pytest.mark.parametrize("line,expected", [
    ("2 0.1 0.1 0.5 0.1 0.5 0.5", "class 2 is not one of the 2 names (0 to 1)"),
    ("nan 0.1 0.1 0.5 0.1 0.5 0.5", "class nan is not one of the 2 names (0 to 1)"),
    ("1e400 0.1 0.1 0.5 0.1 0.5 0.5", "class 1e400 is not one of the 2 names (0 to 1)"),
    ("cat 0.1 0.1 0.5 0.1 0.5 0.5", "not a line of numbers"),
    ("0 0.1 0.1 0.5 0.1 0.5", "5 numbers after the class"),
    ("0 10 10 50 10 50 50", "coordinates from 10 to 50, expected 0 to 1"),
    ("0 nan 0.1 0.5 0.1 0.5 0.5", "coordinates from"),
    ("0 0.1 0.1 0.2 0.2 0.3 0.3", "without area"),
])
def test_broken_yolo_lines_are_named(tmp_path, capsys, line, expected):
    yolo(tmp_path / "raw", "0 0.25 0.25 0.5 0.25 0.5 0.5\n\n" + line)
    code, message = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and message.count("\n") == 1 and expected in message
    assert "traina.txt: line 3: " in message


@pytest.mark.parametrize("text,expected", [
    ("names: [a]", "keys train, val and names"), ("train: nowhere\nnames: [a]", "looked for"),
    ("train: train/images", "names is nothing"), ("train: train/images\nnames: {1: a}", "0 to 0"),
    ("train: train\nnames: [a, a]", "same class twice"), ("[", "not YAML"),
])
def test_broken_yolo_files(tmp_path, capsys, text, expected):
    yolo(tmp_path / "raw", yaml=text)
    code, message = run(capsys, "yolo", tmp_path / "raw", "--out", tmp_path / "out")
    assert code == 2 and expected in message and message.count("\n") == 1
