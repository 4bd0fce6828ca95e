"""The first batch as the network sees it: through the training loader, with its targets drawn."""

from __future__ import annotations

from typing import List

import cv2
import numpy as np

from data.coco import CocoDataset
from data.config import Config
from utils.drawing import draw_instances, side_by_side
from utils.files import write_whole

_COLUMNS = 4
_SIDE = 400
"""Smaller inputs are shown enlarged to about this many pixels, larger ones reduced."""


def write_first_batch(dataset: CocoDataset, config: Config, path: str, count: int = 8,
                      seed: int = 0) -> int:
    """Draw the first batch of a training with this seed; returns the number of images.

    Raises:
        UserError: an image cannot be read, or the picture not be written.
    """
    from data.batch import Batch  # PyTorch is needed for this alone
    from data.loader import build_train_loader

    count = min(count, len(dataset))
    # Images, boxes and masks of a batch do not depend on the priors: any will do, if there is one
    # for each object.
    priors = np.tile(np.array([[0.5, 0.5, 1.0, 1.0]], np.float32), (dataset.max_objects + 1, 1))
    config = config.replace(num_classes=len(dataset.categories) + 1)
    loader = build_train_loader(dataset, config, priors, batch_size=count, seed=seed)
    batch = next(iter(loader))
    assert isinstance(batch, Batch)
    names = dataset.class_names
    zoom = max(1, _SIDE // config.max_size)
    side = config.max_size * zoom if zoom > 1 else min(config.max_size, _SIDE)
    pictures, titles = [], []
    for n in range(count):
        rows = np.flatnonzero(batch.gt_labels[n].numpy() > 0)
        image = cv2.resize(np.ascontiguousarray(batch.images[n].numpy()[::-1].transpose(1, 2, 0)),
                           (side, side), interpolation=cv2.INTER_AREA if zoom == 1
                           else cv2.INTER_CUBIC)
        masks = [cv2.resize(batch.gt_masks[n, row].numpy(), (side, side),
                            interpolation=cv2.INTER_NEAREST) > 0 for row in rows]
        pictures.append(draw_instances(
            image, batch.gt_boxes[n].numpy()[rows] * side, masks,
            [names[label - 1] for label in batch.gt_labels[n].numpy()[rows]], class_names=names))
        titles.append("image {}: {} object{}".format(
            int(batch.image_ids[n]), len(rows), "" if len(rows) == 1 else "s"))
    data = cv2.imencode(".png", _grid(pictures, titles))[1].tobytes()
    write_whole(path, lambda stream: stream.write(data))
    return count


def _grid(pictures: List[np.ndarray], titles: List[str]) -> np.ndarray:
    rows = [side_by_side(pictures[n:n + _COLUMNS], titles[n:n + _COLUMNS])
            for n in range(0, len(pictures), _COLUMNS)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([cv2.copyMakeBorder(
        row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for row in rows])
