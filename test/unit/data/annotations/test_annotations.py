from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from data.annotations import kept_arrays, reader
from data.annotations.packed import load_annotations
from data.annotations.reader import read_json_text
from helpers.coco_files import HEIGHT, WIDTH, document, write_json
from utils.errors import UserError
from utils.inference.ground_truth import GroundTruth


def _load(folder, content, **options):
    return load_annotations(write_json(folder, content), **options)


def _edited(edit):
    content = document()
    edit(content)
    return content


def test_valid_file_is_packed_in_image_order(tmp_path):
    packed = _load(tmp_path, document())
    assert [tuple(category) for category in packed.categories] == [
        (0, "chat noir \u732b"), (7, "dog"), (90, "cup")]
    assert packed.image_ids.tolist() == [30, 10, 20]
    assert packed.object_offsets.tolist() == [0, 1, 4, 4]
    assert packed.labels.tolist() == [1, 2, 3, 1]
    assert packed.crowd.tolist() == [False, False, True, False]
    np.testing.assert_allclose(packed.boxes[0], [5 / 40, 5 / 30, 35 / 40, 15 / 30], rtol=1e-6)
    assert packed.boxes.dtype == np.float32
    assert [packed.file_name(n) for n in range(3)] == ["c.png", "a.png", "b.jpg"]
    parts = packed.segmentation(0, WIDTH, HEIGHT)
    assert [part.shape for part in parts] == [(4, 2), (3, 2)]
    assert parts[1].tolist() == [[25, 5], [35, 5], [35, 15]]
    assert mask_utils.area(packed.segmentation(2, WIDTH, HEIGHT)) == 12
    assert len(packed.report.sentences()) == 1
    assert packed.report.objects_per_category == {"chat noir \u732b": 2, "dog": 1, "cup": 0}


def _rle_of(mask):
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_compressed_and_plain_rle_are_the_same(tmp_path):
    content = document()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:12, 0] = 1
    crowd = content["annotations"][2]
    content["annotations"].append(dict(crowd, id=105, segmentation=_rle_of(mask)))
    packed = _load(tmp_path, content)
    masks = [mask_utils.decode(packed.segmentation(row, WIDTH, HEIGHT)) for row in (2, 4)]
    assert np.array_equal(masks[0], mask) and np.array_equal(masks[1], mask)


def test_any_order_of_images_and_annotations(tmp_path):
    rng = np.random.RandomState(3)
    ids = rng.permutation(1000)[:60].tolist()
    labels = rng.permutation(50)[:9].tolist()
    square = document()["annotations"][0]["segmentation"]
    annotations = [
        {"id": n + 1, "image_id": ids[rng.randint(60)], "category_id": labels[rng.randint(9)],
         "bbox": [5, 5, 10, 10 - n / 100], "segmentation": square} for n in range(300)]
    packed = _load(tmp_path, {
        "images": [{"id": number, "file_name": str(number), "width": WIDTH, "height": HEIGHT}
                   for number in ids],
        "categories": [{"id": number, "name": str(number)} for number in labels],
        "annotations": annotations})
    for index, number in enumerate(ids):
        first, last = packed.object_offsets[index:index + 2]
        expected = [a for a in annotations if a["image_id"] == number]
        assert [packed.categories[label - 1].id for label in packed.labels[first:last]] == [
            a["category_id"] for a in expected]
        np.testing.assert_allclose(packed.boxes[first:last, 3] * HEIGHT,
                                   [5 + a["bbox"][3] for a in expected], rtol=1e-5)


def test_segmentations_are_copies(tmp_path):
    packed = _load(tmp_path, document())
    packed.segmentation(0, WIDTH, HEIGHT)[1][:] = -1
    assert packed.segmentation(0, WIDTH, HEIGHT)[1].min() == 5


def _set(index, **fields):
    return lambda content: content["annotations"][index].update(fields)


def _without(kind, index, key):
    return lambda content: content[kind][index].pop(key)


