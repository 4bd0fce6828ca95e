"""A run folder with everything in it, made without training, for tests of the report."""

from __future__ import annotations

import csv
import io
import json

import cv2
import numpy as np

from utils.inference.evaluation_record import matrix_csv
from utils.report import MATRIX, PER_CLASS, SUMMARY
from utils.run_folder import RunFolder

NASTY = ['<script>alert("1")</script>', "a & b", "\u732b", "price $5 and $6", "line\nend",
         "a very long class name that goes on and on and on without an end", "'single'"]
"""Class names that break pages and plots which do not expect them."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but what is in it."""


def write_run(project, names=NASTY, steps=30, validations=3, name="run"):
    """Write a run folder; returns it."""
    folder = RunFolder(str(project / name), "test-id")
    folder.write_config({
        "program": "train.py", "config": "yolact_shapes", "set": {"max_size": 160},
        "flags": {"data": "/data/<b>bold</b>", "lr": 0.001, "resume": None},
        "run": {"max_iter": steps * 10, "iterations_per_epoch": 100, "class_names": list(names),
                "config": {"name": "yolact_shapes", "max_size": 160,
                           "pred_scales": [[20.0], [42.0]]}},
        "data": {"train": {"annotation_file": "a.json", "images": 5, "sentences": ["one & two"],
                           "objects_per_class": dict.fromkeys(names, 3)}}})
    folder.add_session({"time": "2026-01-01T00:00:00Z", "device": "device cpu",
                        "command": "python train.py --data='<i>'", "packages": {"torch": "2.13"}})
    lines = [json.dumps({
        "type": "train", "iteration": step, "epoch": step // 100, "lr": 0.001,
        "losses": {"B": 30.0 / step}, "total": 90.0 / step, "skipped": 0, "fps": 12.0,
        "avg_fps": 12.5}) + "\n" for step in range(10, steps * 10 + 1, 10)]
    folder.write_bytes("log.jsonl", "".join(lines).encode("utf-8"))
    for number in range(1, validations + 1):
        folder.add_record("val", iteration=number * 100, epoch=number, images=3,
                          mask={"AP": 0.1 * number, "AP50": 0.2 * number, "AP75": None},
                          box={"AP": 0.11 * number, "AP50": 0.22 * number, "AP75": None})
    if validations:
        write_evaluation(folder, names)
    return folder


def write_evaluation(folder, names, pictures=2):
    """What an evaluation leaves; the last class has no objects."""
    statistics = {key: 0.25 for key in ("AP", "AP50", "AP75", "APs", "APm", "AR100")}
    scores = dict(statistics, APl=None,
                  per_threshold={str(number): 0.5 for number in range(50, 100, 5)})
    shown = []
    for number in range(pictures):
        noise = np.random.RandomState(number).randint(0, 256, (90, 180, 3)).astype(np.uint8)
        path = f"evaluation/pictures/{number:012d}.jpg"
        folder.write_bytes(path, cv2.imencode(".jpg", noise)[1].tobytes())
        shown.append({"file": path, "image_id": number,
                      "image": f"<u>{number}</u>.jpg", "objects": 1, "detections": 2})
    folder.write(SUMMARY, {
        "weights": "best.pth", "iteration": 100, "time": "2026-01-01T00:00:00Z",
        "annotations": "val.json", "images": 2, "images_in_file": 3, "settings": {},
        "notes": ["<note>"],
        "box": scores, "mask": scores, "confusion_matrix": {
            "score_threshold": 0.3, "iou_threshold": 0.5, "iou_of": "masks"},
        "pictures": {"score_threshold": 0.3, "shown": shown}})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["category_id", "name", "objects", "box_AP", "box_AP50", "mask_AP", "mask_AP50"])
    for number, name in enumerate(names):
        cells = ["", "", "", ""] if len(names) > 1 and number == len(names) - 1 else [
            "30.00", "40.00", f"{90.0 * number / len(names):.2f}", "50.00"]
        rows.writerow([number, name, number * 3] + cells)
    folder.write_bytes(PER_CLASS, text.getvalue().encode("utf-8"))
    counts = np.eye(len(names) + 1, dtype=np.int64) * 5
    counts[-1, -1] = 0
    if len(names) > 1:
        counts[0, 1] = 3
    folder.write_bytes(MATRIX, matrix_csv(counts, names))

