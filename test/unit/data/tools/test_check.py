"""The check of a dataset: counts, findings, suggestions, what it remembers, and its picture."""

from __future__ import annotations

import re
import shutil

import cv2
import numpy as np
import pytest

from data import check
from data.check import quick_check
from data.coco import CocoDataset
from data.config import get_config
from data.datasets import open_dataset
from data.tools.findings import class_counts, copy_findings, counts, duplicates
from helpers.coco_files import HEIGHT, WIDTH, document, write_images, write_json
from utils.cli import run_main
from utils.errors import UserError


def make(folder, content=None, name="train"):
    folder = folder / name
    folder.mkdir()
    write_images(folder)
    return CocoDataset(folder / "images", write_json(folder, content or document()))


def described(tmp_path, train=None, val=None):
    """A description of two splits, `val` with pictures of its own."""
    make(tmp_path, train)
    make(tmp_path, val, "val")
    for path in (tmp_path / "val" / "images").iterdir():
        cv2.imwrite(str(path), cv2.imread(str(path)) // 2)
    text = "".join(f"{split}: {{images: {split}/images, annotations: {split}/instances.json}}\n"
                   for split in ("train", "val"))
    (tmp_path / "my.yaml").write_text(text)
    return str(tmp_path / "my.yaml")


def run(capsys, *flags):
    code = run_main(check.main, list(flags) + ["--config=yolact_shapes"])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_a_sound_dataset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    content = document()
    content["annotations"].append(dict(content["annotations"][0], id=200, category_id=90))
    code, out = run(capsys, described(tmp_path, content, content), "--strict")
    assert code == 0 and "Nothing wrong was found." in out
    for row in (r"images\s+3\s+3", r"  without objects\s+1\s+1", r"objects\s+4\s+4",
                r"  small \(below 32 x 32 px\)\s+4\s+4", r"crowd regions\s+1\s+1",
                r"class\s+train\s+images\s+val\s+images", "chat noir \u732b" + r"\s+2\s+2\s+2\s+2",
                r"dog\s+1\s+1\s+1\s+1"):
        assert re.search("(?m)^" + row, out), row
    assert "ground-truth slots: 8 (image 10 has 3 objects)" in out
    picture = cv2.imread("results/first_batch.png")
    assert picture is not None and picture.shape[1] > 3 * 160


def break_boxes(content):
    content["annotations"][0]["bbox"] = [25, 20, 5, 5]


def repeat_object(content):
    content["annotations"].append(dict(content["annotations"][0], id=200))


def forget_class(content):
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]


def shift_rle(content):
    content["annotations"].append({
        "id": 300, "image_id": 20, "category_id": 7, "bbox": [20, 20, 8, 8], "iscrowd": 0,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 12, WIDTH * HEIGHT - 12]}})


def name_alike(content):
    content["categories"][2]["name"] = " Dog"


def lose_outline(content):
    content["annotations"][0]["segmentation"] = []


TRAIN_DEFECTS = {
    "box beside its polygons": (break_boxes, "train: 1 of 3 boxes overlap their masks"),
    "box beside its mask": (shift_rle, "train: 1 of 4 boxes overlap their masks by less than 0.5 "
                                       "IoU: annotation id 300"),
    "duplicate": (repeat_object, "train: 1 object repeats the box and class of another in the same "
                                 "image: image id 10"),
    "class without objects": (forget_class, "classes have no object: dog, cup"),
    "class names alike": (name_alike, "train: 2 classes differ in letter case or white space "
                                      "alone: "),
    "dropped": (lose_outline, "train: dropped 1 annotation with no segmentation: id 101"),
    "unseen class": (forget_class, "val: has objects of classes that train has none of: dog"),
}


@pytest.mark.parametrize("name", TRAIN_DEFECTS)
def test_findings_in_annotations(tmp_path, capsys, name):
    change, expected = TRAIN_DEFECTS[name]
    content = document()
    change(content)
    path = described(tmp_path, content)
    code, out = run(capsys, path, "--quick")
    assert code == 0 and expected in out and "first batch" not in out.lower()
    assert run(capsys, path, "--quick", "--strict")[0] == 2


def other_classes(content):
    content["categories"][0]["name"] = "wolf"


def other_ids(content):
    content["categories"][0]["id"], content["categories"][2]["id"] = 90, 7


@pytest.mark.parametrize("change,expected", [
    (other_classes, "different classes: only in train: dog; only in val: wolf"),
    (other_ids, "the same classes under different ids"),
])
def test_findings_between_splits(tmp_path, capsys, change, expected):
    content = document()
    change(content)
    assert expected in run(capsys, described(tmp_path, val=content), "--quick")[1]