def _append(kind, **fields):
    return lambda content: content[kind].append(fields)


def _image(index, **fields):
    return lambda content: content["images"][index].update(fields)


ALWAYS_ERRORS = {
    "unknown category": (_set(0, category_id=3), ["annotation 101", "image 10", "3", "0 to 90"]),
    "unknown image": (_set(1, image_id=99), ["annotation 102", "99", "10 to 30"]),
    "string image_id": (_set(0, image_id="10"), ["annotation 101", "image_id '10'", "integer"]),
    "string category_id": (_set(0, category_id="7"), ["101", "category_id '7'", "integer"]),
    "string annotation id": (_set(0, id="101"), ["annotation '101'", "integer"]),
    "fractional id": (_set(0, id=1.5), ["annotation 1.5", "integer"]),
    "huge id": (_set(0, id=2 ** 70), [str(2 ** 70), "integer"]),
    "null iscrowd": (_set(0, iscrowd=None), ["annotation 101", "iscrowd None", "0 or 1"]),
    "iscrowd 2": (_set(0, iscrowd=2), ["annotation 101", "image 10", "iscrowd 2"]),
    "no category_id": (_without("annotations", 1, "category_id"), ["102", "category_id"]),
    "no image_id": (_without("annotations", 1, "image_id"), ["annotation 102", "image_id"]),
    "no id": (_without("annotations", 1, "id"), ["image_id 30", "id None"]),
    "duplicate annotation": (_set(3, id=101), ["annotation id 101"]),
    "duplicate image": (_image(0, id=10), ["image id 10"]),
    "duplicate category id": (_append("categories", id=7, name="x"), ["7", "'dog'", "'x'"]),
    "duplicate name": (_append("categories", id=8, name="dog"), ["'dog'", "id 7", "id 8"]),
    "string category": (_append("categories", id="8", name="x"), ["'8'", "integer"]),
    "no category name": (_append("categories", id=8), ["8", "name"]),
    "category is text": (lambda c: c["categories"].append("dog"), ["'dog'", "name"]),
    "string image": (_image(0, id="30"), ["'30'", "c.png", "integer"]),
    "no file name": (_without("images", 0, "file_name"), ["image 30", "file_name"]),
    "empty file name": (_image(0, file_name=""), ["image 30", "file_name"]),
    "no width": (_without("images", 0, "width"), ["image 30", "width"]),
    "zero height": (_image(0, height=0), ["image 30", "height 0"]),
    "string width": (_image(0, width="40"), ["image 30", "width '40'"]),
    "no images": (lambda c: c.pop("images"), ["'images'"]),
    "no categories": (lambda c: c.pop("categories"), ["'categories'"]),
    "images is a dict": (lambda c: c.update(images={}), ["'images' is a dict"]),
    "empty images": (lambda c: c.update(images=[]), ["'images' is empty"]),
    "empty categories": (lambda c: c.update(categories=[]), ["'categories' is empty"]),
    "annotation is a number": (lambda c: c["annotations"].insert(0, 5), ["'annotations'"]),
    "nested annotations": (lambda c: c.update(annotations=[c["annotations"]]), ["'annotations'"]),
    "captions": (lambda c: c.update(annotations=[{"id": 4, "image_id": 10, "caption": "a cat"}]),
                 ["annotation 4", "captions"]),
    "keypoints only": (lambda c: c.update(annotations=[
        {"id": 4, "image_id": 10, "category_id": 7, "keypoints": [1, 2, 2], "num_keypoints": 1}]),
        ["id 4", "segmentation", "keypoints"]),
    "boxes as corners": (lambda c: [a.update(bbox=[20, 10, 35, 25], segmentation=[
        [20, 10, 35, 10, 35, 25, 20, 25]]) for a in c["annotations"]], ["101", "width, height"]),
}


