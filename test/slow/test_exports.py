"""Every recipe, exported, scores photographs as its weights do."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch

import eval as evaluation
from data.config import list_configs
from helpers.deterministic import load_deterministic_weights
from helpers.exports import export, require_onnx, small
from utils.checkpoint import CheckpointName, save_checkpoint
from utils.inference import Predictor
from utils.inference.detector import to_network_input
from yolact import build_yolact

require_onnx()
pytestmark = pytest.mark.slow
IMAGES, OBJECTS = 6, 10
TOLERANCE = 1e-3
"""Of a score, and of a corner relative to the image."""


def save_network(name, photograph, folder):
    """Fixed weights, with scores all over 0..1; returns their path and the names of their classes.

    Scores that are equal but for their last bits, as those near 1 are, would make AP depend on
    their order.
    """
    config = small(name)
    network = load_deterministic_weights(build_yolact(config)).eval()
    with torch.no_grad():
        planes = to_network_input(photograph, config.max_size)[None]
        logits = network(torch.from_numpy(planes))["conf"]
        network.prediction_layers[0].conf_layer.weight.mul_(2 / logits.std())
    names = [f"class {n}" for n in range(1, config.num_classes)]
    return save_checkpoint(CheckpointName(name, 1, 20).path(str(folder)), network.state_dict(), {
        "config": config.to_dict(), "class_names": names,
        "category_ids": list(range(1, config.num_classes))}), names


def label(photographs, weights, names, path):
    """Write annotations: the best of what PyTorch finds, so that there is something to score."""
    predictor, images, objects = Predictor(weights, device="cpu"), [], []
    for n, photograph in enumerate(photographs, 1):
        found = predictor(cv2.imread(str(photograph)))
        height, width = found.image.shape[:2]
        images.append({"id": n, "file_name": photograph.name, "height": height, "width": width})
        records = [record for record in found.to_coco(n)
                   if pycocotools.mask.area(record["segmentation"]) > 0]
        for record in records[:OBJECTS]:
            objects.append({"id": len(objects) + 1, "iscrowd": 0, "area": 100.0, **{
                key: record[key] for key in ("image_id", "category_id", "bbox", "segmentation")}})
    path.write_text(json.dumps({
        "images": images, "annotations": objects,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)]}))


def score(source, photographs, annotations, folder, capsys):
    """AP of boxes and masks as eval.py prints them, and its records of the boxes by image."""
    capsys.readouterr()
    assert evaluation.main([
        f"--trained_model={source}", f"--valid_images={photographs[0].parent}",
        f"--valid_info={annotations}", "--eval_device=cpu", "--num_workers=0",
        "--per_class_file=", "--output_coco_json", f"--bbox_det_file={folder / 'box.json'}",
        f"--mask_det_file={folder / 'mask.json'}"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    table = {row[0].strip(): float(row[1]) for row in rows
             if row[0].strip() in ("box", "mask") and len(row) > 2}
    records = json.loads((folder / "box.json").read_text())
    return table, [[record for record in records if record["image_id"] == n + 1]
                   for n in range(IMAGES)]


def rows_of(records, side):
    """`[n, 6]`: corner and size over the image's side, score, class."""
    return np.array([[*(value / side for value in record["bbox"]), record["score"],
                      record["category_id"]] for record in records])


@pytest.mark.parametrize("name", list_configs())
def test_an_export_scores_as_its_weights(name, coco_mini, tmp_path, capsys):
    photographs = sorted((coco_mini / "val2017").iterdir())[:IMAGES]
    weights, names = save_network(name, cv2.imread(str(photographs[0])), tmp_path / "weights")
    label(photographs, weights, names, tmp_path / "labels.json")
    folder = export(weights, tmp_path / "out", f"--images={coco_mini / 'val2017'}")
    table, found = score(weights, photographs, tmp_path / "labels.json", tmp_path, capsys)
    exported, again = score(folder, photographs, tmp_path / "labels.json", tmp_path, capsys)
    assert table["box"] > 10 and table["mask"] > 10
    for kind in ("box", "mask"):
        assert abs(table[kind] - exported[kind]) <= 0.05
    for photograph, one, other in zip(photographs, found, again):
        side = max(cv2.imread(str(photograph)).shape)
        sides = rows_of(one, side), rows_of(other, side)
        lowest = sides[0][:, 4].min() + TOLERANCE  # below, the last bits of a score let some in
        for rows, others in (sides, sides[::-1]):
            for row in rows[rows[:, 4] > lowest]:
                assert np.abs(others - row).max(1).min() < TOLERANCE
