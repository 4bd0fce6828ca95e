"""COCO scores: equal to pycocotools on the written files, and what it cannot deal with itself."""

from __future__ import annotations

import contextlib
import csv
import io
import json

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import utils.inference.evaluator as evaluator_module
import utils.inference.ground_truth as ground_truth_module
from data.coco import CocoDataset
from utils.errors import UserError
from utils.inference.evaluation import Evaluation
from utils.inference.evaluator import STATISTICS, CocoEvaluator
from utils.inference.ground_truth import GroundTruth

SIDE = 60


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def ground_truth(images=4, **changes):
    """Two squares of categories 3 and 7 in each image; category 9 has no object."""
    annotations = []
    for image_id in range(1, images + 1):
        for category_id, x in ((3, 5), (7, 30)):
            annotations.append(dict({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": category_id,
                "segmentation": square(x, 10, 20), "area": 400.0, "iscrowd": 0,
                "bbox": [x, 10, 20, 20]}, **changes))
    return {"images": [{"id": i, "width": SIDE, "height": SIDE, "file_name": f"{i}.jpg"}
                       for i in range(1, images + 1)],
            "categories": [{"id": i, "name": f"thing {i}"} for i in (3, 7, 9)],
            "annotations": annotations}


def write(tmp_path, dataset):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(dataset))
    return str(path)


def rle_of(x1, y1, x2, y2, side=SIDE):
    mask = np.zeros((side, side), np.uint8, order="F")
    mask[int(y1):int(y2), int(x1):int(x2)] = 1
    rle = pycocotools.mask.encode(mask)
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}


def add_perfect(evaluator, image_id):
    boxes = np.array([[5, 10, 25, 30], [30, 10, 50, 30]], float)
    evaluator.add(image_id, boxes, [rle_of(*box) for box in boxes], [0, 1], [0.9, 0.8])


def perfect(path, images=4):
    evaluator = CocoEvaluator(path, [3, 7, 9])
    for image_id in range(1, images + 1):
        add_perfect(evaluator, image_id)
    return evaluator


def official(truth_path, result_path, iou_type, image_ids=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_path)
        evaluation = COCOeval(truth, truth.loadRes(result_path), iou_type)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def jitter_real_objects(truth, image_ids, seed=0):
    """Detections like a network's: shifted objects, wrong classes, doubles, false ones."""
    rng = np.random.default_rng(seed)
    numbers = sorted(truth.cats)
    for image_id in image_ids:
        info = truth.imgs[image_id]
        boxes, rles, classes = [], [], []
        for annotation in truth.loadAnns(truth.getAnnIds(image_id)):
            for _ in range(rng.integers(0, 4)):
                mask = truth.annToMask(annotation)
                shift = rng.integers(-6, 7, 2)
                mask = np.roll(mask, shift, (0, 1))
                x, y, w, h = annotation["bbox"]
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 4, 4))
                rle = pycocotools.mask.encode(np.asfortranarray(mask))
                rles.append({"size": [info["height"], info["width"]],
                             "counts": rle["counts"].decode()})
                classes.append(numbers.index(annotation["category_id"]) if rng.random() < 0.8
                               else int(rng.integers(len(numbers))))
        scores = rng.random(len(boxes)) ** rng.choice([1, 30], len(boxes))
        yield image_id, np.array(boxes).reshape(-1, 4), rles, classes, scores


@pytest.fixture(params=["pycocotools", "faster_coco_eval"])
def library(request, monkeypatch):
    """Both libraries that may do the matching, whichever was chosen here."""
    if request.param == "pycocotools":
        chosen = COCO, COCOeval
    else:
        faster = pytest.importorskip("faster_coco_eval")
        chosen = faster.COCO, faster.COCOeval_faster
    monkeypatch.setattr(evaluator_module, "COCOeval", chosen[1])
    monkeypatch.setattr(ground_truth_module, "COCO", chosen[0])


