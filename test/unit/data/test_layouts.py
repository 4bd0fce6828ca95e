from __future__ import annotations

import pytest

from data.config import Config
from data.datasets import dataset_paths, find_dataset
from utils.errors import UserError

LAYOUTS = {
    ("coco2017", "train"): ("train2017", "annotations/instances_train2017.json"),
    ("coco2017", "val"): ("val2017", "annotations/instances_val2017.json"),
    ("coco2014", "train"): ("train2014", "annotations/instances_train2014.json"),
    ("coco2014", "val"): ("val2014", "annotations/instances_val2014.json"),
    ("coco2017_testdev", "train"): ("train2017", "annotations/instances_train2017.json"),
    ("coco2017_testdev", "val"): ("test2017", "annotations/image_info_test-dev2017.json"),
    ("pascal_sbd", "train"): ("img", "pascal_sbd_train.json"),
    ("pascal_sbd", "val"): ("img", "pascal_sbd_val.json"),
}


def _make(root, images, annotations):
    (root / images).mkdir(parents=True)
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text("{}")


@pytest.mark.parametrize("dataset,split", LAYOUTS)
def test_paths(tmp_path, dataset, split):
    images, annotations = LAYOUTS[dataset, split]
    _make(tmp_path, images, annotations)
    for name in (dataset, dataset + "_dataset"):
        assert dataset_paths(name, str(tmp_path), split) == (
            tmp_path / images, tmp_path / annotations)
    (tmp_path / images).rename(tmp_path / "images")  # where the original has those of all splits
    assert dataset_paths(dataset, tmp_path, split)[0] == tmp_path / "images"


def test_without_a_place_it_is_where_the_original_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UserError, match="no dataset: give --data"):
        find_dataset("coco2017", None, None, None, "val")
    _make(tmp_path / "data" / "coco", "images", "annotations/instances_val2017.json")
    _make(tmp_path / "data" / "sbd", "img", "pascal_sbd_val.json")
    assert find_dataset("coco2017_dataset", None, None, None, "val")[0][0].name == "images"
    assert find_dataset("pascal_sbd_dataset", None, None, None, "val")[0][0].name == "img"


def test_every_dataset_of_the_recipes_has_a_layout():
    declared = Config.__dataclass_fields__["dataset"].metadata
    assert {dataset for dataset, _ in LAYOUTS} == set(declared["choices"])


def _error(*args):
    with pytest.raises(UserError) as error:
        dataset_paths(*args)
    return str(error.value)


def test_missing_root_names_path_and_layout(tmp_path):
    message = _error("coco2017", tmp_path / "none", "train")
    for word in (str(tmp_path / "none"), "train2017", "annotations/instances_train2017.json"):
        assert word in message
    (tmp_path / "file").write_text("")
    assert "data folder is not a folder" in _error("coco2017", tmp_path / "file", "train")


def test_missing_parts_are_named(tmp_path):
    message = _error("coco2017", tmp_path, "val")
    assert message.startswith("image folder not found: looked for {}".format(tmp_path / "val2017"))
    (tmp_path / "val2017").mkdir()
    message = _error("coco2017", tmp_path, "val")
    assert str(tmp_path / "annotations" / "instances_val2017.json") in message
    assert message.startswith("annotation file not found")


def test_layout_one_folder_up_or_down_is_suggested(tmp_path):
    _make(tmp_path / "coco", "val2017", "annotations/instances_val2017.json")
    for root in (tmp_path, tmp_path / "coco" / "annotations"):
        assert "did you mean {}?".format(tmp_path / "coco") in _error("coco2017", root, "val")


def test_an_unknown_layout_suggests_the_nearest(tmp_path):
    assert "did you mean 'coco2017'?" in _error("coco2018", tmp_path, "train")
