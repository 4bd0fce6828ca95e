"""--data=FOLDER as other tools leave it: recognised, from raw files to scores, the same masks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

import eval as eval_program
import train
from data import check, convert
from data.coco import CocoDataset
from data.datasets import describe, open_dataset
from helpers.foreign_layouts import (
    BOXES,
    LAYOUTS,
    NAMES,
    SIDE,
    cvat_masks,
    element,
    labelme,
    mask,
    nuclei,
    numbers_beside_images,
    penn_fudan,
    picture,
    plants,
    roboflow,
    sbd,
    text,
    voc,
    yolo,
    yolo_without_description,
)
from helpers.paths import ROOT
from utils.cli import run_main
from utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


SCORED = [labelme, yolo, roboflow, voc, sbd, nuclei, penn_fudan, plants]


def opened(root, split="train"):
    return open_dataset("coco2017", str(root), None, None, split)


def masks_of(dataset, index):
    found = []
    for outline in dataset[index].segmentations:
        if not isinstance(outline, dict):
            outline = mask_utils.merge(mask_utils.frPyObjects(
                [part.ravel().astype(float).tolist() for part in outline], SIDE, SIDE))
        found.append(mask_utils.decode(outline) > 0)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_masks_are_those_of_the_source(tmp_path, capsys, layout):
    kind, name, sizes = LAYOUTS[layout]
    layout(tmp_path / "raw")
    before = sorted(str(path) for path in (tmp_path / "raw").rglob("*"))
    datasets = [opened(tmp_path / "raw", split) for split in ("train", "val")]
    assert tuple(map(len, datasets)) == sizes and name in datasets[0].class_names
    paths = [Path(data.image_path(n)).resolve() for data in datasets for n in range(len(data))]
    assert len(set(paths)) == len(NAMES) and all(path.is_file() for path in paths)
    for found, (x1, y1, x2, y2) in zip(masks_of(datasets[1], 0), BOXES):
        expected = np.zeros((SIDE, SIDE), bool)
        expected[y1:y2, x1:x2] = True
        assert (found & expected).sum() / (found | expected).sum() > 0.95
    assert f" is taken for {kind} (" in datasets[0].origin
    assert f"6 images, 12 objects (train {sizes[0]}, val {sizes[1]}" in datasets[0].origin
    assert str(tmp_path / "cache" / "yolact") in datasets[0].origin
    assert sorted(str(path) for path in (tmp_path / "raw").rglob("*")) == before
    # The same reader writes files for who wants some.
    source = next((tmp_path / "raw").iterdir()) if layout in (voc, sbd) else tmp_path / "raw"
    assert run_main(convert.main, [kind, str(source), f"--out={tmp_path / 'out'}"]) == 0
    assert np.array_equal(masks_of(opened(tmp_path / "out"), 0), masks_of(datasets[0], 0))
    assert check.main([str(tmp_path / "raw"), "--pictures=", "--config=yolact_shapes"]) == 0
    assert datasets[0].origin in capsys.readouterr().out


@pytest.mark.parametrize("layout", SCORED, ids=lambda layout: layout.__name__)
def test_from_raw_files_to_scores(tmp_path, capsys, monkeypatch, layout):
    monkeypatch.chdir(str(tmp_path))
    layout(tmp_path / "raw")
    assert train.main([
        "--data=raw", "--config=yolact_shapes", "--max_iter=2", "--batch_size=2", "--no_autoscale",
        "--max_size=64", "--num_workers=0", "--no_log", "--device=cpu",
        "--validation_epoch=-1"]) == 0
    said = capsys.readouterr().out
    assert said.count(" is taken for ") == 1 and "--val_data=raw" in said
    assert eval_program.main(["--trained_model=latest", "--data=raw", "--device=cpu",
                              "--num_workers=0"]) == 0
    said = capsys.readouterr().out
    assert " is taken for " in said and "  mask | " in said


def test_sbd_for_the_recipe_of_sbd(tmp_path):
    sbd(tmp_path)
    dataset = open_dataset("pascal_sbd", str(tmp_path / "dataset"), None, None, "val")
    assert len(dataset) == 2 and len(dataset.class_names) == 20
    for damaged in (b"x" * 300, b"\0" * 128 + element(15, zlib.compress(b"")), b""):
        (tmp_path / "dataset" / "inst" / "c.mat").write_bytes(damaged)
        assert "c.mat: is no file of instances as SBD has them" in mistake(tmp_path)


def mistake(root):
    with pytest.raises(UserError) as error:
        opened(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_conversion_is_made_once_and_anew_when_the_source_changes(tmp_path, monkeypatch):
    labelme(tmp_path / "raw")
    first = describe("coco2017", str(tmp_path / "raw"))
    made = {path.name: path.read_bytes() for path in Path(first.path).parent.iterdir()}
    assert sorted(made) == ["data.yaml", "origin.txt", "train.json", "val.json"]
    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", None)
        assert describe("coco2017", str(tmp_path / "raw")) == first
    Path(first.path).unlink()  # as if killed before the end
    assert describe("coco2017", str(tmp_path / "raw")) == first
    assert {path.name: path.read_bytes() for path in Path(first.path).parent.iterdir()} == made
    text(tmp_path / "raw" / "a.json", json.dumps({"imagePath": "a.png", "shapes": []}))
    second = describe("coco2017", str(tmp_path / "raw"))
    assert second.path != first.path and "10 objects" in second.origin
    shutil.copytree(str(tmp_path / "raw"), str(tmp_path / "copy"))
    moved = CocoDataset(*describe("coco2017", str(tmp_path / "copy")).splits["val"])
    assert str(tmp_path / "copy") in moved.image_path(0)


def _describe(root):
    found = describe("coco2017", root)
    return found.path, len(CocoDataset(*found.splits["train"]))


def test_several_processes_at_once(tmp_path):
    nuclei(tmp_path / "raw")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_describe, [str(tmp_path / "raw")] * 8, chunksize=1)
    assert len(set(found)) == 1 and found[0][1] == 5
    assert not list(Path(found[0][0]).parent.glob("*.tmp"))


def test_a_source_with_a_mistake_is_a_sentence_and_nothing_is_kept(tmp_path):
    labelme(tmp_path / "my raw")
    (tmp_path / "my raw" / "b.png").unlink()
    message = mistake(tmp_path / "my raw")
    assert "b.png does not exist; correct it, or" in message
    assert f"-m data.convert labelme '{tmp_path / 'my raw'}' --out=FOLDER --skip_bad" in message
    assert not list((tmp_path / "cache").rglob("data.yaml"))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    labelme(tmp_path / "raw")
    text(tmp_path / "file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME to a folder" in mistake(tmp_path / "raw")


def test_a_folder_of_no_known_layout_says_what_was_looked_for(tmp_path):
    picture(tmp_path / "raw" / "a.png")
    message = mistake(tmp_path / "raw")
    for part in ("train2017", "'shapes'", "labels/*.txt", "Annotations/*.xml",
                 "train/_annotations.coco.json", "A_label.png", "data.yaml"):
        assert part in message


def test_a_folder_of_two_layouts_is_not_guessed(tmp_path):
    labelme(tmp_path / "raw")
    numbers_beside_images(tmp_path / "raw")
    message = mistake(tmp_path / "raw")
    assert "labelme (" in message and "masks (" in message and "say which" in message


@pytest.mark.parametrize("place", ["instances_{}.json", "{}/labels.json"])
def test_coco_in_another_layout_gets_the_description_to_paste(tmp_path, place):
    roboflow(tmp_path / "raw", name="labels.json")
    for split in ("train", "valid"):
        (tmp_path / "raw" / split / "labels.json").rename(tmp_path / "raw" / place.format(split))
    message = mistake(tmp_path / "raw")
    assert "in a layout that is not known" in message
    (tmp_path / "raw" / "data.yaml").write_text(message.split("with the line ")[1])
    assert [len(opened(tmp_path / "raw", split)) for split in ("train", "val")] == [4, 2]


MISTAKES = {
    "black and white": (lambda raw: [mask(raw / "masks" / f"{name}.png", [255, 255])
                                     for name in NAMES], "black and white"),
    "no image": (lambda raw: (raw / "images" / "c.jpg").unlink(), "c.png: is a mask without an"),
    "other size": (lambda raw: cv2.imwrite(str(raw / "masks" / "c.png"), np.ones((9, 9))),
                   "says 9 x 9 pixels"),
    "no image at all": (lambda raw: text(raw / "masks" / "c.png", "x"), "not an image"),
    "a photo": (lambda raw: cv2.imwrite(str(raw / "masks" / "c.png"), np.arange(
        SIDE * SIDE, dtype=np.uint16).repeat(9).reshape(3 * SIDE, 3 * SIDE)), "says 192 x 192"),
    "white in colour": (lambda raw: [cv2.imwrite(str(raw / "masks" / f"{name}.png"), np.full(
        (SIDE, SIDE, 3), 255, np.uint8)) for name in NAMES], "black and white"),
    "nothing": (lambda raw: [mask(raw / "masks" / f"{name}.png", [0, 0]) for name in NAMES],
                "black and white"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_masks_that_cannot_be_meant(tmp_path, name):
    change, expected = MISTAKES[name]
    numbers_beside_images(tmp_path / "raw")
    change(tmp_path / "raw")
    assert expected in mistake(tmp_path / "raw")


def test_nuclei_as_they_were_published_are_the_same_dataset(tmp_path):
    """An image and a PNG for each nucleus, against the COCO file made of them."""
    source = ROOT.parent / "shared" / "nuclei"
    if not source.is_dir():
        pytest.skip("no nuclei beside the project")
    truth = opened(source, "val")
    chosen = range(len(truth))[:int(os.environ.get("YOLACT_NUCLEI", "3"))]  # 107 are all
    for n in chosen:
        name, width, height = truth.image_info(n)
        place = tmp_path / "stage1_train" / Path(name).stem
        (place / "images").mkdir(parents=True)
        (place / "masks").mkdir()
        shutil.copy(truth.image_path(n), str(place / "images" / name))
        for k, outline in enumerate(truth[n].segmentations):
            cv2.imwrite(str(place / "masks" / f"{k:04d}.png"), mask_utils.decode(outline) * 255)
    datasets = [opened(tmp_path, split) for split in ("train", "val")]
    found = {Path(data.image_path(n)).name: data[n] for data in datasets for n in range(len(data))}
    assert len(found) == len(chosen)
    for n in chosen:
        sample, same = truth[n], found[truth.image_info(n)[0]]
        assert [item["counts"] for item in sample.segmentations] == [
            item["counts"] for item in same.segmentations]
        assert np.array_equal(sample.boxes, same.boxes) and np.array_equal(sample.image, same.image)


def test_colours_and_transparency_tell_objects_apart(tmp_path):
    numbers_beside_images(tmp_path / "raw")
    pixels = np.full((SIDE, SIDE, 4), 255, np.uint8)
    pixels[..., 3] = 0  # white, but nobody sees it
    for (x1, y1, x2, y2), colour in zip(BOXES, [(76, 0, 0), (0, 0, 29)]):  # of the same brightness
        pixels[y1:y2, x1:x2, :3], pixels[y1:y2, x1:x2, 3] = colour, 255
    cv2.imwrite(str(tmp_path / "raw" / "masks" / "a.png"), pixels)
    dataset = opened(tmp_path / "raw")
    names = [dataset.image_info(n)[0] for n in range(len(dataset))]
    found = masks_of(dataset, [Path(name).stem for name in names].index("a"))
    assert sorted(int(mask.sum()) for mask in found) == [480, 884]


def test_masks_of_one_number_each_are_said(tmp_path):
    numbers_beside_images(tmp_path / "raw")
    assert "no mask holds more" not in opened(tmp_path / "raw").origin
    for name in NAMES:
        mask(tmp_path / "raw" / "masks" / f"{name}.png", [1, 1])
    assert "no mask holds more than one number, so no image has more than one object" in opened(
        tmp_path / "raw").origin


def test_numbers_of_classes_are_said(tmp_path):
    numbers_beside_images(tmp_path / "raw")
    assert "pieces" not in opened(tmp_path / "raw").origin
    for name in NAMES:
        mask(tmp_path / "raw" / "masks" / f"{name}.png", [1, 1] if name < "d" else [1, 2])
    assert "do not touch; where numbers are those of classes" not in opened(tmp_path / "raw").origin
    mask(tmp_path / "raw" / "masks" / "d.png", [1, 1])
    mask(tmp_path / "raw" / "masks" / "e.png", [2, 2])
    assert "5 of 7 objects consist of pieces that do not touch; where" in (
        opened(tmp_path / "raw").origin)


def test_images_of_a_test_split_are_not_trained_on(tmp_path):
    for split in ("train", "test"):
        labelme(tmp_path / "raw" / split)
    assert "6 images, 12 objects (train 5, val 1)" in opened(tmp_path / "raw").origin
    (tmp_path / "raw" / "test").rename(tmp_path / "raw" / "bus")  # train is a class, too
    assert "12 images, 24 objects" in opened(tmp_path / "raw").origin


def test_splits_by_any_name_and_what_is_in_none_is_counted(tmp_path):
    for split in ("Train2017", "validation", "more"):
        labelme(tmp_path / "raw" / split)
    said = opened(tmp_path / "raw").origin
    assert "24 objects (train 6, val 6; left out: 6 files outside of the folders of splits" in said


def test_images_of_yolo_beside_the_folders_of_splits_are_counted(tmp_path):
    yolo_without_description(tmp_path / "raw")
    picture(tmp_path / "raw" / "images" / "more" / "x.png")
    assert "(train 4, val 2; left out: 1 file outside of the folders of splits (more/x.png))" in (
        opened(tmp_path / "raw").origin)
    shutil.rmtree(str(tmp_path / "raw" / "images" / "train"))
    (tmp_path / "raw" / "images" / "train").mkdir()
    assert "no images for 'train'" in mistake(tmp_path / "raw")


def test_a_description_in_a_chinese_windows_encoding(tmp_path):
    yolo(tmp_path / "raw")
    (tmp_path / "raw" / "data.yaml").write_bytes(
        "train: ../train/images\nval: ../valid/images\nnames: [\u88c2\u7f1d]\n".encode("gbk"))
    dataset = opened(tmp_path / "raw")
    assert dataset.class_names == ["\u88c2\u7f1d"]
    assert "data.yaml: not UTF-8, read as GB18030" in dataset.origin


@pytest.mark.parametrize("count", ["3", "'3'", "[1]", "1e9", "many"])
def test_a_description_that_counts_other_classes_than_it_names(tmp_path, count):
    yolo(tmp_path / "raw")
    content = (tmp_path / "raw" / "data.yaml").read_text()
    assert "nc: 1\n" in content and len(opened(tmp_path / "raw")) == 4
    text(tmp_path / "raw" / "data.yaml", content.replace("nc: 1", f"nc: {count}"))
    assert "but names holds 1 class name; correct one of them" in mistake(tmp_path / "raw")


def test_label_files_without_an_image_are_a_mistake(tmp_path):
    yolo(tmp_path / "raw")
    labels = tmp_path / "raw" / "train" / "labels"
    for other in ("classes.txt", "._a.txt"):
        text(labels / other, "cat\n")
    assert len(opened(tmp_path / "raw")) == 4
    for other in ("A.txt", "a.TXT", "a .txt"):
        (labels / "a.txt").rename(labels / other)
        assert f"{other}: is the label file of no image" in mistake(tmp_path / "raw")
        (labels / other).rename(labels / "a.txt")


def test_files_that_one_name_does_not_tell_apart(tmp_path):
    voc(tmp_path / "raw")
    place = next((tmp_path / "raw").iterdir())
    picture(place / "JPEGImages" / "more" / "a.jpg")
    assert "a.jpg have the same name" in mistake(tmp_path / "raw")
    for layout, twin in ((yolo_without_description, "images/train/a.jpg"),
                         (numbers_beside_images, "images/a.png")):
        layout(tmp_path / layout.__name__)
        picture(tmp_path / layout.__name__ / twin)
        assert "rename one of them or move it away" in mistake(tmp_path / layout.__name__)


def test_objects_of_no_class_and_splits_of_cvat(tmp_path, capsys):
    place = tmp_path / "raw"
    cvat_masks(place)
    text(place / "ImageSets" / "Segmentation" / "train.txt", '"a day/a"\na day/c\n')
    text(place / "ImageSets" / "Segmentation" / "val.txt", "a day/b\n")
    mask(place / "SegmentationClass" / "a day" / "c.png", [(83, 50, 250), (9, 8, 7)])
    sentence = mistake(place)
    assert "c.png: object #800000: has #070809 in " in sentence
    assert "labelmap.txt; correct it, or " in sentence
    assert run_main(convert.main, ["voc", str(place), f"--out={tmp_path / 'out'}",
                                   "--skip_bad"]) == 0
    assert capsys.readouterr().out.count("left out: ") == 1
    datasets = [opened(tmp_path / "out", split) for split in ("train", "val")]
    assert [[len(masks_of(data, n)) for n in range(len(data))] for data in datasets] == [
        [2, 1], [2]]
    shutil.rmtree(str(place / "JPEGImages"))
    assert "no folder JPEGImages" in mistake(place)


def test_images_without_a_file_of_voc_are_counted(tmp_path):
    voc(tmp_path / "raw")
    place = next((tmp_path / "raw").iterdir())
    picture(place / "JPEGImages" / "z.jpg")
    assert "left out: 1 image without an annotation" in opened(tmp_path / "raw").origin