@pytest.mark.parametrize("name", ALWAYS_ERRORS)
def test_file_level_defects_are_errors(tmp_path, name):
    edit, words = ALWAYS_ERRORS[name]
    with pytest.raises(UserError) as error:
        _load(tmp_path, _edited(edit))
    message = str(error.value)
    for word in words + ["instances.json"]:
        assert word in message
    assert "\n" not in message


NOT_COCO = {
    "list": ("[]", "list"),
    "results of a network": ('[{"image_id": 1, "category_id": 1, "score": 0.5}]', "like results"),
    "results file": ('[{"image_id": 1, "category_id": 1, "score": 0.5, "id": 1}]', "results"),
    "number": ("3", "int"),
    "other dict": ('{"a": 1}', "'images'"),
    "empty": ("", "empty"),
    "blank": (" \n ", "empty"),
    "html": ("<!DOCTYPE html><html></html>", "not JSON"),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"),
    "text": ("hello", "not JSON"),
    "comma at the end": ('{"images": [], "annotations": [], "categories": [],}', "not JSON"),
    "broken": ('{"images": [}, "annotations": [], "categories": []}', "not JSON"),
    "deep": ("[" * 200000, "recursion"),
}


@pytest.mark.parametrize("name", NOT_COCO)
def test_not_coco_is_one_sentence(tmp_path, name):
    text, word = NOT_COCO[name]
    with pytest.raises(UserError) as error:
        _load(tmp_path, text)
    assert word in str(error.value) and "instances.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "gbk"])
def test_a_file_of_a_windows(tmp_path, encoding):
    content = document()
    content["categories"][0]["name"] = "\u72d7"
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    loaded, truth = load_annotations(path), GroundTruth(str(path))
    assert ("read as GB18030" in loaded.report.sentences()[-1]) == (encoding == "gbk")
    assert "\u72d7" in str(loaded.categories) and "\u72d7" in str(truth.coco.cats)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.35, 0.6, 0.9, 0.999])
def test_truncated_json(tmp_path, fraction):
    text = json.dumps(document())
    with pytest.raises(UserError, match="instances.json: not JSON .* export it again"):
        _load(tmp_path, text[:int(len(text) * fraction)])


def test_the_hole_of_a_sparse_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_PIECE", 1 << 12)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document()) + " " * 5000)
    assert len(read_json_text(path)) == path.stat().st_size
    with open(str(path), "r+b") as stream:
        stream.truncate(1 << 30)
    assert len(read_json_text(path)) < 1 << 14
    monkeypatch.setattr(kept_arrays, "digest", lambda path: pytest.fail("the hole is digested"))
    with pytest.raises(UserError, match="not JSON"):
        load_annotations(path)


