"""What is said about annotations that are read, but look like mistakes."""

from __future__ import annotations

import pytest

from data.annotations.packed import load_annotations
from helpers.coco_files import HEIGHT, WIDTH, document, write_json
from utils.errors import UserError


def _load(folder, content):
    return load_annotations(write_json(folder, content))


def _first_changed(**changes):
    content = document()
    content["annotations"][0].update(changes)
    return content


def test_box_that_misses_its_polygons_is_noted(tmp_path):
    packed = _load(tmp_path, _first_changed(bbox=[25, 20, 10, 5]))
    notes = packed.report.notes
    assert len(notes) == 1 and "101" in notes[0] and packed.report.dropped == 0


def test_a_box_of_zeros_is_derived(tmp_path):
    packed = _load(tmp_path, _first_changed(bbox=[0, 0, 0, 0]))
    assert packed.report.dropped == 0 and packed.report.defects["derived_box"].examples == [101]
    assert packed.report.notes == []  # nor is it said to miss its mask
    assert packed.boxes.tolist() == _load(tmp_path, document()).boxes.tolist()


def test_masks_that_miss_their_boxes_are_noted_as_polygons_are(tmp_path):
    content = document()
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, 12, WIDTH * HEIGHT - 12]}
    for number, box in ((300, [0, 0, 1, 12]), (301, [20, 20, 8, 8])):
        content["annotations"].append({"id": number, "image_id": 20, "category_id": 7, "bbox": box,
                                       "iscrowd": 0, "segmentation": rle})
    notes = _load(tmp_path, content).report.notes
    assert len(notes) == 1 and "1 of 5 boxes" in notes[0] and "annotation id 301;" in notes[0]


def test_annotation_id_zero_is_noted(tmp_path):
    assert "id 0" in _load(tmp_path, _first_changed(id=0)).report.notes[0]


def test_report_sentences(tmp_path):
    content = document()
    content["annotations"] += [
        dict(content["annotations"][0], id=200 + n, bbox=[5, 5, 0, 10]) for n in range(7)]
    sentences = _load(tmp_path, content).report.sentences()
    assert sentences[0].endswith(
        "instances.json: 3 images (1 without objects), 3 objects of 3 categories, 1 crowd regions; "
        "7 of 11 annotations were dropped")
    assert sentences[1:] == ["dropped 7 annotations with a bbox of zero or negative size: "
                             "id 200, 201, 202, 203, 204, ..."]


def test_coordinates_relative_to_the_image_are_refused(tmp_path):
    content = document()
    for annotation in content["annotations"]:
        annotation.update(segmentation=[[0.1, 0.2, 0.9, 0.2, 0.9, 1.0]], bbox=[0.1, 0.2, 0.8, 0.8],
                          iscrowd=0)
    with pytest.raises(UserError, match="all 4 outlines lie between 0 and 1; COCO's are in pixels"):
        _load(tmp_path, content)
