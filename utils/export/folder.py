"""An exported folder, there whole or not at all: models, model.yaml, priors.npy and run.py."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Iterator, cast

import numpy as np
import torch

from data.classes import find_classes
from layers.deform_conv import DeformConv2d
from utils.errors import UserError
from utils.export import graph
from utils.export.atc import ATC_ENDING
from utils.export.deformable import write_for_atc
from utils.exported import DESCRIPTION, DESCRIPTION_FORMAT, refuse_other_names, require
from utils.files import alone, digest
from utils.inference.detector import LoadedModel
from yolact import Yolact

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PRIORS, MASK_IOU, RUN = "priors.npy", "mask_iou.onnx", "run.py"
_COMMENT = ("# What this folder holds. YAML in JSON's subset: run.py reads it without a library, "
            "and does not run without it.\n")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to fill, which takes the name `path` at the end; after an error none is left.

    What a killed export has left there goes first.

    Raises:
        UserError: there is something at `path` already, or nothing can be written there.
    """
    path = os.path.realpath(path)
    refuse_other_names(path)
    _refuse_taken(path)
    # An empty folder stays: it may be mounted there, or a shell's current one.
    is_made = os.path.isdir(path)
    hidden = os.path.join(path if is_made else os.path.dirname(path), _hidden_name(path))
    new = [str(parent) for parent in Path(path).parents if not parent.exists()]
    try:
        with alone(Path(hidden)), contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, hidden, ignore_errors=True)
            _refuse_taken(path)  # by the one that this one has waited for
            clear(hidden)
            yield hidden
            if is_made:  # without its description, which comes last, it is no export
                for name in sorted(os.listdir(hidden), key=lambda name: name == DESCRIPTION):
                    os.replace(os.path.join(hidden, name), os.path.join(path, name))
            else:
                os.replace(hidden, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}; free some space or "
                        "choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # one holds the folder, or ATC's output
            for parent in new:
                os.rmdir(parent)


def _hidden_name(path: str) -> str:
    """Of the folder that is filled before it, or what is in it, becomes the export at `path`."""
    return f".{os.path.basename(path)}.export"


def _refuse_taken(path: str) -> None:
    if os.path.exists(path) and not (os.path.isdir(path)
                                     and set(os.listdir(path)) <= {_hidden_name(path)}):
        raise UserError(f"'{path}' exists and is not an empty folder; choose another --out, or "
                        "remove it")


def clear(folder: str, keep: Collection[str] = ()) -> None:
    """Remove all that is in a folder, but what is named in `keep`."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.name in keep:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


@dataclass(frozen=True)
class Plan:
    """What is to be exported."""

    form: str = "raw"
    """One of `utils.exported.FORMS`."""
    batches: tuple[int | None, ...] = (1,)
    """A model for each; None leaves the batch open."""
    input_type: str = "float32"
    """One of `utils.exported.INPUT_TYPES`."""
    half: bool = False
    opset: int | None = None
    """None for the lowest that the network can do with."""
    for_atc: bool = False
    """Whether ATC is to make Ascend's models of these; it takes the float32 ones."""

    def model_name(self, batch: int | None) -> str:
        """File name, without ending, of the model with this batch."""
        return "model" if len(self.batches) == 1 else f"model_bs{batch}"


def write_models(loaded: LoadedModel, network: Yolact, plan: Plan, folder: str,
                 planes: np.ndarray) -> dict[str, Any]:
    """Write the ONNX files and what they need; returns the description of the folder.

    `planes` are uint8 images `[n, 3, S, S]` RGB to check what ONNX Runtime cannot run.

    Raises:
        UserError: the network cannot be exported so.
    """
    config = loaded.config
    deformable = any(isinstance(module, DeformConv2d) for module in network.modules())
    _refuse_old_pytorch(plan, deformable)
    opset = plan.opset or (graph.DEFORM_CONV_OPSET if deformable else graph.DEFAULT_OPSET)
    if deformable and opset < graph.DEFORM_CONV_OPSET:
        raise UserError(f"--opset is {opset}, but {config.name} has deformable convolutions, which "
                        f"ONNX has from opset {graph.DEFORM_CONV_OPSET} on; leave --opset out")
    ready = graph.prepared(network)
    for batch in plan.batches:
        path = os.path.join(folder, plan.model_name(batch))
        graph.write_network(ready, path + ".onnx", config, plan.form, batch, plan.input_type,
                            opset, plan.half)
        if plan.for_atc and deformable:
            write_for_atc(network, path + ATC_ENDING, config, plan.form, cast(int, batch),
                          planes)
    np.save(os.path.join(folder, PRIORS), network.priors[config.max_size].numpy())
    if network.maskiou_net is not None:
        graph.write_mask_iou(network.maskiou_net, os.path.join(folder, MASK_IOU), config, opset)
    with open(os.path.join(folder, RUN), "w", encoding="utf-8") as stream:
        stream.write(bundle(os.path.join(REPOSITORY, "utils", "export", RUN)))
    return _describe(loaded, plan, folder, opset)


def _refuse_old_pytorch(plan: Plan, deformable: bool) -> None:
    """A `UserError` where this PyTorch lacks operators, or does not name nodes by module."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    for asked, what, since in (
            (plan.form == "detections", "--outputs=detections", (2, 0)),
            (plan.half, "--half", (2, 0)), (None in plan.batches, "--batch_size=dynamic", (1, 8)),
            (deformable, "a deformable convolution", (2, 0))):
        if asked and version < since:
            raise UserError(f"PyTorch {torch.__version__} cannot write {what}; export where "
                            f"PyTorch {'.'.join(map(str, since))} or newer is installed: it reads "
                            "the same weights")


def _describe(loaded: LoadedModel, plan: Plan, folder: str, opset: int) -> dict[str, Any]:
    config, source = loaded.config, loaded.source.path
    classes = find_classes(config.num_classes - 1, loaded.source.class_names,
                           loaded.source.category_ids, config.dataset)
    model_input: dict[str, Any] = {"name": graph.INPUT_NAME, "type": plan.input_type,
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


def write_description(facts: dict[str, Any], folder: str) -> None:
    """Write `model.yaml`."""
    with open(os.path.join(folder, DESCRIPTION), "w", encoding="utf-8") as stream:
        stream.write(_COMMENT + json.dumps(facts, indent=2) + "\n")


def bundle(path: str, known: set[str] | None = None) -> str:
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
        inner: list[str] = []
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
