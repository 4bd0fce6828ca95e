"""Predictor: every kind of source, equal to evaluation, plain arrays, drawings, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

import eval as evaluation
from data.classes import find_classes, known_classes
from data.coco import CocoDataset
from data.config import get_config
from helpers.paths import ROOT
from helpers.prediction_weights import IDS, NAMES, noise, save_weights
from utils.checkpoint import state_path
from utils.device import half_type_problem
from utils.errors import UserError
from utils.inference import Predictor
from utils.inference.detector import Detector, load_model
from utils.inference.predictor import Prediction, decode_window, outline
from yolact import build_yolact

GOLDEN = ROOT / "test" / "golden"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def predictor(weights, request):
    return Predictor(weights, device=request.config.getoption("--device"))


def encode(mask):
    rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def prediction_of(image, boxes, masks, class_ids, scores):
    return Prediction(image, np.array(boxes, np.float32), np.array(scores, np.float32),
                      np.array(class_ids), [NAMES[n] for n in class_ids],
                      [encode(mask) for mask in masks], NAMES, IDS)


def equal(one, other):
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.class_ids, other.class_ids)
    assert one.rles == other.rles and len(one) > 5


def test_plain_arrays(predictor):
    found = predictor(noise())
    n = len(found)
    assert n > 5 and found.image.shape == (90, 120, 3)
    assert found.boxes.shape == (n, 4) and found.boxes.dtype == np.float32
    assert found.scores.shape == (n,) and (np.diff(found.scores) <= 0).all()
    assert found.class_ids.dtype == np.int64 and found.masks.shape == (n, 90, 120)
    assert found.masks.dtype == bool and found.masks.any()
    assert found.class_names == [NAMES[index] for index in found.class_ids]
    assert (found.boxes >= 0).all() and (found.boxes <= [120, 90, 120, 90]).all()
    assert repr(found).startswith(f"Prediction(120x90, {n} objects: ")
    for mask, rle in zip(found.masks, found.rles):
        np.testing.assert_array_equal(mask, pycocotools.mask.decode(rle))


def test_every_kind_of_source(predictor, tmp_path):
    picture = noise()
    path = tmp_path / "p.png"
    cv2.imwrite(str(path), picture)
    expected = predictor(picture)
    sources = [str(path), path, Image.open(str(path)), Image.fromarray(picture[:, :, ::-1]),
               np.dstack((picture, picture[:, :, :1]))]
    for found in predictor(sources) + [predictor(path), predictor(picture[:, :, ::-1], rgb=True)]:
        equal(found, expected)
    assert predictor(path).path == str(path) and expected.path is None
    assert [len(found) for found in predictor([])] == []
    with pytest.raises(UserError, match="nowhere.jpg"):
        predictor("nowhere.jpg")
    with pytest.raises(ValueError, match="expected a path"):
        predictor(3)


@pytest.mark.parametrize("compiled, sizes", [(True, [3, 3]), (False, [3, 1])])
def test_batches_have_one_shape_where_kernels_are_made_for_it(weights, monkeypatch, compiled,
                                                              sizes):
    predictor = Predictor(weights, device="cpu", batch_size=3)
    assert not predictor._detector.full_batches
    monkeypatch.setattr(Detector, "full_batches", compiled)
    seen, launch = [], predictor._detector.launch
    predictor._detector.launch = lambda planes, times: (
        seen.append(planes.shape) or launch(planes, times))
    found = list(predictor.iterate([noise(40 + n, 60, n) for n in range(4)]))
    assert [one.image.shape[0] for one in found] == [40, 41, 42, 43]
    assert seen == [(size, 3, 64, 64) for size in sizes]


def test_a_device_that_is_none(weights):
    for device in (None, "mps"):
        with pytest.raises(UserError, match=f"unknown device '{device}'"):
            Predictor(weights, device=device)


@pytest.mark.parametrize("precision, tolerance", [("bfloat16", 0.08), ("float16", 0.01)])
def test_half_precision(weights, predictor, precision, tolerance):
    device = predictor._detector.device
    if half_type_problem(device, getattr(torch, precision)):
        with pytest.raises(UserError, match=f"--precision={precision}: .*choose float32 or auto"):
            Predictor(weights, device, precision=precision)
        return
    loaded = load_model(weights)
    images = torch.from_numpy(noise(64, 64).transpose(2, 0, 1).copy()).unsqueeze(0).to(device)
    with torch.no_grad():
        whole, half = (loaded.on(device, kind)(images) for kind in ("float32", precision))
    for name in ("loc", "conf", "mask", "proto"):
        assert half[name].dtype == getattr(torch, precision)
        wide = whole[name]
        assert float((half[name].float() - wide).abs().max()) < tolerance * float(wide.abs().max())
    assert half["priors"].dtype == torch.float32
    found = Predictor(loaded, device, precision=precision)(noise())
    assert found.scores.dtype == np.float32 and len(found) > 5
    assert abs(found.scores[0] - predictor(noise()).scores[0]) < 0.01


def test_the_loaded_network_stays_as_it_is(weights):
    loaded = load_model(weights)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    images = torch.from_numpy(noise(64, 64).transpose(2, 0, 1).copy()).unsqueeze(0)
    with torch.no_grad():
        plain, ready = loaded.model(images), loaded.on(torch.device("cpu"))(images)
    for name, value in plain.items():
        assert float((ready[name] - value).abs().max()) < 1e-4, name
    after = loaded.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("count, flags, options", [
    (8, [], {}),
    (8, ["--score_threshold=0.022", "--no_crop", "--cross_class_nms"],
     {"score_threshold": 0.022, "crop": False, "nms": "cross_class"}),
    pytest.param(80, [], {}, marks=pytest.mark.slow),
])
def test_equal_to_evaluation_to_the_last_detection(coco_mini, tmp_path, capsys, count, flags,
                                                   options):
    folder, info = coco_mini / "val2017", coco_mini / "annotations" / "instances_val2017.json"
    dataset = CocoDataset(folder, info)
    weights = save_weights(tmp_path, dataset.class_names,
                           [category.id for category in dataset.categories], nms_conf_thresh=0.005)
    files = [str(tmp_path / name) for name in ("b.json", "m.json")]
    assert evaluation.main(flags + [
        "--eval_device=cpu", "--trained_model=" + weights, f"--val_data={coco_mini}",
        f"--max_images={count}", "--batch_size=1", "--num_workers=0",
        "--output_coco_json", "--per_class_file=",
        "--bbox_det_file=" + files[0], "--mask_det_file=" + files[1]]) == 0
    capsys.readouterr()
    boxes, masks = (json.loads(Path(path).read_text()) for path in files)
    predictor = Predictor(weights, device="cpu", **options)
    names = {record["id"]: record["file_name"]
             for record in json.loads(info.read_text())["images"]}
    mine = [record for image_id in list(dataset.image_ids)[:count]
            for record in predictor(folder / names[int(image_id)]).to_coco(int(image_id))]
    assert len(mine) == len(boxes) == len(masks) > 5 * count
    for record, box, mask in zip(mine, boxes, masks):
        for key in ("image_id", "category_id", "score"):
            assert record[key] == box[key] == mask[key]
        assert record["bbox"] == box["bbox"]
        assert record["segmentation"] == mask["segmentation"]


def test_exif_orientation_is_applied(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    upright = cv2.rotate(noise(), cv2.ROTATE_90_CLOCKWISE)
    Image.fromarray(noise()).save(str(tmp_path / "turned.png"))
    Image.fromarray(noise()[:, :, ::-1]).save(str(tmp_path / "p.tiff"), exif=exif)
    found = predictor(tmp_path / "p.tiff")
    np.testing.assert_array_equal(found.image, upright)
    equal(found, predictor(upright))


def test_rescored_masks_set_the_order(predictor, monkeypatch):
    """YOLACT++: what is shown is ranked by the masks' scores."""
    plain, launch = predictor(noise()), predictor._detector.launch

    def rescore(*arguments):
        pending = launch(*arguments)
        ranked = pending.mask_scores.clone()
        ranked[0, 0] = ranked[0, 0] * 0.01
        return pending._replace(mask_scores=ranked)

    monkeypatch.setattr(predictor._detector, "launch", rescore)
    rescored = predictor(noise())
    last = int(np.flatnonzero((rescored.boxes == plain.boxes[0]).all(1))[0])
    assert last > 0 and (np.diff(rescored.scores) <= 0).all()
    assert sorted(rle["counts"] for rle in rescored.rles) == sorted(
        rle["counts"] for rle in plain.rles)
    assert rescored.rles[last] == plain.rles[0]


