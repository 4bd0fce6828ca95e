"""The embedded dataset: repeatable, with sound ground truth, written whole or not at all."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest

from data import shapes
from utils.errors import UserError


def test_a_seed_gives_the_same_scene():
    first, again, other = (shapes.draw_scene(seed, "train", 5) for seed in (7, 7, 8))
    assert np.array_equal(first.image, again.image)
    assert shapes.annotate(first) == shapes.annotate(again)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()
    assert (shapes.draw_scene(7, "val", 5).image[:180, :180] != first.image[:180, :180]).any()


@pytest.fixture(scope="module")
def scenes():
    return [shapes.draw_scene(3, "train", index) for index in range(150)]


def decode(annotation, shape):
    mask = pytest.importorskip("pycocotools.mask")
    runs = annotation["segmentation"]
    if isinstance(runs, list):
        runs = mask.merge(mask.frPyObjects(runs, shape[0], shape[1]))
    return mask.decode(runs).astype(bool)


def test_scenes_have_all_that_is_promised(scenes):
    labels = [item.label for scene in scenes for item in scene.objects]
    assert sorted(set(labels)) == [0, 1, 2, 3]
    assert any(not scene.objects for scene in scenes)
    assert any(item.points is None for scene in scenes for item in scene.objects)
    assert max(len(scene.objects) for scene in scenes) in (shapes.MAX_OBJECTS,
                                                           shapes.MAX_OBJECTS + 1)
    whole = [item for scene in scenes for item in scene.objects if item.points is not None]
    shares = np.array([item.visible.sum() / item.area for item in whole])
    assert shares.min() >= 0.4
    assert 0.1 < (shares < 1).mean() < 0.9
    sides = np.array([np.ptp(item.points, axis=0).max() for item in whole])
    assert sides.min() < 40 and sides.max() > 100
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        assert all(180 <= side <= 220 for side in scene.image.shape[:2])


def test_annotations_say_what_is_visible(scenes):
    kinds = set()
    for scene in scenes:
        height, width = scene.image.shape[:2]
        annotations = shapes.annotate(scene)
        assert len(annotations) == len(scene.objects)
        for item, annotation in zip(scene.objects, annotations):
            drawn = decode(annotation, scene.image.shape)
            union = (drawn | item.visible).sum()
            assert (drawn & item.visible).sum() / union > 0.93
            assert annotation["area"] == item.visible.sum()
            assert annotation["iscrowd"] == (item.points is None)
            x, y, box_width, box_height = annotation["bbox"]
            assert min(x, y) >= 0 and x + box_width <= width and y + box_height <= height
            rows, columns = np.nonzero(drawn)
            tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(tight - [x, y, x + box_width, y + box_height]).max() <= 3
            polygons = annotation["segmentation"]
            if isinstance(polygons, list):
                assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
            kinds.add((isinstance(polygons, list), annotation["iscrowd"]))
    assert {(True, 0), (False, 1)} <= kinds


def test_a_hole_is_annotated_as_run_lengths():
    visible = np.zeros((40, 50), bool)
    visible[5:30, 5:35] = True
    visible[10:15, 10:20] = False
    item = shapes.ShapeObject(1, np.zeros((4, 2)), visible, int(visible.sum()) + 50)
    annotation = shapes.annotate(shapes.Scene(np.zeros((40, 50, 3), np.uint8), [item]))[0]
    assert annotation["iscrowd"] == 0
    assert np.array_equal(decode(annotation, visible.shape), visible)
    assert annotation["bbox"] == [5.0, 5.0, 30.0, 25.0]


def test_coverage_of_polygons():
    canvas = np.zeros((120, 120, 3))

    def cover(points):
        full = np.zeros(canvas.shape[:2])
        place, part = shapes._cover(points, canvas)
        full[place] = part
        return full

    square = np.array([[1, 1], [3.5, 1], [3.5, 3], [1, 3]])
    expected = np.zeros(canvas.shape[:2])
    expected[1:3, 1:3], expected[1:3, 3] = 1, 0.5
    # OpenCV draws the outline too: half of one of the eight samples along a pixel's side.
    assert np.abs(cover(square) - expected).max() <= 1 / 8
    assert np.array_equal(cover(square[::-1]), cover(square))
    angles = np.radians(np.arange(36) * 10)
    circle = 60 + 50 * np.column_stack([np.cos(angles), np.sin(angles)])
    assert abs(cover(circle).sum() - 36 / 2 * math.sin(math.radians(10)) * 50 ** 2) < 30
    assert np.allclose(cover(circle - 40)[:80, :80], cover(circle)[40:, 40:], atol=1 / 8)
    assert cover(circle + 200).sum() == 0


def test_dataset_in_coco_layout(tmp_path):
    folder = tmp_path / "set"
    seen = []
    assert shapes.write_dataset(str(folder), 5, 6, 3, lambda done, total: seen.append(done))
    assert seen == list(range(1, 10))
    for split, count in (("train", 6), ("val", 3)):
        content = json.loads((folder / "annotations" / f"instances_{split}2017.json")
                             .read_text())
        assert [c["name"] for c in content["categories"]] == list(shapes.CLASS_NAMES)
        assert len(content["images"]) == count
        ids = [a["id"] for a in content["annotations"]]
        assert len(set(ids)) == len(ids)
        for index, image in enumerate(content["images"]):
            pixels = cv2.imread(str(folder / (split + "2017") / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3)
            assert np.array_equal(pixels, shapes.draw_scene(5, split, index).image)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_dataset_is_kept_or_replaced(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert shapes.write_dataset(str(folder), 1, 2, 1)
    annotations = folder / "annotations" / "instances_train2017.json"
    before = annotations.stat().st_mtime_ns
    assert not shapes.write_dataset(str(folder), 1, 2, 1)
    assert annotations.stat().st_mtime_ns == before
    assert shapes.write_dataset(str(folder), 2, 2, 1)
    assert json.loads((folder / shapes.STAMP).read_text())["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_nothing_half_written(tmp_path):
    folder = tmp_path / "set"

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.write_dataset(str(folder), 1, 2, 1, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not a shapes dataset"):
        shapes.write_dataset(str(tmp_path), 1, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="train is 0"):
        shapes.write_dataset(str(tmp_path / "set"), 1, 0, 1)
    with pytest.raises(UserError, match="cannot write"):
        shapes.write_dataset(str(tmp_path / "mine.txt" / "set"), 1, 1, 1)
