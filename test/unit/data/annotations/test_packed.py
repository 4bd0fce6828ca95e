"""Annotations that an earlier start has left in the user's cache."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np

from data.annotations.packed import load_annotations


def assert_same_annotations(found, expected):
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype, name
            np.testing.assert_array_equal(getattr(found, name), value)
        elif name != "kept_in":
            assert getattr(found, name) == value, name


def test_the_second_start_finds_the_same_and_reads_nothing(coco_mini, tmp_path, monkeypatch):
    """Also what was dropped and repaired, and the file's own name where a copy lies elsewhere."""
    source = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    source["annotations"][0]["bbox"] = [1, 2, 0, 3]
    source["annotations"][1]["segmentation"] = []
    source["annotations"][2]["segmentation"].append([1, 2])
    path, copy = tmp_path / "a.json", tmp_path / "b.json"
    for place in (path, copy):
        place.write_text(json.dumps(source))
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no folder: nothing is kept
    expected = load_annotations(str(path))
    assert expected.kept_in is None and len(expected.report.defects) == 3
    assert_same_annotations(pickle.loads(pickle.dumps(expected)), expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert_same_annotations(load_annotations(str(path)), expected)
    monkeypatch.setattr("data.annotations.packed.read_columns", None)
    again = load_annotations(str(path))
    assert again.kept_in is not None
    assert_same_annotations(again, expected)
    assert load_annotations(str(copy)).report.file == str(copy)
    data = pickle.dumps(again)  # for spawned workers: they map the file, too
    assert len(data) < 1000
    assert_same_annotations(pickle.loads(data), expected)


def test_a_spawned_worker_reads_again_what_has_gone(coco_mini, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = load_annotations(str(coco_mini / "annotations" / "instances_val2017.json"))
    data = pickle.dumps(found)
    Path(found.kept_in).unlink()
    assert_same_annotations(pickle.loads(data), found)


def test_sizes_from_image_headers_are_not_kept(tmp_path, monkeypatch):
    """The images may change while the annotation file stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 1, "name": "thing"}],
        "annotations": []}))
    for side in (10, 20):
        found = load_annotations(str(path), lambda name, number: (side, side))  # noqa: B023
        assert found.image_sizes.tolist() == [[side, side]] and found.kept_in is None
