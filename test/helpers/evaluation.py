"""Score a network that is at hand, as train.py does."""

from __future__ import annotations

import torch

from layers.detection import Detect
from utils.inference.detector import Detector
from utils.inference.evaluation import Evaluation, choose_images

CPU = torch.device("cpu")


def evaluate(model, config, dataset, device=CPU, max_images=-1, **more):
    """COCO's scores of `model` on the first images of `dataset`; `more` goes to `Evaluation`."""
    evaluation = Evaluation(dataset, [number for number, _ in dataset.categories],
                            choose_images(len(dataset), max_images), **more)
    evaluator = evaluation.evaluator()
    evaluation.run(Detector(model, Detect.from_config(config), device), evaluator)
    return evaluator.evaluate()
