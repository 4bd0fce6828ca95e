"""The description of a dataset in one file: what it may say, and a sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.datasets import find_dataset, find_dataset_file, open_dataset
from data.description import format_dataset_file, read_dataset_file
from helpers.coco_files import document, write_images, write_json
from utils.errors import UserError

NAMES = ["chat noir \u732b", "dog", "cup"]  # in the order of their ids
GOOD = "train: {images: images, annotations: instances.json}\n"


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    write_json(tmp_path, document())
    return tmp_path


def write(folder, text, name="my.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def opened(root, split="train"):
    return open_dataset("coco2017", root, None, None, split)


def mistake(action, *arguments):
    with pytest.raises(UserError) as error:
        action(*arguments)
    return str(error.value)


def test_paths_are_relative_to_the_file(folder, tmp_path, monkeypatch):
    path = write(folder, GOOD + "names:\n  - chat noir \u732b\n  - dog\n  - cup\n")
    monkeypatch.chdir(str(tmp_path.parent))
    dataset = opened(path)
    assert dataset.class_names == NAMES and len(dataset) == 3
    assert dataset[0].image.shape == (30, 40, 3)
    assert find_dataset("coco2017", path, None, None, "train")[0] == (
        folder / "images", folder / "instances.json")


def test_absolute_paths_and_json(folder):
    content = {"train": {"images": str(folder / "images"),
                         "annotations": str(folder / "instances.json")}}
    (folder / "below").mkdir()
    assert len(opened(write(folder / "below", json.dumps(content), "my.json"))) == 3


def test_a_folder_with_data_yaml(folder):
    write(folder, GOOD, "data.yaml")
    assert len(opened(str(folder))) == 3


def test_pairs_of_flags_win(folder):
    path = write(folder, GOOD + "names: [other]\n")
    dataset = open_dataset("coco2017", path, str(folder / "images"),
                           str(folder / "instances.json"), "train")
    assert len(dataset) == 3


def test_a_folder_without_one_is_a_layout(folder):
    assert find_dataset_file(str(folder)) is None and find_dataset_file(None) is None
    assert "train2017" in mistake(opened, str(folder))


def test_written_text_is_read_back(tmp_path):
    names = ["no", "1", "a: b # c", "\u732b", 'quo"te', "null"]
    text = format_dataset_file({"train": ("im ages: #1", "t.json")}, names)
    described = read_dataset_file(Path(write(tmp_path, text)))
    assert described.names == names
    assert described.splits == {"train": (tmp_path / "im ages: #1", tmp_path / "t.json")}


MISTAKES = {
    "unknown key": ("trian: {images: a, annotations: b}",
                    ["unknown key 'trian'; did you mean 'train'?", "Known: train, val, test"]),
    "unknown key inside": ("train: {image: a, annotations: b}",
                           ["unknown key 'train.image'; did you mean 'images'?"]),
    "YOLO": ("path: .\ntrain: images/train\nval: images/val\nnames: [cat]",
             ["'train' names images/train, which was not found"]),
    "missing part": ("train: {images: a}", ["'train.annotations' is nothing",
                                            "COCO instances file"]),
    "a list for a path": ("train: {images: [a], annotations: b}", ["'train.images' is ['a']"]),
    "nothing": ("", ["holds nothing", "train: {images:"]),
    "a text": ("just words", ["holds 'just words'"]),
    "no split": ("names: [cat]", ["neither train nor val"]),
    "a split of nothing": ("train:", ["'train' is nothing"]),
    "not YAML": ("train: [1", ["not YAML", "line 1"]),
    "code": ("train: !!python/object/apply:os.system ['true']", ["not YAML"]),
    "names a text": (GOOD + "names: person", ["names is 'person', expected a list"]),
    "names a truth value": (GOOD + "names: [cat, no]", ["False", "quotes"]),
    "names a number": (GOOD + "names: [cat, 5]", ["5", "put it in quotes"]),
    "a date that is none": (GOOD + "names: [2001-99-99]", ["not YAML"]),
    "a number that is none": (GOOD + 'names: [!!int ""]', ["not YAML"]),
    "a character that is none": (GOOD + r'names: ["\U00110000"]', ["not YAML"]),
    "a key that is a list": ("[1, 2]: 3", ["not YAML"]),
    "a user that is none": ("train: {images: ~nosuch/x, annotations: a}", ["~nosuch/x"]),
    "a path that is none": (r'train: {images: "a\0b", annotations: a}',
                            ["'train.images' is 'a\\x00b'"]),
    "names twice": (GOOD + "names: [cat, cat]", ["'cat' 2 times"]),
    "names empty": (GOOD + "names: []", ["names is [], expected a list of class names"]),
    "names keys": (GOOD + "names: {a: b}", ["names is {'a': 'b'}, expected a list"]),
    "annotations": ('{"images": [], "categories": []}', ["is an annotation file",
                                                         "--train_info"]),
    "names differ": (GOOD + "names: [dog, cat, cup]",
                     ["class 1 of names is 'dog', but category 1 of", "'chat noir"]),
    "names too few": (GOOD + "names: ['chat noir \u732b', dog]",
                      ["class 3 of names is nothing", "is 'cup'", "2 names, 3 categories"]),
    "no such folder": ("train: {images: imagse, annotations: instances.json}",
                       ["'train' names", "imagse", "was not found",
                        "did you mean 'images'?", "relative to the file"]),
    "no such file": ("train: {images: images, annotations: instance.json}",
                     ["'train' names", "instance.json", "did you mean 'instances.json'?"]),
    "no such split": ("val: {images: images, annotations: instances.json}",
                      ["has no 'train', only val"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(folder, name):
    text, expected = MISTAKES[name]
    message = mistake(opened, write(folder, text))
    assert "my.yaml" in message and "\n" not in message
    for part in expected:
        assert part in message


def test_a_file_that_is_not_there(folder):
    write(folder, GOOD)
    message = mistake(opened, str(folder / "mu.yaml"))
    assert "dataset file not found" in message and "did you mean 'my.yaml'?" in message


def test_a_recursive_alias_ends(folder):
    assert "&a holds itself, line 1" in mistake(opened, write(folder, "&a [*a]"))


def test_without_pyyaml(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    assert "pip install pyyaml" in mistake(opened, write(folder, GOOD))
    assert len(opened(write(folder, json.dumps(
        {"train": {"images": "images", "annotations": "instances.json"}}), "my.json"))) == 3
