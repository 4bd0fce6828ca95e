"""The confusion matrix against a slow plain reference, and against cases done by hand."""

from __future__ import annotations

import io

import numpy as np
import pycocotools.mask
import pytest

from utils.inference import evaluation_record
from utils.inference.evaluator import ScoredImage
from utils.report import read_matrix, sum_up_matrix

SIDE = 24
IDS = [3, 7, 9]


def item(category, box, score=1.0, crowd=0):
    """A rectangle `x1 y1 x2 y2` as detection and as object."""
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = 1
    return {"category_id": category, "score": score, "mask_score": score, "iscrowd": crowd,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": pycocotools.mask.encode(mask), "pixels": mask.astype(bool)}


def count(detections, objects, **more):
    return evaluation_record.count_confusions([ScoredImage(1, detections, objects)], IDS, **more)


def matrix(**cells):
    """`d37=2`: two objects of category 3 taken for 7; b is the background."""
    expected = np.zeros((4, 4), np.int64)
    place = {"3": 0, "7": 1, "9": 2, "b": 3}
    for cell, number in cells.items():
        expected[place[cell[1]], place[cell[2]]] = number
    return expected


A, B, FAR = (0, 0, 10, 10), (0, 0, 10, 9), (14, 14, 20, 20)


@pytest.mark.parametrize("detections, objects, expected", [
    ([], [], {}),
    ([], [item(3, A)], {"d3b": 1}),
    ([item(3, A)], [], {"db3": 1}),
    ([item(3, A)], [item(3, A)], {"d33": 1}),
    ([item(7, A)], [item(3, A)], {"d37": 1}),
    ([item(3, A), item(3, B)], [item(3, A)], {"d33": 1, "db3": 1}),
    ([item(3, A)], [item(3, FAR)], {"d3b": 1, "db3": 1}),
    # The higher score wins, whatever the classes and the IoU are.
    ([item(7, A, 0.4), item(3, B, 0.9)], [item(3, A)], {"d33": 1, "db7": 1}),
    ([item(3, A, 0.4), item(7, B, 0.9)], [item(3, A)], {"d37": 1, "db3": 1}),
    # It takes the object with the larger IoU, of equal ones one of its class.
    ([item(7, B)], [item(3, A), item(7, B)], {"d77": 1, "d3b": 1}),
    ([item(7, A)], [item(3, A), item(7, A)], {"d77": 1, "d3b": 1}),
    # What is taken is taken; the next best object does.
    ([item(3, A, 0.9), item(3, A, 0.8)], [item(3, A), item(3, B)], {"d33": 2}),
    # Below the score it is not there.
    ([item(3, A, 0.29)], [item(3, A)], {"d3b": 1}),
    ([item(3, A, 0.3)], [item(3, A)], {"d33": 1}),
    # Crowds are no objects, and detections in them no mistakes.
    ([item(3, A)], [item(3, (0, 0, 20, 20), crowd=1)], {}),
    ([item(3, A)], [item(7, (0, 0, 5, 10), crowd=1)], {}),
    ([item(3, A)], [item(7, (0, 0, 4, 10), crowd=1)], {"db3": 1}),
])
def test_by_hand(detections, objects, expected):
    assert np.array_equal(count(detections, objects), matrix(**expected))


def slow_reference(detections, objects, score, iou):
    """Detections by score, each compared with all objects, on pixels."""
    counts = np.zeros((len(IDS) + 1,) * 2, np.int64)
    free_d = [d for d in detections if d["mask_score"] >= score]
    free_g = [g for g in objects if not g["iscrowd"]]
    for d in sorted(free_d, key=lambda d: d["mask_score"], reverse=True):
        best = None
        for g in free_g:
            overlap = (d["pixels"] & g["pixels"]).sum() / (d["pixels"] | g["pixels"]).sum()
            key = (overlap, d["category_id"] == g["category_id"])
            if overlap >= iou and (best is None or key > best[0]):
                best = key, g
        if best is not None:
            counts[IDS.index(best[1]["category_id"]), IDS.index(d["category_id"])] += 1
            free_d = [other for other in free_d if other is not d]
            free_g = [other for other in free_g if other is not best[1]]
    for g in free_g:
        counts[IDS.index(g["category_id"]), -1] += 1
    for d in free_d:
        inside = [(d["pixels"] & c["pixels"]).sum() / d["pixels"].sum()
                  for c in objects if c["iscrowd"]]
        if not any(share >= iou for share in inside):
            counts[-1, IDS.index(d["category_id"])] += 1
    return counts


def random_items(rng, number, crowds):
    items = []
    for _ in range(number):
        x1, y1 = rng.randint(0, SIDE - 8, 2)
        width, height = rng.randint(4, 9, 2)
        items.append(item(IDS[rng.randint(3)], (x1, y1, x1 + width, y1 + height),
                          float(rng.rand()), int(crowds and rng.rand() < 0.2)))
    return items


def test_against_the_slow_reference():
    rng = np.random.RandomState(0)
    total = np.zeros((4, 4), np.int64)
    for _ in range(150):
        objects = random_items(rng, rng.randint(0, 7), crowds=True)
        near = [dict(item(IDS[rng.randint(3)], np.clip(np.array(
            [g["bbox"][0], g["bbox"][1], g["bbox"][0] + g["bbox"][2],
             g["bbox"][1] + g["bbox"][3]]) + rng.randint(-1, 2, 4), 0, SIDE).tolist(),
            float(rng.rand()))) for g in objects]
        detections = near + random_items(rng, rng.randint(0, 5), crowds=False)
        for score, iou in ((0.3, 0.5), (0.0, 0.3), (0.6, 0.75)):
            expected = slow_reference(detections, objects, score, iou)
            found = count(detections, objects, score_threshold=score, iou_threshold=iou)
            assert np.array_equal(found, expected)
            total += found
    assert (total[:3, :3] > 0).all() and (total[3, :3] > 0).all() and (total[:3, 3] > 0).all()


def test_every_object_and_detection_is_counted_once():
    rng = np.random.RandomState(1)
    objects, detections = random_items(rng, 9, False), random_items(rng, 12, False)
    counts = count(detections, objects, score_threshold=0.0)
    assert counts[:-1].sum() == 9 and counts[:, :-1].sum() == 12 and counts[-1, -1] == 0


def test_csv_goes_round_with_any_name():
    counts = np.arange(16).reshape(4, 4)
    names = ["a,b", 'quote " and\nline', "\u732b\u2028\x1c"]
    text = evaluation_record.matrix_csv(counts, names).decode("utf-8")
    found, back = read_matrix(io.StringIO(text))
    assert np.array_equal(found, counts) and back == names
    assert read_matrix([]) is None
    for name in ("=1+1", "+a", "-a", "@a", "\ta"):  # a spreadsheet would compute them
        text = evaluation_record.matrix_csv(counts, [name, "b", "c"]).decode("utf-8")
        assert read_matrix(io.StringIO(text))[1] == ["'" + name, "b", "c"]


def test_worst_confusions_leave_out_the_diagonal_and_the_background():
    counts = np.array([[9, 2, 0, 8], [0, 9, 5, 8], [0, 0, 9, 8], [7, 7, 7, 0]])
    found = sum_up_matrix(counts, "abc")
    assert found["worst"] == [("b", "c", 5), ("a", "b", 2)]
    assert found["sums"] == {
        "objects": 58, "found, of the right class": 27, "found, of another class": 7, "missed": 24,
        "false or double": 21}
    assert sum_up_matrix(np.zeros((2, 2), int), "a")["worst"] == []


@pytest.mark.parametrize("full, empty, drawn", [
    ([5, 1, 3, 9], [2], [1, 5]), ([4], [7, 2], [2, 4]), ([4], [], [4]), ([], [8, 6, 7], [6, 7])])
def test_images_that_are_drawn_have_objects_if_there_are_enough(full, empty, drawn):
    crowd = item(3, A, crowd=1)
    images = [ScoredImage(number, [], [item(3, A), crowd]) for number in full]
    images += [ScoredImage(number, [], [crowd]) for number in empty]
    found = evaluation_record.images_to_draw(images, most=2)
    assert [image.image_id for image in found] == drawn


@pytest.mark.parametrize("count, plates", [(30, True), (31, False), (400, False)])
def test_plates_do_not_hide_many_objects(monkeypatch, count, plates):
    drawn = []

    def draw(canvas, boxes, masks, labels, class_names, texts):
        drawn.append((len(masks), any(texts)))
        return canvas

    monkeypatch.setattr(evaluation_record, "draw_instances", draw)
    image = ScoredImage(1, [item(3, A)] * count, [item(3, A)])
    evaluation_record.draw_image(image, np.zeros((SIDE, SIDE, 3), np.uint8), {3: "cat"})
    assert drawn == [(1, True), (count, plates)]


def test_an_image_a_pixel_high_is_drawn():
    image = ScoredImage(1, [], [])
    drawn = evaluation_record.draw_image(image, np.zeros((2, 3000, 3), np.uint8), {3: "cat"})
    assert drawn.startswith(b"\xff\xd8")