def delete(folder):
    (folder / "a.png").unlink()


def truncate(folder):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:-30])


def resize(folder):
    cv2.imwrite(str(folder / "a.png"), np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8))


def copy(folder):
    shutil.copy(str(folder / "a.png"), str(folder / "c.png"))


def store_12_bits_in_16(folder):
    image = cv2.imread(str(folder / "a.png")).astype(np.uint16) * 16
    assert image.max() > 255
    cv2.imwrite(str(folder / "a.png"), image)


def leak(folder):
    shutil.copy(str(folder / "b.jpg"), str(folder.parent.parent / "val" / "images" / "b.jpg"))


FILE_DEFECTS = {
    "missing": (delete, "train: 1 image file missing: a.png"),
    "truncated": (truncate, "a.png is truncated"),
    "other size": (resize, "a.png is 42 x 30 pixels (width x height)"),
    "12 bits": (store_12_bits_in_16, "train: 1 image as good as black, without a value above 15 of "
                                     "255: a.png; 10 or 12 bits"),
    "copy": (copy, "train: 1 image of the same content as another"),
    "leak": (leak, "1 of the 3 images of val are in train too: b.jpg"),
}


@pytest.mark.parametrize("name", FILE_DEFECTS)
def test_findings_in_files(tmp_path, capsys, name):
    change, expected = FILE_DEFECTS[name]
    path = described(tmp_path)
    assert run(capsys, path, "--pictures=")[1].count("  - train: ") == 2  # of the class 'cup'
    change(tmp_path / "train" / "images")
    code, out = run(capsys, path, "--pictures=", "--strict")
    assert code == 2 and expected in out
    if name == "leak":
        assert "1 of the 3 images of val are in train too: b.jpg" in run(capsys, path, "--quick")[1]


def test_the_same_file_in_both_splits(tmp_path, capsys):
    dataset = make(tmp_path)
    pairs = [f"--{split}_{part}" + "=" + value for split in ("train", "valid")
             for part, value in (("images", dataset.images_dir), ("info", dataset.annotation_file))]
    assert "3 of the 3 images of val are in train too" in run(capsys, "--quick", *pairs)[1]


class Files:
    """As much of a dataset as `copy_findings` looks at."""

    def __init__(self, folder, names):
        self.folder, self.names = folder, names

    def __len__(self):
        return len(self.names)

    def image_path(self, index):
        return str(self.folder / self.names[index])


def test_files_of_one_name_in_several_folders_are_all_compared(tmp_path):
    for place, content in {"a/x.png": b"same", "b/x.png": b"another", "c/x.png": b"same"}.items():
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(content)
    train, val = Files(tmp_path, ["a/x.png", "b/x.png"]), Files(tmp_path, ["c/x.png"])
    for same_name in (False, True):
        found, = copy_findings({"train": train, "val": val}, same_name)
        assert found.startswith("1 of the 1 images of val are in train too: x.png")
        others = {"train": Files(tmp_path, ["b/x.png", "none.png"]), "val": val}
        assert copy_findings(others, same_name) == []


def test_another_image_of_equal_name_and_size_is_no_leak(tmp_path, capsys):
    path = described(tmp_path)
    for split, value in (("train", 1), ("val", 2)):
        pixels = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
        (tmp_path / split / "images" / "b.jpg").write_bytes(cv2.imencode(".bmp", pixels)[1])
    for flags in (["--quick"], ["--pictures="]):
        assert "images of val are in train" not in run(capsys, path, *flags)[1]
    shutil.copy(str(tmp_path / "train" / "images" / "b.jpg"),
                str(tmp_path / "val" / "images" / "b.jpg"))
    assert "1 of the 3 images of val are in train too: b.jpg" in run(capsys, path, "--quick")[1]


def mark_crowds(content, share):
    solid = [a for a in content["annotations"] if not a["iscrowd"]]
    for annotation in solid[:int(round(share * len(solid)))]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize("share", [0.5, 1])
def test_many_crowds_are_found(tmp_path, capsys, share):
    content = document()
    mark_crowds(content, share)
    out = run(capsys, described(tmp_path, content), "--quick")[1]
    assert re.search(r"train: [34] of 4 annotations have iscrowd 1.* set iscrowd to 0", out)


def test_a_class_that_val_does_not_show_is_found(tmp_path, capsys):
    assert "val: 1 of 3 classes has no object: cup" in run(capsys, described(tmp_path),
                                                           "--quick")[1]


