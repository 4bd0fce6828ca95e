"""What the tests of the converters share."""

from __future__ import annotations

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from data import convert
from data.datasets import open_dataset
from utils.cli import run_main

WIDTH, HEIGHT = 64, 48


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    pixels = np.random.RandomState(seed).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(str(path))


def run(capsys, *arguments):
    code = run_main(convert.main, [str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out if code == 0 else shown.err


def masks_of(dataset, index):
    """Class name and bool mask of each object, read as training reads them."""
    sample = dataset[index]
    found = []
    for label, outline in zip(sample.labels.tolist(), sample.segmentations):
        runs = outline if isinstance(outline, dict) else mask_utils.merge(mask_utils.frPyObjects(
            [part.ravel().astype(float).tolist() for part in outline], HEIGHT, WIDTH))
        found.append((dataset.class_names[label - 1], mask_utils.decode(runs) > 0))
    return found


def iou(mask, other):
    return (mask & other).sum() / (mask | other).sum()


def drawn(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def opened(out, split="train"):
    return open_dataset("coco2017", str(out), None, None, split)
