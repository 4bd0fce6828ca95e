"""An exported model against the network that it came from, on the spot."""

from __future__ import annotations

from typing import Dict, List

import numpy as np
import torch
from torch import Tensor

from data.config import Config
from data.shapes import draw_scene
from layers.detection import Detect
from utils.errors import UserError
from utils.exported import ExportedModel
from utils.inference.detector import to_network_input
from yolact import Yolact

TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference, relative to the largest value of its output."""


def example_images(side: int, count: int) -> np.ndarray:
    """Drawn scenes and noise in turn, uint8 `[count, 3, side, side]` RGB."""
    rng = np.random.RandomState(0)
    return np.stack([
        to_network_input(draw_scene(0, "val", n).image, side) if n % 2 == 0
        else rng.randint(0, 256, (3, side, side)).astype(np.uint8) for n in range(count)])


@torch.no_grad()
def differences(network: Yolact, config: Config, folder: str, half: bool) -> Dict[str, float]:
    """Largest difference of every output of the models in `folder`, relative to its values.

    Of detections, the distance of each from the nearest of its class in the other's; those that
    the last bits of a score let in or out are left aside, and in half precision the worst tenth:
    there an overlap at the threshold may be decided otherwise.

    Raises:
        UserError: a difference above the tolerance; names it.
    """
    model = ExportedModel(folder, "cpu")
    largest = sum(entry["batch"] or 3 for entry in model.models)
    planes = example_images(config.max_size, largest)
    images = torch.from_numpy(planes)
    network = network.eval()
    predictions = network(images)
    found = {name: torch.from_numpy(values) for name, values in model(planes).items()}
    apart = {"proto": _relative(predictions["proto"], found["proto"])}
    if "conf" in found:
        wanted = dict(predictions, conf=predictions["conf"].softmax(2))
        apart.update({name: _relative(wanted[name], found[name]) for name in found})
    else:
        apart["detections"] = _detections_apart(predictions, found, config, half)
    if network.maskiou_net is not None:
        masks = torch.rand(3, 1, config.proto_size, config.proto_size)
        apart["mask_iou"] = _relative(network.maskiou_net(masks),
                                      torch.from_numpy(model.mask_iou(masks.numpy())))
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= tolerance:  # NaN, too
        raise UserError(f"the exported model differs from PyTorch: {worst} by {apart[worst]:.2g} "
                        f"of its largest value, at most {tolerance:g} is expected; choose another "
                        "--opset or onnxruntime, and report it with the versions")
    return apart


def _relative(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    scale = wanted.abs().max().clamp(min=1e-6)
    return float((wanted - found).abs().max() / scale)


def _detections_apart(predictions: Dict[str, Tensor], found: Dict[str, Tensor], config: Config,
                      half: bool) -> float:
    wanted = Detect.from_config(config)(predictions)
    apart: List[float] = [0.0]
    for n in range(len(wanted.count)):
        rows = wanted.of_image(n)
        floor = config.nms_conf_thresh
        if len(rows.scores) == config.max_num_detections:
            floor = max(floor, float(rows.scores[-1]))
        count = int(found["count"][n])
        ours, theirs = (torch.cat((boxes, scores.unsqueeze(1), coefficients), 1)
                        for boxes, scores, coefficients in (
                            (rows.boxes, rows.scores, rows.coefficients),
                            (found["boxes"][n, :count], found["scores"][n, :count],
                             found["coefficients"][n, :count])))
        for row, kind in zip(ours[rows.scores > floor + TOLERANCE], rows.classes):
            same = theirs[found["classes"][n, :count] == kind]
            apart.append(float((same - row).abs().max(1)[0].min()) if len(same) else float("inf"))
    return float(np.quantile(apart, 0.9 if half else 1.0))