@pytest.mark.parametrize("change, words", [
    (lambda a: a.update(segmentation=[1, 1, 9, 1, 9, 9]), "dropped 4 annotations with a malformed"),
    (lambda a: a.update(iscrowd=1), "4 are crowds"),
    (lambda a: a.update(bbox=[0, 0, 0, 9]), "bbox of zero or negative size"),
])
def test_a_dataset_without_an_object_is_neither_trained_on_nor_scored(tmp_path, capsys, change,
                                                                       words):
    content = document()
    for annotation in content["annotations"]:
        change(annotation)
    path = described(tmp_path, content)
    assert run(capsys, path, "--quick")[0] == 0
    with pytest.raises(UserError, match="of 4 annotations none is an object") as error:
        open_dataset("coco2017", path, None, None, "train")
    assert words in str(error.value)
    content["annotations"] = []
    make(tmp_path, content, "empty")
    with pytest.raises(UserError, match="of 0 annotations none"):
        open_dataset("coco2017", None, str(tmp_path / "empty" / "images"),
                     str(tmp_path / "empty" / "instances.json"), "val")


def test_a_file_that_does_not_load_is_an_error(tmp_path, capsys):
    path = described(tmp_path)
    (tmp_path / "val" / "instances.json").write_text("{")
    code, out = run(capsys, path)
    assert code == 2 and out.startswith("error: ") and out.count("\n") == 1
    assert run(capsys)[0] == 2
    (tmp_path / "my.yaml").write_text("train: {images: train/images, annotations: "
                                      "train/instances.json}")
    code, out = run(capsys, path, "--pictures=")
    assert code == 0 and "no validation split" in out


def test_a_batch_that_cannot_be_drawn_is_said(tmp_path, capsys):
    path = described(tmp_path)
    delete(tmp_path / "train" / "images")
    code, out = run(capsys, path, "--pictures={}".format(tmp_path / "x.png"))
    assert code == 0 and "first batch cannot be drawn: image 10" in out


def test_the_drawing_replaces_nothing_that_is_read(tmp_path, capsys):
    path = described(tmp_path)
    for taken in (tmp_path / "train" / "images" / "a.png", tmp_path / "train" / "instances.json"):
        before = taken.read_bytes()
        code, out = run(capsys, path, f"--pictures={taken}")
        assert code == 2 and "expected the name of a .png file that is no image of" in out
        assert taken.read_bytes() == before


def test_quick_check_before_training(tmp_path):
    config = get_config("yolact_shapes", pred_scales=[[2, 3], [4, 5], [6, 7]])
    described(tmp_path)
    train = CocoDataset(tmp_path / "train" / "images", tmp_path / "train" / "instances.json")
    lines = quick_check(train, None, config)
    assert lines[0].startswith("Data check : 2 findings in the annotations; python -m data.check")
    assert "(all of cup)" in lines[1] and lines[2] == "  train: 1 of 3 classes has no object: cup"
    assert lines[3].startswith("  suggestion: anchors that fit better: --pred_scales=")
    leak(tmp_path / "train" / "images")
    val = CocoDataset(tmp_path / "val" / "images", tmp_path / "val" / "instances.json")
    with pytest.raises(UserError, match="the data check found: .* in train too: b.jpg"):
        quick_check(train, val, config, strict=True)


def test_a_recipe_that_finds_fewer_objects_than_an_image_shows(tmp_path):
    content = document()
    first = content["annotations"][0]
    content["annotations"] += [dict(first, id=1000 + n) for n in range(120)]
    train, config = make(tmp_path, content), get_config("yolact_shapes")
    said = [line for line in quick_check(train, None, config) if "more objects" in line]
    assert said == ["  suggestion: 1 of 3 images show more objects than the 100 that yolact_shapes "
                    "finds: --set max_num_detections=200 --set nms_top_k=300"]
    wanted = config.replace(max_num_detections=200, nms_top_k=300)
    assert "more objects" not in str(quick_check(train, None, wanted))
    more = config.replace(max_num_detections=100, nms_top_k=5000)
    assert "max_num_detections=200 --set nms_top_k=5000" in str(quick_check(train, None, more))


def test_duplicates_keep_the_first_and_spare_crowds(tmp_path):
    content = document()
    for number, original in ((200, 0), (201, 2), (202, 0)):
        content["annotations"].append(dict(content["annotations"][original], id=number))
    content["annotations"].append(dict(content["annotations"][0], id=203, image_id=20))
    dataset = make(tmp_path, content)
    assert len(duplicates(dataset)) == 2
    assert list(counts(dataset).values()) == [3, 0, 6, 6, 0, 0, 2, 4]
    assert list(class_counts(dataset).values()) == [(2, 2), (4, 2), (0, 0)]


def test_no_objects_at_all(tmp_path, capsys):
    content = document()
    content["annotations"] = []
    code, out = run(capsys, described(tmp_path, content), "--quick")
    assert code == 0 and "3 of 3 classes have no object" in out