def test_weights_that_hold_nan_are_said(weights, tmp_path, capsys):
    state = torch.load(weights)
    state["proto_net.0.bias"][0] = float("nan")
    path = str(tmp_path / "yolact_shapes_1_20.pth")
    torch.save(state, path)
    shutil.copy(state_path(weights), state_path(path))
    cv2.imwrite(str(tmp_path / "a.png"), noise())
    for flag in ("--image={0}/a.png:{0}/o.png", "--images={0}/*.png:{0}/out"):
        assert evaluation.main(["--eval_device=cpu", "--trained_model=" + path,
                                flag.format(tmp_path)]) == 0
        first, second, third = capsys.readouterr().out.splitlines()[:3]
        assert first.startswith(f"Weights : {path} (YOLACT, ")
        assert second.startswith("Warning: 1 of ") and "first: proto_net.0.bias" in second
        assert "was written beside other weights" in third
    with pytest.warns(UserWarning, match="first: proto_net.0.bias"):
        Predictor(path, device="cpu")


def test_a_network_that_is_loaded_and_a_run_folder(weights, tmp_path):
    (tmp_path / "weights").mkdir()
    for path in (weights, state_path(weights)):
        shutil.copy(path, str(tmp_path / "weights" / ("best" + os.path.splitext(path)[1])))
    expected = Predictor(weights, device="cpu")(noise())
    equal(Predictor(load_model(weights), torch.device("cpu"))(noise()), expected)
    equal(Predictor(tmp_path, device="cpu")(noise()), expected)


