"""What an exported folder holds: models, `model.yaml`, `priors.npy` and `run.py`.

The models are compared with the network that they came from on the spot.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import torch
from torch import Tensor

from data.classes import find_classes
from data.config import Config
from data.shapes import draw_scene
from layers.detection import Detect
from utils.errors import UserError
from utils.export import graph
from utils.exported import DESCRIPTION, DESCRIPTION_FORMAT, ExportedModel, require
from utils.files import digest
from utils.inference.detector import LoadedModel, to_network_input
from yolact import Yolact

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PRIORS, MASK_IOU, RUN = "priors.npy", "mask_iou.onnx", "run.py"
_COMMENT = ("# What this folder holds. YAML in JSON's subset: run.py reads it without a library, "
            "and does not run without it.\n")
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference, relative to the largest value of its output."""


@dataclass(frozen=True)
class Plan:
    """What is to be exported."""

    form: str = "raw"
    """One of `utils.exported.FORMS`."""
    batches: Tuple[Optional[int], ...] = (1,)
    """A model for each; None leaves the batch open."""
    input_type: str = "float32"
    """One of `utils.exported.INPUT_TYPES`."""
    half: bool = False
    opset: Optional[int] = None
    """None for the lowest that the network can do with."""

    def model_name(self, batch: Optional[int]) -> str:
        """File name, without ending, of the model with this batch."""
        return "model" if len(self.batches) == 1 else f"model_bs{batch}"


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to fill, which takes the name `path` at the end; after an error none is left.

    Raises:
        UserError: there is something at `path` already, or nothing can be written there.
    """
    path = os.path.abspath(path)
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f"'{path}' exists and is not an empty folder; choose another --out, or "
                        "remove it")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(temporary)
        yield temporary
        if os.path.isdir(path):
            os.rmdir(path)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}; free some space or "
                        "choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_models(loaded: LoadedModel, network: Yolact, plan: Plan,
                 folder: str) -> Dict[str, Any]:
    """Write the ONNX files and what they need; returns the description of the folder."""
    config = loaded.config
    deformable = graph.has_deform_conv(network)
    opset = plan.opset or (graph.DEFORM_CONV_OPSET if deformable else graph.DEFAULT_OPSET)
    if deformable and opset < graph.DEFORM_CONV_OPSET:
        raise UserError(f"--opset is {opset}, but {config.name} has deformable convolutions, which "
                        f"ONNX has from opset {graph.DEFORM_CONV_OPSET} on; leave --opset out")
    ready = graph.prepared(network)
    module = graph.RawOutputs(ready) if plan.form == "raw" else graph.DetectionOutputs(ready,
                                                                                       config)
    for batch in plan.batches:
        graph.write_network(module, os.path.join(folder, plan.model_name(batch) + ".onnx"), config,
                            plan.form, batch, plan.input_type, opset, plan.half)
    np.save(os.path.join(folder, PRIORS), network.priors[config.max_size].numpy())
    if network.maskiou_net is not None:
        graph.write_mask_iou(network.maskiou_net, os.path.join(folder, MASK_IOU), config, opset)
    with open(os.path.join(folder, RUN), "w", encoding="utf-8") as stream:
        stream.write(bundle(os.path.join(REPOSITORY, "utils", "export", RUN)))
    return _describe(loaded, plan, folder, opset)


def _describe(loaded: LoadedModel, plan: Plan, folder: str, opset: int) -> Dict[str, Any]:
    config, source = loaded.config, loaded.source.path
    classes = find_classes(config.num_classes - 1, loaded.source.class_names,
                           loaded.source.category_ids, config.dataset)
    model_input: Dict[str, Any] = {"name": graph.INPUT_NAME, "type": plan.input_type,
                                   "layout": "NCHW"}
    if plan.input_type == "float32":
        model_input.update(mean=config.pixel_mean, std=config.pixel_std)
    models = []
    for batch in plan.batches:
        file = plan.model_name(batch) + ".onnx"
        models.append({"file": file, "batch": batch, "opset": opset, "half": plan.half,
                       "sha256": digest(os.path.join(folder, file)), "input": model_input})
    mask_iou = os.path.join(folder, MASK_IOU)
    return {
        "format": DESCRIPTION_FORMAT,
        "recipe": config.name,
        "parameters": sum(tensor.numel() for tensor in loaded.model.parameters()),
        "class_names": classes.names,
        "category_ids": classes.category_ids,
        "image": {"size": config.max_size, "channels": "RGB",
                  "resize": "bilinear to size x size, aspect not kept"},
        "form": plan.form,
        "outputs": [{"name": output.name, "shape": ["batch", *output.shape],
                     "meaning": output.meaning}
                    for output in graph.outputs_of(config, plan.form)],
        "models": models,
        "priors": PRIORS,
        "mask_iou": {"file": MASK_IOU, "sha256": digest(mask_iou)} if os.path.exists(mask_iou)
        else None,
        "thresholds": {"score": config.nms_conf_thresh, "iou": config.nms_thresh,
                       "top_k": config.nms_top_k, "max_detections": config.max_num_detections},
        "weights": {"file": os.path.basename(source), "sha256": digest(source)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **{
            name: require(name).__version__ for name in ("onnx", "onnxruntime")}},
        "config": config.to_dict(),
    }


def write_description(facts: Dict[str, Any], folder: str) -> None:
    """Write `model.yaml`."""
    with open(os.path.join(folder, DESCRIPTION), "w", encoding="utf-8") as stream:
        stream.write(_COMMENT + json.dumps(facts, indent=2) + "\n")


def bundle(path: str, known: Optional[Set[str]] = None) -> str:
    """The text of a module, with those modules of `utils` that it imports in their place.

    What they define keeps its names, so that one file does what several do here.
    """
    known = set() if known is None else known
    with open(path, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    body = ast.parse("\n".join(lines)).body
    ours = [node for node in body if isinstance(node, ast.ImportFrom) and node.module
            and node.module.startswith("utils.")]
    is_inner = bool(known)
    for node, following in reversed([(node, body[body.index(node) + 1]) for node in ours]):
        module = str(node.module)
        inner: List[str] = []
        if module not in known:
            known.add(module)
            inner = bundle(os.path.join(REPOSITORY, *module.split(".")) + ".py",
                           known).splitlines()
        lines[node.lineno - 1:following.lineno - 1] = inner + [""]
    if is_inner:  # a file has one docstring, and its __future__ at the top
        future = next(node for node in body if isinstance(node, ast.ImportFrom)
                      and node.module == "__future__")
        lines = lines[future.lineno:]
    return "\n".join(lines) + "\n"


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
