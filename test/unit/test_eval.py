"""eval.py: commands, errors, and a network that knows the answers."""

from __future__ import annotations

import contextlib
import io
import json
import os

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as evaluation
from data.classes import match_categories
from data.coco import CocoDataset
from data.config import get_config
from helpers.evaluation import evaluate
from utils.checkpoint import CheckpointName, save_checkpoint
from utils.errors import UserError
from utils.inference.detector import (
    Detector,
    PendingDetections,
    StageTimes,
    load_model,
    to_network_input,
)
from utils.inference.evaluation import EvaluationBatches, choose_images, load_batches
from utils.progress import ProgressBar
from yolact import build_yolact

NAMES = ["circle", "square", "star", "moon"]
IDS = [2, 5, 6, 11]
SIZES = [(90, 120), (120, 90), (64, 64), (150, 80), (100, 101)]


def octagon(cx, cy, rx, ry):
    angles = np.arange(8) * np.pi / 4 + np.pi / 8
    return np.stack((cx + rx * np.cos(angles), cy + ry * np.sin(angles)), 1).reshape(-1).tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five images in COCO's layout; the red channel of image n is 40 * n."""
    root = tmp_path_factory.mktemp("data")
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    for n, (height, width) in enumerate(SIZES):
        image = np.full((height, width, 3), 7, np.uint8)
        image[:, :, 2] = 40 * n
        cv2.imwrite(str(root / "val2017" / f"{n}.png"), image)
        images.append({"id": 100 + n, "file_name": f"{n}.png", "width": width,
                       "height": height})
        for k in range(n):  # image 0 has no object
            rx, ry = width * (0.15 + 0.02 * k), height * 0.2
            cx, cy = width * (0.25 + 0.15 * k), height * (0.3 + 0.1 * k)
            outline = octagon(cx, cy, rx, ry)
            x1, y1 = min(outline[::2]), min(outline[1::2])
            annotations.append({
                "id": len(annotations) + 1, "image_id": 100 + n, "category_id": IDS[k],
                "segmentation": [outline], "iscrowd": 0, "area": 2.8 * rx * ry,
                "bbox": [x1, y1, max(outline[::2]) - x1, max(outline[1::2]) - y1]})
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps({
        "images": images, "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]}))
    return root


@pytest.fixture(scope="module")
def config():
    return get_config("yolact_shapes", max_size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, config):
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("weights"))
    return save_checkpoint(CheckpointName(config.name, 1, 20).path(folder),
                           build_yolact(config).state_dict(),
                           {"config": config.to_dict(), "class_names": NAMES})


def dataset_of(data):
    return CocoDataset(data / "val2017", data / "annotations" / "instances_val2017.json")


class Oracle(torch.nn.Module):
    """Predicts the annotations exactly; tells the images apart by their colour."""

    maskiou_net = None

    def __init__(self, dataset, input_size, proto_size=60):
        super().__init__()
        self.input_size = input_size
        samples = [dataset[n] for n in range(len(dataset))]
        boxes = torch.from_numpy(np.concatenate([sample.boxes for sample in samples]))
        self.owner = torch.tensor([n for n, s in enumerate(samples) for _ in s.boxes])
        self.labels = torch.from_numpy(np.concatenate([sample.labels for sample in samples]))
        self.priors = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
        self.masks = torch.stack([torch.from_numpy(self.shrink(polygons[0], s.image, proto_size))
                                  for s in samples for polygons in s.segmentations], 2)

    @staticmethod
    def shrink(polygon, image, size):
        big = np.zeros((size * 8, size * 8), np.uint8)
        scale = 8 * size / np.array([image.shape[1], image.shape[0]])
        cv2.fillPoly(big, [np.round(polygon * scale - 0.5).astype(np.int32)], 1)
        return cv2.resize(big.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)

    def forward(self, images):
        assert images.dtype == torch.uint8 and not self.training
        shown = (images[:, 0, 10, 10].float() / 40).round().long()
        mine = (images[:, 2, 10, 10] == 7).unsqueeze(1) & (
            shown.unsqueeze(1) == self.owner.unsqueeze(0))
        count = len(self.owner)
        conf = torch.zeros(len(images), count, len(NAMES) + 1)
        conf[:, torch.arange(count), self.labels] = 20 * mine.float()
        conf[:, :, 0] = 10
        return {"loc": torch.zeros(len(images), count, 4), "conf": conf,
                "mask": torch.eye(count).repeat(len(images), 1, 1),
                "proto": (12 * self.masks - 6).repeat(len(images), 1, 1, 1), "priors": self.priors}


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (3, 0), (2, 2)])
def test_a_network_that_knows_the_answers(data, config, batch_size, num_workers):
    dataset = dataset_of(data)
    model = Oracle(dataset, 64).train()
    results = evaluate(model, config, dataset, batch_size=batch_size, num_workers=num_workers)
    assert model.training  # as it was
    assert results.num_images == 5 and results.notes == []
    assert results.box.ap == pytest.approx(1)
    assert results.mask.statistics["AP75"] == pytest.approx(1) and results.mask.ap > 0.85
    fewer = evaluate(model, config, dataset, max_images=3, num_workers=0)
    assert fewer.num_images == 3 and fewer.box.ap == pytest.approx(1)