def test_missing_file_folder_and_binary(tmp_path):
    with pytest.raises(UserError, match="looked for /"):
        load_annotations(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        load_annotations(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\x80\x81\xff\xd8")
    with pytest.raises(UserError, match="not a text file"):
        load_annotations(tmp_path / "x.json")


_NAN = float("nan")
_BAD_COUNTS = {"size": [HEIGHT, WIDTH], "counts": "oooo"}
DROPPED = {
    "empty list": ({"segmentation": []}, "no_outline"),
    "empty part": ({"segmentation": [[]]}, "no_outline"),
    "null segmentation": ({"segmentation": None}, "no_outline"),
    "empty dict": ({"segmentation": {}}, "no_outline"),
    "two points": ({"segmentation": [[1, 1, 5, 5]]}, "malformed_outline"),
    "odd numbers": ({"segmentation": [[1, 1, 5, 5, 9, 9, 3]]}, "malformed_outline"),
    "NaN": ({"segmentation": [[1, 1, 5, 5, 9, _NAN]]}, "malformed_outline"),
    "infinite": ({"segmentation": [[1, 1, 5, 5, 9, 1e300]]}, "malformed_outline"),
    "text in polygon": ({"segmentation": [[1, 1, 5, 5, 9, "9"]]}, "malformed_outline"),
    "flat polygon": ({"segmentation": [1, 1, 5, 5, 9, 9]}, "malformed_outline"),
    "text": ({"segmentation": "polygon"}, "malformed_outline"),
    "number": ({"segmentation": 5}, "malformed_outline"),
    "nested too deep": ({"segmentation": [[[1, 1], [5, 5], [9, 9]]]}, "malformed_outline"),
    "RLE without size": ({"segmentation": {"counts": [1200]}}, "malformed_outline"),
    "RLE without counts": ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "malformed_outline"),
    "RLE text size": ({"segmentation": {"size": ["30", 40], "counts": [1200]}},
                      "malformed_outline"),
    "RLE too short": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 5]}},
                      "malformed_outline"),
    "RLE negative run": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}},
                         "malformed_outline"),
    "RLE text counts": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": ["5"]}},
                        "malformed_outline"),
    "RLE broken string": ({"segmentation": _BAD_COUNTS}, "malformed_outline"),
    "RLE unicode string": ({"segmentation": dict(_BAD_COUNTS, counts="\u732b")},
                           "malformed_outline"),
    "RLE of other size": ({"segmentation": {"size": [WIDTH, HEIGHT], "counts": [0, 9, 1191]}},
                          "rle_size"),
    "RLE without pixels": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1200]}},
                           "no_outline"),
    "three numbers": ({"bbox": [1, 2, 3]}, "malformed_box"),
    "text box": ({"bbox": ["1", "2", "3", "4"]}, "malformed_box"),
    "text in box": ({"bbox": [1, 2, "3", 4]}, "malformed_box"),
    "NaN box": ({"bbox": [1, 2, 3, _NAN]}, "malformed_box"),
    "zero width": ({"bbox": [5, 5, 0, 10]}, "degenerate_box"),
    "negative height": ({"bbox": [5, 5, 10, -1]}, "degenerate_box"),
    "right of the image": ({"bbox": [40, 5, 10, 10]}, "outside_box"),
    "above the image": ({"bbox": [5, -20, 10, 20]}, "outside_box"),
    "a hair inside": ({"bbox": [39.999999999, 5, 10, 10]}, "outside_box"),
}


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("name", DROPPED)
def test_bad_objects_are_dropped_counted_and_named(tmp_path, name, index):
    fields, key = DROPPED[name]
    content = _edited(_set(index, **fields))
    annotation = content["annotations"][index]
    packed = _load(tmp_path, content)
    assert packed.report.defects[key].count == 1
    assert packed.report.defects[key].examples == [annotation["id"]]
    assert packed.report.dropped == 1 and len(packed.labels) == 3
    text = " ".join(packed.report.sentences())
    assert str(annotation["id"]) in text and "1 of 4" in text
    # The others are as they would be without it.
    rest = document()
    del rest["annotations"][index]
    expected = _load(tmp_path, rest)
    np.testing.assert_array_equal(packed.boxes, expected.boxes)
    for row in range(3):
        found, wanted = (p.segmentation(row, WIDTH, HEIGHT) for p in (packed, expected))
        if isinstance(wanted, dict):
            assert found == wanted
        else:
            assert [part.tolist() for part in found] == [part.tolist() for part in wanted]


