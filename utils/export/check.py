"""Whether exported models are the network that they came from."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

from data.config import Config
from data.image import read_image
from data.shapes import draw_scene
from layers.detection import Detect
from utils.errors import UserError
from utils.exported import ExportedModel
from utils.inference.detector import to_network_input
from utils.inference.predict import image_files
from yolact import Yolact

TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference, relative to the largest value of its output."""
OWN_IMAGES = 3
"""Of the user, at most."""


def example_images(side: int, count: int) -> np.ndarray:
    """Drawn scenes and noise in turn, uint8 `[count, 3, side, side]` RGB."""
    rng = np.random.RandomState(0)
    return np.stack([
        to_network_input(draw_scene(0, "val", n).image, side) if n % 2 == 0
        else rng.randint(0, 256, (3, side, side)).astype(np.uint8) for n in range(count)])


def check_images(side: int, source: str | None) -> np.ndarray:
    """Images to check an export with, uint8 `[n, 3, side, side]` RGB: drawn ones, noise, and up to
    three of the user's own, of the folder or pattern `source`.

    A network finds little in images that are not of the kind that it was trained on.

    Raises:
        UserError: there are no images, or one cannot be read.
    """
    planes = example_images(side, 3)
    if source is None:
        return planes
    paths, _ = image_files(source)
    chosen = paths[::math.ceil(len(paths) / OWN_IMAGES)]  # from all over the folder
    return np.concatenate((planes, [to_network_input(read_image(path), side) for path in chosen]))


@torch.no_grad()
def differences(network: Yolact, config: Config, folder: str, half: bool,
                planes: np.ndarray) -> dict[str, float]:
    """Differences of the models in `folder`, which may be in `half` precision, from their network,
    see `compare`; the worst of each. Each model gets `planes`, uint8 images `[n, 3, S, S]` RGB.

    Raises:
        UserError: a difference above the tolerance; names it.
    """
    network = network.eval()
    predictions = network(torch.from_numpy(planes))
    apart: dict[str, float] = {}
    for entry in ExportedModel(folder, "cpu").models:
        index = np.arange(max(entry["batch"] or 0, len(planes))) % len(planes)
        model = ExportedModel(os.path.join(folder, entry["file"]), "cpu")
        found = {name: torch.from_numpy(values) for name, values in model(planes[index]).items()}
        keep_worst(apart, compare(of_images(predictions, index), found, config, half))
    if network.maskiou_net is not None:
        masks = torch.rand(3, 1, config.proto_size, config.proto_size)
        apart["mask_iou"] = relative(network.maskiou_net(masks),
                                     torch.from_numpy(model.mask_iou(masks.numpy())))
    refuse_apart(apart, HALF_TOLERANCE if half else TOLERANCE)
    return apart


def compare(predictions: dict[str, Tensor], found: dict[str, Tensor], config: Config,
            half: bool = False) -> dict[str, float]:
    """Largest difference of every output `found` of an exported model from the network's
    `predictions` for the same images, relative to its values.

    Of detections, the distance of each from the nearest of its class in the other's; those that
    the last bits of a score let in or out are left aside, and in half precision the worst tenth:
    there an overlap at the threshold may be decided otherwise. Where there are none, they are left
    out.
    """
    apart = {"proto": relative(predictions["proto"], found["proto"])}
    if "conf" in found:
        wanted = dict(predictions, conf=predictions["conf"].softmax(2))
        apart.update({name: relative(wanted[name], found[name]) for name in found})
        return apart
    distances = _distances(predictions, found, config)
    if distances:
        # One of them, not a mean of two: what has no counterpart is infinitely far.
        apart["detections"] = sorted(distances)[round((0.9 if half else 1.0)
                                                      * (len(distances) - 1))]
    return apart


def of_images(predictions: dict[str, Tensor], index: np.ndarray) -> dict[str, Tensor]:
    """Predictions for those images of a batch."""
    return {name: values if name == "priors" else values[index]
            for name, values in predictions.items()}


def keep_worst(apart: dict[str, float], found: dict[str, float]) -> None:
    """Let `apart` hold the larger difference of each output; one that is no number stays."""
    for name, value in found.items():
        apart[name] = float(np.maximum(value, apart.get(name, 0.0)))


def refuse_apart(apart: dict[str, float], tolerance: float) -> None:
    """A `UserError` where a difference is above the tolerance, or not a number."""
    worst = max(apart, key=lambda name: np.inf if np.isnan(apart[name]) else apart[name])
    if not apart[worst] <= tolerance:
        raise UserError(f"the exported model differs from PyTorch: {worst} by {apart[worst]:.2g} "
                        f"of its largest value, at most {tolerance:g} is expected; choose another "
                        "--opset or onnxruntime, and report it with the versions")


def relative(wanted: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value."""
    if wanted.shape != found.shape:
        return float("inf")
    scale = wanted.abs().max().clamp(min=1e-6)
    return float((wanted - found).abs().max() / scale)


def _distances(predictions: dict[str, Tensor], found: dict[str, Tensor],
               config: Config) -> list[float]:
    wanted = Detect.from_config(config)(predictions)
    apart: list[float] = []
    for n in range(len(wanted.count)):
        sides = []
        for boxes, scores, classes, coefficients, count in (
                (wanted.boxes, wanted.scores, wanted.classes, wanted.coefficients, wanted.count),
                [found[name] for name in ("boxes", "scores", "classes", "coefficients", "count")]):
            rows = slice(int(count[n]))
            values = torch.cat((boxes[n, rows], scores[n, rows, None], coefficients[n, rows]), 1)
            sides.append((values, scores[n, rows], classes[n, rows]))
        for (values, scores, classes), (others, _, kinds) in (sides, sides[::-1]):
            floor = config.nms_conf_thresh
            if len(scores) == config.max_num_detections:
                floor = max(floor, float(scores[-1]))
            for row, kind in zip(values[scores > floor + TOLERANCE], classes):
                same = others[kinds == kind]
                apart.append(float((same - row).abs().max(1)[0].min()) if len(same)
                             else float("inf"))
    return apart