def test_a_file_of_a_recipe_is_taken_as_by_train(data, config, weights, tmp_path):
    """What is stored beside weights wins over the recipe, and the file's changes over both."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("config: yolact_shapes\nset: {nms_thresh: 0.3}\n")
    loaded = load_model(weights, config_name=str(recipe))
    assert loaded.config == config.replace(nms_thresh=0.3)
    alone = str(tmp_path / "plain.pth")
    torch.save(torch.load(weights), alone)
    recipe.write_text("config: yolact_shapes\nset: {max_size: 64}\n")
    assert load_model(alone, config_name=str(recipe)).config == config
    with pytest.raises(UserError, match="cannot read 'none.yaml'"):
        load_model(weights, config_name="none.yaml")


def run(capsys, *flags):
    code = evaluation.main(["--eval_device=cpu", "--num_workers=0"] + list(flags))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("nms", [[], ["--cross_class_nms"], ["--fast_nms=False"]])
def test_scores_equal_pycocotools_on_the_written_files(data, weights, tmp_path, capsys, nms):
    files = [str(tmp_path / name) for name in ("b.json", "m.json", "classes.csv")]
    code, out, err = run(
        capsys, "--trained_model=" + weights, f"--val_data={data}", "--output_coco_json",
        "--bbox_det_file=" + files[0], "--mask_det_file=" + files[1],
        "--per_class_file=" + files[2], "--benchmark", *nms)
    assert code == 0 and err == ""
    lines = out.splitlines()
    box_row, mask_row = (line for line in lines if "box" in line or "mask" in line)
    assert box_row.startswith("   box |") and mask_row.startswith("  mask |")
    assert "images/s" in out and "network" in out
    for path, kind, row in ((files[0], "bbox", box_row), (files[1], "segm", mask_row)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(data / "annotations" / "instances_val2017.json"))
            official = COCOeval(truth, truth.loadRes(path), kind)
            official.evaluate()
            official.accumulate()
            official.summarize()
        assert row.split("|")[1].strip() == f"{100 * official.stats[0]:.2f}"
    with open(files[2]) as file:
        assert file.read().count("\n") == 5


def test_batches_do_not_change_the_result(data, weights, tmp_path, capsys):
    written = []
    for batch_size in (1, 3):
        path = str(tmp_path / f"{batch_size}.json")
        assert run(capsys, "--trained_model=" + weights, f"--val_data={data}",
                   f"--batch_size={batch_size}", "--output_coco_json",
                   "--bbox_det_file=" + path, "--mask_det_file=" + path + ".m",
                   "--per_class_file=")[0] == 0
        with open(path) as file:
            written.append(json.load(file))
    assert len(written[0]) == len(written[1]) > 20
    for one, other in zip(*written):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.01)


def test_no_detections(data, weights, capsys):
    code, out, _ = run(capsys, "--trained_model=" + weights, f"--val_data={data}",
                       "--score_threshold=0.999", "--per_class_file=")
    assert code == 0 and "Nothing was detected in 5 images" in out
    assert "   box |  0.00 |" in out and "  mask |  0.00 |" in out


def test_without_ground_truth(data, weights, tmp_path, capsys):
    info = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    del info["annotations"]
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps(info))
    flags = ["--trained_model=" + weights, "--valid_images={}".format(data / "val2017"),
             f"--valid_info={path}", "--bbox_det_file={}".format(tmp_path / "b.json"),
             "--mask_det_file={}".format(tmp_path / "m.json")]
    code, out, err = run(capsys, *flags)
    assert code == 2 and "--output_coco_json" in err
    code, out, err = run(capsys, "--output_coco_json", *flags)
    assert code == 0 and "nothing to score" in out
    found = json.loads((tmp_path / "m.json").read_text())
    assert len(found) > 20 and {record["category_id"] for record in found} <= set(IDS)


def test_weights_by_name_and_plain_weights(data, weights, tmp_path, capsys):
    folder = os.path.dirname(weights)
    flags = [f"--val_data={data}", "--max_images=2", "--per_class_file="]
    assert run(capsys, "--trained_model=latest", "--save_folder=" + folder, *flags)[0] == 0
    plain = str(tmp_path / "yolact_shapes_3_99.pth")
    small = get_config("yolact_shapes")
    torch.save(build_yolact(small).state_dict(), plain)
    assert run(capsys, "--trained_model=" + plain, *flags)[0] == 0
    nameless = str(tmp_path / "weights.pth")
    os.rename(plain, nameless)
    code, _, err = run(capsys, "--trained_model=" + nameless, *flags)
    assert code == 2 and "--config" in err
    assert run(capsys, "--trained_model=" + nameless, "--config=yolact_shapes_config",
               *flags)[0] == 0


def test_nothing_to_score_is_an_error(data, weights, tmp_path, capsys):
    with open(str(data / "annotations" / "instances_val2017.json")) as stream:
        content = json.load(stream)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "crowds.json").write_text(json.dumps(content))
    for flags, words in (
            ([f"--valid_info={tmp_path}/crowds.json", f"--valid_images={data}/val2017"],
             "none is an object to learn or score"),
            ([f"--val_data={data}", "--max_images=1"], "none of the 1 images that were chosen")):
        flags += ["--trained_model=" + weights, "--per_class_file="]
        code, _, err = run(capsys, *flags)
        assert code == 2 and words in err
        flags += [f"--{kind}_det_file={tmp_path}/{kind}.json" for kind in ("bbox", "mask")]
        assert run(capsys, *flags, "--output_coco_json", "--detect")[0] == 0


def test_other_class_count(data, weights, tmp_path, capsys):
    info = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    info["categories"].append({"id": 50, "name": "sun"})
    path = tmp_path / "five.json"
    path.write_text(json.dumps(info))
    code, _, err = run(capsys, "--trained_model=" + weights, f"--valid_info={path}",
                       "--valid_images={}".format(data / "val2017"))
    assert code == 2 and len(err.splitlines()) == 1
    for part in ("4 classes (circle, square, star, moon)", "has 5 (circle,", "five.json"):
        assert part in err


@pytest.mark.parametrize("flags, expected", [
    (["--trained_modell=x"], "did you mean --trained_model?"),
    (["--config=yolact_bass"], "did you mean 'yolact_base'?"),
    (["--eval_device=npx"], "npu"),
    (["--fast_nms=maybe"], "True or False"),
    (["--batch_size=0"], "--batch_size is '0', expected a whole number from 1 to"),
    (["--seed=-1", "--shuffle"], "--seed is '-1', expected a whole number from 0 to"),
    (["--score_threshold=30"], "--score_threshold is 30, expected 0 to 1"),
    (["--score_threshold=nan"], "expected 0 to 1"),
    (["--trained_model=nowhere.pth"], "nowhere.pth"),
    (["--valid_images=x"], "--valid_info"),
    (["--val_data=/nonexistent"], "/nonexistent"),
    ([], "--data=FOLDER"),
    (["--mask_proto_debug"], "--mask_proto_debug does not exist here: the viewer"),
    (["--ap_data_file=results/ap.pkl"], "--output_coco_json"),
])
def test_mistakes_are_one_sentence(weights, capsys, flags, expected):
    if not any(flag.startswith(("--trained_model", "--config")) for flag in flags):
        flags = flags + ["--trained_model=" + weights]
    try:
        code = evaluation.main(flags)
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert expected in captured.err


@pytest.mark.parametrize("flags, expected", [
    (["--per_class_file=/dev/null/x.csv"], "cannot write '/dev/null/"),
    (["--output_coco_json", "--mask_det_file=/dev/null/x.json"], "cannot write '/dev/null/"),
    (["--detect", "--output_coco_json", "--per_class_file=/dev/null/x"], None),
    (["--valid_images={empty}", "--valid_info={data}/annotations/instances_val2017.json"],
     "5 of the 5 images"),
])
def test_what_cannot_end_well_is_said_before(data, weights, tmp_path, capsys, monkeypatch, flags,
                                             expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, "--trained_model=" + weights, f"--val_data={data}",
                         *[flag.format(data=data, empty=tmp_path / "empty") for flag in flags])
    if expected is None:
        assert code == 0, err
    else:
        assert code == 2 and out == "" and expected in err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(data, weights, tmp_path, capsys, num_workers):
    (tmp_path / "images").mkdir()
    for n in range(len(SIZES)):
        content = (data / "val2017" / f"{n}.png").read_bytes()
        (tmp_path / "images" / f"{n}.png").write_bytes(content[:40] if n == 3 else content)
    code, _, err = run(capsys, "--trained_model=" + weights, f"--num_workers={num_workers}",
                       "--valid_images={}".format(tmp_path / "images"),
                       "--valid_info={}".format(data / "annotations" / "instances_val2017.json"))
    assert code == 2 and "image 103" in err and len(err.splitlines()) == 1


def test_drawing_one_image(data, weights, tmp_path, capsys):
    target = tmp_path / "made" / "out.png"
    code, out, _ = run(capsys, "--trained_model=" + weights, "--top_k=3",
                       "--image={}:{}".format(data / "val2017" / "3.png", target))
    assert code == 0 and "3 objects" in out
    picture = cv2.imread(str(target))
    assert picture.shape == (150, 80, 3)
    assert (picture != cv2.imread(str(data / "val2017" / "3.png"))).any()


def test_classes_are_matched_by_name():
    categories = list(zip(IDS, NAMES))
    assert match_categories(None, 4, categories, "w", "a") == (IDS, [])
    assert match_categories(NAMES, 4, categories, "w", "a") == (IDS, [])
    assert match_categories(NAMES[::-1], 4, categories, "w", "a") == (IDS[::-1], [])
    with pytest.raises(UserError, match=r"w has 4 classes \(a, .*, but a has 4 \("):
        match_categories(["a", NAMES[1], "b", NAMES[0]], 4, categories, "w", "a")
    with pytest.raises(UserError, match=r"80 classes \(names unknown\), but a has 4"):
        match_categories(None, 80, categories, "w", "a")


def test_network_input_is_rgb_planes():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :, 2] = 200
    planes = to_network_input(image, 8)
    assert planes.shape == (3, 8, 8) and planes.dtype == np.uint8
    assert (planes[0] == 200).all() and (planes[1:] == 0).all()
    assert planes.flags["C_CONTIGUOUS"]


def test_the_last_batch_is_filled_up(data):
    batches = list(load_batches(EvaluationBatches(dataset_of(data), [4, 2, 0], 2, 32)))
    assert [[fact[0] for fact in facts] for _, facts in batches] == [[104, 102], [100]]
    assert all(images.shape == (2, 3, 32, 32) for images, _ in batches)
    assert not batches[1][0][1].bool().any()
    last = list(load_batches(EvaluationBatches(dataset_of(data), [4, 2, 0], 2, 32, full=False)))[1]
    assert torch.equal(last[0], batches[1][0][:1])
    assert [tuple(fact[1:]) for fact in batches[0][1]] == [SIZES[4], SIZES[2]]


def test_choice_of_images():
    assert choose_images(5, -1) == [0, 1, 2, 3, 4] and choose_images(5, 2) == [0, 1]
    assert sorted(choose_images(5, 9, shuffle=True)) == [0, 1, 2, 3, 4]
    chosen = choose_images(100, 5, shuffle=True, seed=3)
    assert chosen == choose_images(100, 5, shuffle=True, seed=3) != choose_images(100, 5, True, 4)


def test_the_host_finishes_a_batch_after_the_next_is_launched(data):
    events = []
    times = StageTimes()
    stream = io.StringIO()

    class Events(Detector):
        def launch(self, images, times):
            events.append("launch")
            return PendingDetections(*[torch.full((), len(events))] * 3)

        def objects(self, fetched, n, height, width):
            return int(fetched.proto)

    batches = load_batches(EvaluationBatches(dataset_of(data), range(3), 1, 32))
    for image_id, launched in Events(None, None, None).find(batches, times,
                                                            ProgressBar(3, stream)):
        events.append(f"finish {image_id} {launched}")
    assert events == ["launch", "launch", "finish 100 1", "launch", "finish 101 2", "finish 102 4"]
    assert times.images == 3 and "loading" in times.seconds
    assert stream.getvalue() == ""  # not a terminal