@pytest.mark.parametrize("value", [30, -0.1, float("nan"), {"nms": "fats"}, {"precision": "x"}])
def test_values_that_make_no_sense(value):
    with pytest.raises(ValueError, match="is .*, expected (0 to 1|one of)"):
        Predictor("", **(value if isinstance(value, dict) else {"score_threshold": value}))


def test_names_of_published_weights(tmp_path):
    coco = known_classes("coco2017")
    assert find_classes(80, dataset="coco2017") == coco
    assert (coco.names[79], coco.category_ids[79]) == ("toothbrush", 90)
    assert find_classes(20, dataset="pascal_sbd") == known_classes("pascal_sbd")
    assert find_classes(80, coco.names).category_ids[-1] == 90
    assert find_classes(2, dataset="coco2017") == (["class 1", "class 2"], [1, 2])
    assert find_classes(2, ["a", "b"]) == (["a", "b"], [1, 2])
    assert find_classes(2, ["a", "b"], [0, 7]) == (["a", "b"], [0, 7])
    with pytest.raises(ValueError):
        find_classes(2, ["a"])
    plain = str(tmp_path / "yolact_shapes_3_99.pth")
    torch.save(build_yolact(get_config("yolact_shapes", num_classes=81)).state_dict(), plain)
    predictor = Predictor(plain, device="cpu")
    assert predictor.classes == known_classes("coco2017")


