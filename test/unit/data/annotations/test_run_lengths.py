"""Compressed run lengths, against pycocotools."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils

from data.annotations.defects import run_length_sums
from data.annotations.packed import load_annotations
from helpers.coco_files import HEIGHT, WIDTH, document, write_json


def test_run_length_sums_match_pycocotools():
    rng = np.random.RandomState(1)
    masks = [(rng.rand(rng.randint(1, 60), rng.randint(1, 60)) < rng.rand()).astype(np.uint8)
             for _ in range(300)]
    for n in range(0, 300, 7):
        masks[n][:] = n % 2
    masks.append(np.zeros((2000, 3000), np.uint8))
    masks[-1][500:1500, 700:900] = 1
    rles = [mask_utils.encode(np.asfortranarray(mask))["counts"] for mask in masks] * 20
    totals, areas = run_length_sums(np.frombuffer(b"".join(rles), np.uint8),
                                    np.array([len(rle) for rle in rles]))
    assert list(zip(totals.tolist(), areas.tolist())) == [
        (mask.size, int(mask.sum())) for mask in masks] * 20


def test_damaged_run_lengths_do_no_harm_to_their_neighbours(tmp_path):
    content = document()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[3:9, 5:30] = 1
    good = mask_utils.encode(np.asfortranarray(mask))["counts"].decode()
    shifted = chr(ord(good[0]) + 64) + good[1:]  # the same low bits, but not a legal character
    longer = good + "05"  # runs beyond the image's last pixel
    all_counts = ["", good, shifted, good, "o" * 40, good, good[:-1] + "o", good, longer]
    content["annotations"] = [
        {"id": number, "image_id": 20, "category_id": 7, "bbox": [5, 3, 25, 6],
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
        for number, counts in enumerate(all_counts, 1)]
    packed = load_annotations(write_json(tmp_path, content))
    assert packed.report.defects["malformed_outline"].examples == [1, 3, 5, 7, 9]
    found = [packed.segmentation(row, WIDTH, HEIGHT) for row in range(len(packed.labels))]
    assert found[:4] == [{"size": [HEIGHT, WIDTH], "counts": good.encode()}] * 4
