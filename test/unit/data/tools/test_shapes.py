"""The embedded dataset: same pixels everywhere, sound ground truth, written whole or not at all."""

from __future__ import annotations

import json
import math
import zlib

import cv2
import numpy as np
import pytest

from data import shapes
from data.tools import synthetic as shape_raster
from data.tools import synthetic as shape_scene
from utils.errors import UserError

# crc32 of the pixels and of the annotations of the first twelve images, (seed, split) -> both.
FINGERPRINTS = {
    (0, "train"): (1832097986, 4050997034),
    (0, "val"): (1402884371, 4131142187),
    (7, "train"): (3324745919, 701970539),
    (123456789, "val"): (3514533882, 1304627702),
}


def fingerprint(seed, split, count=12):
    pixels = geometry = 0
    for index in range(count):
        scene = shape_scene.draw_scene(seed, split, index)
        pixels = zlib.crc32(np.ascontiguousarray(scene.image).tobytes(), pixels)
        text = json.dumps([scene.image.shape, shape_scene.annotate(scene)], sort_keys=True)
        geometry = zlib.crc32(text.encode("ascii"), geometry)
    return pixels, geometry


@pytest.mark.parametrize("seed, split", sorted(FINGERPRINTS))
def test_same_pixels_and_geometry_on_every_version(seed, split):
    assert fingerprint(seed, split) == FINGERPRINTS[seed, split]


def test_cosines_are_far_from_rounding_boundaries():
    for degrees in range(360):
        scaled = math.cos(math.radians(degrees)) * 2 ** 14
        assert abs(abs(scaled - math.floor(scaled)) - 0.5) > 1e-4


@pytest.fixture(scope="module")
def scenes():
    return [shape_scene.draw_scene(3, "train", index) for index in range(150)]


def decode(annotation, shape):
    mask = pytest.importorskip("pycocotools.mask")
    runs = mask.frPyObjects(annotation["segmentation"], shape[0], shape[1])
    return mask.decode(mask.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def test_scenes_have_all_that_is_promised(scenes):
    labels = [item.label for scene in scenes for item in scene.objects]
    assert sorted(set(labels)) == [0, 1, 2, 3]
    assert any(not scene.objects for scene in scenes)
    assert any(item.points is None for scene in scenes for item in scene.objects)
    assert max(len(scene.objects) for scene in scenes) in (shape_scene.MAX_OBJECTS,
                                                           shape_scene.MAX_OBJECTS + 1)
    whole = [item for scene in scenes for item in scene.objects if item.points is not None]
    shares = np.array([item.visible.sum() / item.area for item in whole])
    assert shares.min() >= 0.4
    assert 0.1 < (shares < 1).mean() < 0.9
    sides = np.array([np.ptp(item.points, axis=0).max() / 8 for item in whole])
    assert sides.min() < 40 and sides.max() > 100
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        assert all(180 <= side <= 220 for side in scene.image.shape[:2])


def test_annotations_say_what_is_visible(scenes):
    kinds = set()
    for scene in scenes:
        height, width = scene.image.shape[:2]
        annotations = shape_scene.annotate(scene)
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
    item = shape_scene.ShapeObject(1, np.zeros((4, 2), np.int64), visible, int(visible.sum()) + 50)
    annotation = shape_scene.annotate(shape_scene.Scene(np.zeros((40, 50, 3), np.uint8), [item]))[0]
    assert annotation["iscrowd"] == 0
    assert np.array_equal(decode(annotation, visible.shape), visible)
    assert annotation["bbox"] == [5.0, 5.0, 30.0, 25.0]


def test_coverage_of_polygons():
    square = np.array([[8, 8], [28, 8], [28, 24], [8, 24]])
    cover = shape_raster.cover_polygon(square, 5, 5)
    expected = np.zeros((5, 5), int)
    expected[1:3, 1:3], expected[1:3, 3] = 32, 16
    assert np.array_equal(cover, expected)
    assert np.array_equal(shape_raster.cover_polygon(square[::-1], 5, 5), expected)
    circle = shape_raster.polar(50 * 8, np.arange(36) * 10) + 60 * 8
    area = shape_raster.cover_polygon(circle, 120, 120).sum() / 32
    assert abs(area - 36 / 2 * math.sin(math.radians(10)) * 50 ** 2) < 10
    shifted = shape_raster.cover_polygon(circle - 40 * 8, 120, 120)
    assert np.array_equal(shifted[:80, :80],
                          shape_raster.cover_polygon(circle, 120, 120)[40:, 40:])


def test_run_lengths_and_outlines():
    mask = np.zeros((4, 3), bool)
    assert shape_raster.run_lengths(mask) == {"counts": [12], "size": [4, 3]}
    mask[0, 0] = mask[3, 2] = True
    assert shape_raster.run_lengths(mask)["counts"] == [0, 1, 10, 1]
    random = np.random.RandomState(0).rand(30, 20) > 0.5
    assert np.array_equal(decode({"segmentation": shape_raster.run_lengths(random)}, (30, 20)),
                          random)
    blocks = np.zeros((20, 20), bool)
    blocks[2:8, 2:8] = blocks[8:14, 8:14] = True
    polygons, holes = shape_raster.outlines(blocks)
    assert len(polygons) == 2 and not holes
    blocks[4, 4] = False
    assert shape_raster.outlines(blocks)[1]
    sliver = np.zeros((20, 20), bool)
    sliver[3:13, 5] = True
    assert shape_raster.outlines(sliver)[0] == []


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
            assert np.array_equal(pixels, shape_scene.draw_scene(5, split, index).image)
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