@pytest.mark.parametrize("limit", [None, 25])
def test_equals_pycocotools_on_the_written_files(coco_mini, tmp_path, limit, library):
    truth_path = str(coco_mini / "annotations" / "instances_val2017.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(truth_path)
    image_ids = sorted(truth.imgs)[:limit]
    evaluator = CocoEvaluator(truth_path, sorted(truth.cats))
    for detections in jitter_real_objects(truth, image_ids):
        evaluator.add(*detections)
    results = evaluator.evaluate()
    box_path, mask_path = str(tmp_path / "bbox.json"), str(tmp_path / "out" / "segm.json")
    evaluator.write_json(box_path, mask_path)

    for scores, path, kind in ((results.box, box_path, "bbox"), (results.mask, mask_path, "segm")):
        expected = official(truth_path, path, kind, image_ids)
        found = [-1 if scores.statistics[name] is None else scores.statistics[name]
                 for name in STATISTICS]
        np.testing.assert_allclose(found, expected.stats, atol=1e-12)
        assert 0.05 < scores.ap < 0.95
        precision = expected.eval["precision"][:, :, :, 0, -1]
        for values, ap in zip(precision, scores.per_threshold):
            assert ap == pytest.approx(values[values > -1].mean(), abs=1e-12)
        for k, score in enumerate(scores.per_class):
            values = precision[:, :, k]
            if (values > -1).any():
                assert score.ap == pytest.approx(values[values > -1].mean(), abs=1e-12)
            else:
                assert score.ap is None
        assert np.mean(scores.per_threshold) == pytest.approx(scores.ap, abs=1e-6)


def test_perfect_detections_and_absent_classes(tmp_path):
    results = perfect(write(tmp_path, ground_truth())).evaluate()
    for scores in (results.box, results.mask):
        assert scores.ap == pytest.approx(1)
        assert scores.statistics["APl"] is None  # no large object: absent, not 0
        assert [score.ap for score in scores.per_class] == [pytest.approx(1)] * 2 + [None]
        assert [score.objects for score in scores.per_class] == [4, 4, 0]
    assert results.num_images == 4 and results.notes == []


def test_an_image_with_many_detections(tmp_path):
    """With NumPy 2 pycocotools cannot measure more than 255 masks at once."""
    path, boxes = write(tmp_path, ground_truth()), np.tile([[1.0, 1, 9, 9]], (300, 1))
    evaluator = CocoEvaluator(path, [3, 7, 9])
    evaluator.add(1, boxes, [rle_of(1, 1, 9, 9)] * 300, np.zeros(300, int), np.full(300, 0.5))
    assert evaluator.evaluate().mask.statistics["AP"] is not None


def test_only_added_images_count(tmp_path):
    path = write(tmp_path, ground_truth(images=4))
    evaluator = perfect(path, images=2)
    assert evaluator.evaluate().box.ap == pytest.approx(1)
    evaluator.add(3, np.zeros((0, 4)), [], [], [])
    assert len(evaluator) == 3
    assert evaluator.evaluate().box.ap < 0.7


def test_no_detections_at_all(tmp_path, library):
    evaluator = CocoEvaluator(write(tmp_path, ground_truth()), [3, 7, 9])
    for image_id in (1, 2):
        evaluator.add(image_id, np.zeros((0, 4)), [], [], [])
    results = evaluator.evaluate()
    for scores in (results.box, results.mask):
        assert {name for name, value in scores.statistics.items() if value is None} == {
            "APm", "APl", "ARm", "ARl"}  # the objects are small
        assert set(scores.statistics.values()) == {0.0, None} and scores.ap == 0
        assert scores.per_threshold == [0.0] * 10
        assert [score.ap for score in scores.per_class] == [0, 0, None]
    assert len(results.notes) == 1 and "Nothing was detected in 2 images" in results.notes[0]
    assert results.table().splitlines()[2].startswith("   box |  0.00 |  0.00 |")
    evaluator.write_json(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert json.loads((tmp_path / "a.json").read_text()) == []


@pytest.mark.parametrize("missing", [["area"], ["iscrowd"], ["bbox"],
                                     ["area", "iscrowd", "bbox"]])
def test_missing_keys(tmp_path, missing):
    dataset = ground_truth()
    expected = perfect(write(tmp_path, dataset)).evaluate()
    for annotation in dataset["annotations"]:
        for key in missing:
            del annotation[key]
    path = write(tmp_path, dataset)
    assert perfect(path).evaluate().summary() == expected.summary()


def test_annotation_id_zero_counts(tmp_path):
    dataset = ground_truth(images=1)
    for number, annotation in enumerate(dataset["annotations"]):
        annotation["id"] = number
    assert perfect(write(tmp_path, dataset), images=1).evaluate().box.ap == pytest.approx(1)


def test_unusable_outlines_are_left_out(tmp_path):
    dataset = ground_truth()
    expected = perfect(write(tmp_path, dataset)).evaluate().summary()
    for outline in ([], [[1, 2, 3, 4]], None, {}):
        dataset["annotations"].append(dict(dataset["annotations"][0], segmentation=outline,
                                           id=100 + len(dataset["annotations"])))
    assert perfect(write(tmp_path, dataset)).evaluate().summary() == expected


@pytest.mark.parametrize("spoiled", [
    {"segmentation": {"size": [SIDE, SIDE], "counts": "!!"}},
    {"segmentation": {"size": [SIDE, SIDE], "counts": [9, 9]}},
    {"segmentation": {"size": [SIDE, 2 * SIDE], "counts": [9, 9, 2 * SIDE * SIDE - 18]}},
    {"segmentation": {"counts": "PPPP1"}}, {"segmentation": [[0, 0, 9, 0, 9, 9, 0]]},
    {"bbox": ["1", "2", "3", "4"]}, {"bbox": [1, 2, 0, 0]}], ids=str)
def test_what_training_drops_is_not_scored(tmp_path, library, spoiled):
    dataset = ground_truth()
    expected = perfect(write(tmp_path, dataset)).evaluate().summary()
    dataset["annotations"].insert(1, dict(dataset["annotations"][0], id=100, **spoiled))
    loaded = CocoDataset(tmp_path, write(tmp_path, dataset))
    assert loaded.report.dropped == 1
    evaluation = Evaluation(loaded, [3, 7, 9], range(4))
    assert perfect(evaluation.evaluator()._truth).evaluate().summary() == expected


@pytest.mark.parametrize("repaired", [
    {"bbox": [0, 0, 0, 0]}, {"segmentation": [*square(5, 10, 20), ["a"] * 6]},
    {"segmentation": [*square(5, 10, 20), [[1, 2]] * 6]}], ids=str)
def test_what_training_repairs_is_scored(tmp_path, library, repaired):
    dataset = ground_truth()
    dataset["annotations"][0].update(repaired)
    path = write(tmp_path, dataset)
    assert CocoDataset(tmp_path, path).report.defects
    results = perfect(path).evaluate()
    assert results.box.ap == results.mask.ap == pytest.approx(1)


def test_image_sizes_from_outside(tmp_path):
    dataset = ground_truth()
    for image in dataset["images"]:
        del image["width"], image["height"]
    sizes = {i: (SIDE, SIDE) for i in range(1, 5)}
    evaluator = CocoEvaluator(GroundTruth(write(tmp_path, dataset), sizes), [3, 7, 9])
    for image_id in range(1, 5):
        add_perfect(evaluator, image_id)
    assert evaluator.evaluate().mask.ap == pytest.approx(1)


def test_crowds_are_neither_found_nor_missed(tmp_path, library):
    dataset = ground_truth()
    dataset["annotations"][0]["iscrowd"] = 1
    dataset["annotations"][0]["segmentation"] = {
        "size": [SIDE, SIDE], "counts": [SIDE * 5, SIDE * 20, SIDE * 35]}
    results = perfect(write(tmp_path, dataset)).evaluate()
    assert results.box.ap == pytest.approx(1)
    assert results.box.per_class[0].objects == 3


def test_without_ground_truth_only_files_are_written(tmp_path):
    dataset = ground_truth()
    del dataset["annotations"]
    evaluator = perfect(write(tmp_path, dataset))
    assert not evaluator.has_ground_truth
    with pytest.raises(UserError, match="no 'annotations'"):
        evaluator.evaluate()
    evaluator.write_json(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    boxes = json.loads((tmp_path / "a.json").read_text())
    masks = json.loads((tmp_path / "b.json").read_text())
    assert len(boxes) == len(masks) == 8
    assert boxes[1] == {"image_id": 1, "category_id": 7, "bbox": [30, 10, 20, 20], "score": 0.8}
    assert set(masks[0]) == {"image_id", "category_id", "segmentation", "score"}
    assert isinstance(masks[0]["segmentation"]["counts"], str)


def test_the_ground_truth_is_read_once(tmp_path, monkeypatch):
    dataset = ground_truth()
    del dataset["annotations"][0]["area"], dataset["annotations"][1]["bbox"]
    dataset["annotations"][2]["id"] = 0
    truth = ground_truth_module.GroundTruth(write(tmp_path, dataset), {})
    expected = perfect(truth).evaluate()
    monkeypatch.setattr(ground_truth_module, "json", None)  # nothing can be parsed any more
    assert perfect(truth).evaluate() == expected and perfect(truth).has_ground_truth


def test_validations_of_a_run_share_it(coco_mini, monkeypatch):
    dataset = CocoDataset(coco_mini / "val2017",
                          coco_mini / "annotations" / "instances_val2017.json")
    evaluation = Evaluation(dataset, [category.id for category in dataset.categories], [0])
    names = evaluation.evaluator().category_names
    monkeypatch.setattr(ground_truth_module, "json", None)
    assert list(evaluation.evaluator().category_names.items()) == list(names.items())
    assert list(names.items()) == dataset.categories


def test_images_without_sizes(tmp_path):
    dataset = ground_truth(images=1)
    del dataset["images"][0]["width"]
    path = write(tmp_path, dataset)
    evaluator = CocoEvaluator(GroundTruth(path, {1: (SIDE, SIDE)}), [3, 7, 9])
    add_perfect(evaluator, 1)
    assert evaluator.images()[0].objects[0]["segmentation"]["size"] == [SIDE, SIDE]
    with pytest.raises(UserError, match="image 1 has no width and height"):
        CocoEvaluator(path, [3]).images()


def test_small_scores_keep_their_order():
    evaluator = CocoEvaluator("unread.json", [3])
    evaluator.add(1, np.zeros((2, 4)), [rle_of(0, 0, 1, 1)] * 2, [0, 0],
                  np.array([1.5e-9, 1.4e-9], np.float32))
    scores = [record["score"] for record in evaluator.state()[0][1]]
    assert scores == [1.5e-9, 1.4e-9]


def test_masks_have_scores_of_their_own(tmp_path, library):
    """A wrong detection ranked first by its box and last by its mask spoils the boxes' AP only."""
    evaluator = CocoEvaluator(write(tmp_path, ground_truth(images=1)), [3, 7, 9])
    boxes, wrong = np.array([[5, 10, 25, 30], [50, 50, 60, 60]]), rle_of(50, 50, 60, 60)
    evaluator.add(1, boxes, [rle_of(5, 10, 25, 30), wrong], [0, 0], [0.5, 0.9], [0.4, 0.3])
    found = evaluator.evaluate()
    assert found.mask.per_class[0].ap == pytest.approx(1)
    assert found.box.per_class[0].ap == pytest.approx(0.5)
    with pytest.raises(ValueError, match="1 classes, 1 and 0 scores"):
        evaluator.add(2, boxes[:1], [wrong], [0], [0.5], [])


def test_merging_processes(tmp_path):
    path = write(tmp_path, ground_truth())
    expected = perfect(path).evaluate().summary()
    parts = [CocoEvaluator(path, [3, 7, 9]) for _ in range(2)]
    for image_id in range(1, 5):
        add_perfect(parts[image_id % 2], image_id)
    add_perfect(parts[0], 1)  # a sampler that fills up the last batch repeats images
    parts[0].merge(json.loads(json.dumps(parts[1].state())))
    assert parts[0].evaluate().summary() == expected


def test_misuse_and_bad_files(tmp_path):
    path = write(tmp_path, ground_truth())
    evaluator = perfect(path)
    with pytest.raises(ValueError, match="added before"):
        add_perfect(evaluator, 1)
    with pytest.raises(ValueError, match="1 boxes, 0 masks"):
        evaluator.add(9, np.zeros((1, 4)), [], [0], [0.5])
    evaluator.add(99, np.zeros((0, 4)), [], [], [])
    with pytest.raises(UserError, match="image id 99"):
        evaluator.evaluate()
    with pytest.raises(UserError, match="no category with id 4; it has 3, 7, 9"):
        CocoEvaluator(path, [3, 4]).evaluate()
    with pytest.raises(UserError, match="not found: looked for .*nowhere.json"):
        CocoEvaluator(str(tmp_path / "nowhere.json"), [3]).evaluate()


def test_tables(tmp_path, capsys):
    results = perfect(write(tmp_path, ground_truth())).evaluate()
    assert capsys.readouterr().out == ""  # pycocotools prints
    results.box.statistics["AP"] = 0.319812
    results.mask.statistics["AP"] = 0.2962
    results.box.per_threshold[:2] = [None, 0.99996]
    assert results.table().splitlines() == [
        "       |  all  |  .50  |  .55  |  .60  |  .65  |  .70  |  .75  |  .80  |  .85  |  .90  "
        "|  .95  |",
        "-------+" * 12,
        "   box | 31.98 |   n/a | 100.0 |" + " 100.0 |" * 8,
        "  mask | 29.62 |" + " 100.0 |" * 10,
        "-------+" * 12]
    text = results.statistics_table()
    assert "box" not in text and "mask" not in text
    assert text.splitlines()[1].split()[:2] == ["detection", "31.98"]


def test_per_class_file(tmp_path):
    results = perfect(write(tmp_path, ground_truth())).evaluate()
    path = tmp_path / "made" / "per_class.csv"
    results.write_per_class(str(path))
    with open(str(path), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["thing 3", "thing 7", "thing 9"]
    assert rows[0]["mask_AP"] == "100.00" and rows[2]["mask_AP"] == ""