def test_records(predictor):
    found = predictor(noise()).best(4)
    records = found.to_coco(17)
    assert len(records) == 4 and json.loads(json.dumps(records)) == records
    first = records[0]
    assert first["image_id"] == 17 and first["category_name"] == found.class_names[0]
    assert first["category_id"] == IDS[found.class_ids[0]]
    x1, y1, x2, y2 = found.boxes[0]
    np.testing.assert_allclose(first["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=1e-3)
    assert first["segmentation"] is found.rles[0]


@pytest.mark.parametrize("draw", [
    lambda canvas: cv2.circle(canvas, (60, 50), 30, 1, -1),
    lambda canvas: cv2.rectangle(canvas, (0, 0), (119, 89), 1, -1),
    lambda canvas: cv2.rectangle(canvas, (7, 9), (7, 9), 1, -1),
    lambda canvas: cv2.line(cv2.line(canvas, (5, 5), (110, 80), 1, 3), (100, 5), (5, 80), 1, 3),
    lambda canvas: cv2.circle(cv2.circle(canvas, (30, 40), 12, 1, -1), (90, 40), 15, 1, -1),
])
def test_polygons_follow_the_edges_of_pixels(draw):
    canvas = np.zeros((90, 120), np.uint8)
    draw(canvas)
    polygons = outline(encode(canvas))
    drawn = pycocotools.mask.decode(pycocotools.mask.merge(
        pycocotools.mask.frPyObjects(polygons, 90, 120)))
    overlap = (drawn & canvas).sum() / (drawn | canvas).sum()
    assert overlap > 0.95, overlap
    xs, ys = np.array(sum(polygons, []))[0::2], np.array(sum(polygons, []))[1::2]
    rows, columns = np.nonzero(canvas)
    assert [xs.min(), ys.min(), xs.max(), ys.max()] == pytest.approx(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1)
    assert outline(encode(np.zeros((9, 9), np.uint8))) == []


def test_run_lengths_are_decoded_in_their_rectangle():
    rng = np.random.RandomState(0)
    for share in (0, 0.01, 0.1, 0.5, 0.9, 1):
        for _ in range(30):
            mask = rng.rand(*rng.randint(1, 60, 2)) < share
            left, top, pixels = decode_window(encode(mask))
            whole = np.zeros_like(mask)
            whole[top:top + pixels.shape[0], left:left + pixels.shape[1]] = pixels
            np.testing.assert_array_equal(whole, mask)
            x, y, width, height = pycocotools.mask.toBbox(encode(mask)).astype(int)
            assert pixels.shape == (height, width) and (not pixels.size or (x, y) == (left, top))


def scene():
    """A picture with three objects, one of them with a hole and one at the border."""
    image = np.full((120, 160, 3), 90, np.uint8)
    image[:, :, 1] += np.arange(160, dtype=np.uint8) // 2
    masks = np.zeros((3, 120, 160), np.uint8)
    cv2.circle(masks[0], (60, 60), 40, 1, -1)
    cv2.circle(masks[0], (60, 60), 15, 0, -1)
    cv2.rectangle(masks[1], (90, 30), (159, 70), 1, -1)
    cv2.fillPoly(masks[2], [np.array([[100, 110], [150, 110], [125, 75]])], 1)
    boxes = [[20, 20, 101, 101], [90, 30, 160, 71], [100, 75, 151, 111]]
    return prediction_of(image, boxes, masks, [0, 1, 2], [0.9, 0.6, 0.1])


# (rendering differs a little between versions of OpenCV, its letters from 4 to 5 wholly)
GOLDEN_DRAWINGS = {
    "all": ({"top_k": None, "score_threshold": 0, "text": False}, 3),
    "masks": ({"boxes": False, "text": False}, 2),
    "boxes": ({"masks": False, "text": False, "top_k": 1}, 1),
    "text": ({"score_threshold": 0}, 3),
}


@pytest.mark.parametrize("name", sorted(GOLDEN_DRAWINGS))
def test_drawings_are_golden(name):
    options, count = GOLDEN_DRAWINGS[name]
    found = scene()
    drawn = found.draw(**options)
    assert (found.image == scene().image).all()  # left alone
    path = GOLDEN / f"drawing_{name}.png"
    expected = cv2.imread(str(path))
    if name == "text" and cv2.__version__ < "5":
        drawn, expected = drawn[75:], expected[75:]  # below most of the letters
        assert np.abs(drawn.astype(int) - expected).mean() < 6
        return
    difference = np.abs(drawn.astype(int) - expected).max(axis=2)
    assert (difference > 24).mean() < 0.003, f"{(difference > 24).sum()} pixels"
    untouched = (scene().image == expected).all(axis=2)
    assert (drawn[untouched] == scene().image[untouched]).mean() > 0.999
    assert len(found.best(options.get("top_k", 15), options.get("score_threshold", 0.15))) == count


def test_scores_are_left_out_of_the_text():
    with_scores, names = scene().draw(), scene().draw(scores=False)
    assert (with_scores != names).any() and (names != scene().draw(text=False)).any()


def test_cut_outs_are_transparent_around_the_object():
    found = scene()
    cut = dict(found.cut_outs())
    assert sorted(cut) == [0, 1, 2]
    assert cut[1].shape == (41, 70, 4) and (cut[1][:, :, 3] == 255).all()
    assert cut[0].shape == (81, 81, 4) and cut[0][40, 40, 3] == 0 and cut[0][40, 5, 3] == 255
    np.testing.assert_array_equal(cut[1][:, :, :3], found.image[30:71, 90:160])


def test_supervision_takes_it_without_glue():
    found = scene()
    fields = found.as_detections()
    assert sorted(fields) == ["class_id", "confidence", "data", "mask", "xyxy"]
    assert fields["mask"].shape == (3, 120, 160) and fields["mask"].dtype == bool
    assert list(fields["data"]["class_name"]) == NAMES[:3]
    assert found.as_detections(masks=False)["mask"] is None
    supervision = pytest.importorskip("supervision")
    assert len(supervision.Detections(**fields)) == 3
    assert len(supervision.Detections(**found.best(0).as_detections())) == 0


_MEMORY = """
import re, sys, eval
code = eval.main(sys.argv[1:])
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status).group(1)) // 1024, code)
"""
"""VmHWM is this program's peak; ru_maxrss would begin with that of the process that started it."""


def test_memory_of_a_large_picture_with_100_detections(tmp_path):
    """24 megapixels: 100 bool masks of that size would be 2.3 GiB."""
    large = cv2.resize(noise(40, 60), (6000, 4000), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(str(tmp_path / "large.jpg"), large)
    weights = save_weights(tmp_path, nms_conf_thresh=0.0)
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, "--eval_device=cpu", "--trained_model=" + weights,
         "--image={}:{}".format(tmp_path / "large.jpg", tmp_path / "out.jpg"), "--top_k=100",
         "--output_json"],
        cwd=str(ROOT), env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE,
        universal_newlines=True, timeout=300)
    assert "100 objects drawn" in done.stdout
    mebibytes, code = done.stdout.split()[-2:]
    assert int(code) == 0 and int(mebibytes) < 1536
    assert cv2.imread(str(tmp_path / "out.jpg")).shape == (4000, 6000, 3)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 100
