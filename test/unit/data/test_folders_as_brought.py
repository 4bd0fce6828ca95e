"""Folders of other tools in forms that are read in another way than they are meant, if at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data import convert
from data.convert import expected_layouts
from data.datasets import describe, open_dataset
from data.tools.conversion import Conversion
from data.tools.labelme import read_labelme
from helpers.foreign_layouts import NAMES, corners, mask, picture, text, voc, yolo_labels
from utils.errors import UserError

BOX = (4, 6, 30, 40)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(folder):
    with pytest.raises(UserError) as refusal:
        describe("coco2017", str(folder))
    return str(refusal.value)


def shape(points, **more):
    return {"label": "cat", "points": points, **more}


def labelme_objects(folder, shapes, **more):
    picture(folder / "a.png")
    text(folder / "a.json", json.dumps({"imagePath": "a.png", "shapes": shapes, **more}))
    return read_labelme(folder, Conversion()).splits["train"][0].objects


def test_frames_of_the_same_names_are_those_of_their_own_split(tmp_path):
    content = {"images": [{"id": 1, "file_name": "000001.jpg"}], "annotations": [],
               "categories": [{"id": 1, "name": "cat"}]}
    for split in ("train", "validation"):
        picture(tmp_path / "images" / split / "000001.jpg")
    for split in ("train", "val"):
        text(tmp_path / "annotations" / f"instances_{split}.json", json.dumps(content))
    said = expected_layouts(tmp_path)
    assert 'val: {images: "images/validation", annotations: "annotations/instances_val' in said
    assert 'train: {images: "images/train", annotations: "annotations/instances_train' in said


@pytest.mark.parametrize("kind", ["masks", "labelme"])
def test_splits_below_the_folders_of_images_are_kept(tmp_path, kind):
    for name, split in zip(NAMES, ["train"] * 2 + ["val"] * 4):
        picture(tmp_path / "raw/images" / split / f"{name}.png")
        if kind == "masks":
            mask(tmp_path / "raw/masks" / split / f"{name}.png", [1, 2])
        else:
            text(tmp_path / "raw/ann" / split / f"{name}.json", json.dumps({
                "imagePath": f"../../images/{split}/{name}.png", "shapes": [shape(corners(BOX))]}))
    assert [len(open_dataset("coco2017", str(tmp_path / "raw"), None, None, split))
            for split in ("train", "val")] == [2, 4]
    picture(tmp_path / "raw/images/g.png")  # of no split: nothing is left out in silence
    mask(tmp_path / "raw/masks/g.png", [1, 2])
    if kind == "masks":
        assert "(train 2, val 4; left out: 2 files outside of the folders of splits (" in (
            open_dataset("coco2017", str(tmp_path / "raw"), None, None, "train").origin)


def test_pages_of_a_mask_are_not_dropped(tmp_path):
    pages = [Image.fromarray(np.eye(64, dtype=np.uint8) * n) for n in (1, 2)]
    for name in NAMES:
        picture(tmp_path / "images" / f"{name}.png")
        mask(tmp_path / "masks" / f"{name}.png", [1, 2])
    (tmp_path / "masks/a.png").unlink()
    pages[0].save(str(tmp_path / "masks/a.tif"), save_all=True, append_images=pages[1:])
    assert "a.tif: holds 2 images (pages), expected one" in refused(tmp_path)


def test_a_number_that_marks_borders_is_said(tmp_path):
    for name in NAMES:
        picture(tmp_path / "images" / f"{name}.png")
        mask(tmp_path / "masks" / f"{name}.png", [1, 255])
    assert "the number 255 is taken for an object in 6 masks" in describe(
        "coco2017", str(tmp_path)).origin


def test_label_files_among_images_that_belong_to_none(tmp_path):
    for name in NAMES:
        picture(tmp_path / f"{name}.png")
        yolo_labels(tmp_path / f"{name if name == 'a' else name.upper()}.txt")
    text(tmp_path / "classes.txt", "cat\n")
    text(tmp_path / "notes.txt", "taken in May\n")
    assert "B.txt: is the label file of no image" in refused(tmp_path)


def test_a_conversion_beside_its_source_is_made_again(tmp_path, capsys):
    for name in NAMES:
        picture(tmp_path / "images" / f"{name}.png")
        yolo_labels(tmp_path / "labels" / f"{name}.txt")
    text(tmp_path / "classes.txt", "cat\n")
    for _ in range(2):
        assert convert.main(["yolo", str(tmp_path), f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("5 images (0 without objects), 10 objects") == 2


def test_a_folder_that_is_not_sbd(tmp_path):
    with pytest.raises(UserError, match="no inst/.*give the folder that holds img and inst"):
        convert.main(["sbd", str(tmp_path), f"--out={tmp_path}"])


@pytest.mark.parametrize("content", ["cat\n\ndog\n", "cat\ndog\ncat\n"])
def test_lists_of_classes_in_which_numbers_would_shift(tmp_path, content):
    picture(tmp_path / "a.png")
    yolo_labels(tmp_path / "a.txt")
    text(tmp_path / "classes.txt", content)
    assert "classes.txt: has an empty line, or a class twice" in refused(tmp_path)


def test_no_image_has_a_label_file(tmp_path):
    picture(tmp_path / "photos/a.png")
    yolo_labels(tmp_path / "texts/a.txt")
    text(tmp_path / "data.yaml", "train: photos\nval: photos\nnames: [cat]\n")
    said = refused(tmp_path)
    assert "none of its 2 images has a label file" in said and "photos/a.txt" in said


def test_yolo_paths_of_windows(tmp_path):
    for name, split in zip("ab", ("train", "val")):
        picture(tmp_path / "images" / split / f"{name}.png")
        yolo_labels(tmp_path / "labels" / split / f"{name}.txt")
    text(tmp_path / "list.txt", ".\\images\\val\\b.png\n")
    text(tmp_path / "data.yaml", "train: ..\\images\\train\nval: list.txt\nnames: [cat]\n")
    assert [len(open_dataset("coco2017", str(tmp_path), None, None, split))
            for split in ("train", "val")] == [1, 1]


def test_an_empty_group_is_none(tmp_path):
    shapes = [shape(corners(BOX), group_id=""), shape(corners((40, 6, 60, 30)), group_id="")]
    assert len(labelme_objects(tmp_path, shapes)) == 2


@pytest.mark.parametrize("kind", ["oriented_rectangle", "quadrilateral"])
def test_four_corners_are_an_outline(tmp_path, kind):
    assert len(labelme_objects(tmp_path, [shape(corners(BOX), shape_type=kind)])) == 1


def test_a_picture_within_a_labelme_file(tmp_path):
    with pytest.raises(UserError, match=r"b\.png does not exist; its picture is in the file"):
        labelme_objects(tmp_path, [], imagePath="b.png", imageData="aGVsbG8=")


def test_xml_that_is_none_of_voc(tmp_path):
    voc(tmp_path)
    file = sorted(tmp_path.rglob("*.xml"))[0]
    file.write_text(file.read_text().replace("<annotation>", '<annotation xmlns="http://x">'))
    assert "begins with <{http://x}annotation>, expected <annotation>" in refused(tmp_path)


def test_a_file_in_place_of_a_folder(tmp_path):
    text(tmp_path / "data.zip", "PK")
    with pytest.raises(UserError, match="data folder is not a folder: looked for"):
        open_dataset("coco2017", str(tmp_path / "data.zip"), None, None, "train")