REPAIRED = {
    "one bad part": (_set(1, segmentation=[[1, 1, 5, 5], [5, 5, 35, 5, 35, 15, 5, 15]]),
                     "removed_part"),
    "one NaN part": (_set(1, segmentation=[[1, 1, 5, 5, _NAN, 4], [5, 5, 35, 5, 35, 15, 5, 15]]),
                     "removed_part"),
    "no bbox": (_without("annotations", 1, "bbox"), "derived_box"),
    "null bbox": (_set(1, bbox=None), "derived_box"),
    "empty bbox": (_set(1, bbox=[]), "derived_box"),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_repairable_objects_stay(tmp_path, name):
    edit, key = REPAIRED[name]
    packed = _load(tmp_path, _edited(edit))
    assert packed.report.defects[key].examples == [102] and packed.report.dropped == 0
    np.testing.assert_allclose(packed.boxes[0] * [40, 30, 40, 30], [5, 5, 35, 15], rtol=1e-5)
    assert packed.segmentation(0, WIDTH, HEIGHT)[0][0].tolist() == [5, 5]


def test_missing_bbox_of_an_rle(tmp_path):
    packed = _load(tmp_path, _edited(_without("annotations", 2, "bbox")))
    np.testing.assert_allclose(packed.boxes[2] * [40, 30, 40, 30], [0, 0, 1, 12], rtol=1e-5)


def test_boxes_are_clipped_and_counted_beyond_one_pixel(tmp_path):
    content = document()
    content["annotations"][0].update(bbox=[5, 5, 35.9, 10], segmentation=[
        [5, 5, 40, 5, 40, 15, 5, 15]])
    assert not _load(tmp_path, content).report.defects
    content["annotations"][0]["bbox"] = [-2, 5, 45, 10]
    packed = _load(tmp_path, content)
    assert packed.report.defects["clipped_box"].examples == [101] and packed.report.dropped == 0
    assert packed.boxes[1].tolist() == [0, np.float32(5 / 30), 1, 0.5]


def test_optional_fields_may_be_left_out(tmp_path):
    content = document()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    packed = _load(tmp_path, content)
    assert not packed.crowd.any()


def test_unrelated_nested_objects_do_no_harm(tmp_path):
    content = document()
    content["info"] = {"file_name": "x", "id": 4}
    content["annotations"][0]["attributes"] = {"occluded": False, "id": "a"}
    packed = _load(tmp_path, content)
    assert len(packed.labels) == 4


def test_without_annotations_there_are_no_objects(tmp_path):
    content = document()
    del content["annotations"]
    packed = _load(tmp_path, content)
    assert packed.object_offsets.tolist() == [0, 0, 0, 0] and packed.boxes.shape == (0, 4)


def test_empty_annotations_are_all_background(tmp_path):
    assert _load(tmp_path, dict(document(), annotations=[])).report.empty_images == 3


def test_numbers_and_names_that_no_file_can_have(tmp_path):
    text = json.dumps(document()).replace('"area": ', '"area": ' + "1" * 5000, 1)
    if sys.version_info >= (3, 11):
        with pytest.raises(UserError, match="cannot be read as a COCO"):
            _load(tmp_path, text)
    with pytest.raises(UserError, match="expected the name of a file"):
        _load(tmp_path, _edited(lambda content: content["images"][0].update(file_name="a\0b.png")))


def test_byte_order_mark_is_skipped(tmp_path):
    assert len(_load(tmp_path, "\ufeff" + json.dumps(document())).labels) == 4


def test_ids_that_tools_repeat_elsewhere(tmp_path):
    plain = load_annotations(write_json(tmp_path, document()))
    content = document()
    for image in content["images"]:
        image["image_id"] = image["id"]
    for annotation in content["annotations"]:
        annotation.update(file_name="a.png", attributes={"image_id": 5, "file_name": "x"})
    assert_equal(plain, load_annotations(write_json(tmp_path, content)))


@pytest.mark.parametrize("name", ["animals", "dog"])
def test_the_root_category_of_roboflow_is_no_class(tmp_path, name):
    content = document()
    for category in content["categories"]:
        category["supercategory"] = name
    content["categories"].insert(0, {"id": 1, "name": name, "supercategory": "none"})
    plain = load_annotations(write_json(tmp_path, document()))
    assert_equal(plain, load_annotations(write_json(tmp_path, content)))
    if name == "animals":  # with an object it is a class
        content["annotations"][0]["category_id"] = 1
        assert len(load_annotations(write_json(tmp_path, content)).categories) == 4


def assert_equal(first, second):
    assert first.categories == second.categories and first.image_ids.tolist() == [30, 10, 20]
    for name in ("image_ids", "image_sizes", "boxes", "labels", "crowd", "coordinates"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
