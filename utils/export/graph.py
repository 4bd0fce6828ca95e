"""From a network to ONNX files: what stands in the graph, and how it is written.

Letters: B batch, S input side, P priors, C classes with background, k prototypes, N detections,
h x w prototype size.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from typing import Any, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.config import Config
from layers.deform_conv import DeformConv2d, modulated_deform_conv2d
from layers.detection import Detect
from layers.heads import MaskIouNet
from utils.errors import UserError, first_line
from utils.exported import open_onnx, require
from utils.memory import is_out_of_memory
from yolact import Yolact, for_inference

INPUT_NAME = "input.1"
"""As in ModelZoo's YOLACT, whose scripts name it."""
DEFAULT_OPSET, DEFORM_CONV_OPSET = 11, 19
"""What ATC takes, and the first with a deformable convolution."""


class Output(NamedTuple):
    """One output of a graph."""

    name: str
    shape: tuple[int, ...]
    """Behind the batch."""
    meaning: str


def outputs_of(config: Config, form: str) -> list[Output]:
    """Outputs in their order; those of `raw` are ModelZoo's."""
    priors = config.num_anchors * sum(size * size for size in config.feature_sizes)
    k, n = config.num_prototypes, config.nms_top_k
    proto = Output("proto", (config.proto_size, config.proto_size, k),
                   "prototype masks; a mask is sigmoid(proto . coefficients), cut off at its box")
    if form == "raw":
        return [Output("mask", (priors, k), "mask coefficients of each prior, -1..1"),
                Output("conf", (priors, config.num_classes),
                       "probability of each class, softmax applied; 0 is background"),
                Output("loc", (priors, 4), "box of each prior, encoded against priors.npy with "
                                           "variances 0.1 and 0.2"),
                proto]
    return [Output("boxes", (n, 4), "x1 y1 x2 y2 relative to the image"),
            Output("scores", (n,), "0..1, best first; 0 in rows not in use"),
            Output("classes", (n,), "0-based class"),
            Output("coefficients", (n, k), "mask coefficients"),
            Output("count", (), "rows in use"),
            proto]


class Outputs(nn.Module):
    """What gives the outputs of a form from a network that is ready for export; of `detections`
    with Fast NMS inside and static shapes.
    """

    def __init__(self, network: Yolact, config: Config, form: str) -> None:
        super().__init__()
        self.network = network
        self.detect = Detect.from_config(config) if form == "detections" else None
        if self.detect is not None:
            self.detect.compact = False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images `[B,3,S,S]` -> `outputs_of(config, form)`."""
        found = self.network(images)
        if self.detect is None:
            return found["mask"], F.softmax(found["conf"], dim=2), found["loc"], found["proto"]
        rows = self.detect(found)
        return (rows.boxes, rows.scores, rows.classes.int(), rows.coefficients, rows.count.int(),
                found["proto"])


class _MaskIouOutput(nn.Module):
    """`MaskIouNet`, whose pooling takes its window from a shape."""

    def __init__(self, network: MaskIouNet) -> None:
        super().__init__()
        self.layers = network.maskiou_net

    def forward(self, masks: Tensor) -> Tensor:
        return self.layers(masks).flatten(2).max(2)[0]


class _DeformConv(torch.autograd.Function):
    """ONNX's `DeformConv`; its offsets and factors are ordered as ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor,
                stride: int, padding: int) -> Tensor:
        return modulated_deform_conv2d(x, offset, mask, weight, bias, stride, padding)

    @staticmethod
    def symbolic(g: Any, x: Any, offset: Any, mask: Any, weight: Any, bias: Any, stride: int,
                 padding: int) -> Any:
        return g.op("DeformConv", x, weight, offset, bias, mask, strides_i=[stride] * 2,
                    pads_i=[padding] * 4)


class _ExportedDeformConv(DeformConv2d):
    """A deformable convolution that becomes one node."""

    def forward(self, x: Tensor) -> Tensor:
        offset, logits = self.conv_offset_mask(x).split([2 * self.taps, self.taps], 1)
        return _DeformConv.apply(x, offset, torch.sigmoid(logits), self.weight, self.bias,
                                 self.stride, self.padding)


def prepared(network: Yolact) -> Yolact:
    """A copy for export: batch normalisation folded, deformable convolutions as single nodes."""
    ready = for_inference(network)
    for module in ready.modules():
        if isinstance(module, DeformConv2d):
            module.__class__ = _ExportedDeformConv
    return ready


def write_network(ready: Yolact, path: str, config: Config, form: str, batch: int | None,
                  input_type: str, opset: int, half: bool) -> None:
    """Write the outputs of a `prepared` network as an ONNX file; check it.

    A batch of None is left open. An `input_type` `float32` takes images normalised as in training,
    `uint8` those as read. With `half` weights and arithmetic of the network are in half precision;
    single precision stays what comes before and after it, and the types of inputs and outputs.
    """
    trace_network(ready, path, config, form, batch, input_type, opset)
    simplify(path)
    if half:
        _to_half(path)
    check(path)


def trace_network(ready: Yolact, path: str, config: Config, form: str, batch: int | None,
                  input_type: str, opset: int) -> None:
    """The first step of `write_network`: what PyTorch writes."""
    side = config.max_size
    images = torch.zeros((batch or 1, 3, side, side), dtype=getattr(torch, input_type))
    names = [output.name for output in outputs_of(config, form)]
    _write(Outputs(ready, config, form), images, path, INPUT_NAME, names, opset, batch is None)


def write_mask_iou(network: MaskIouNet, path: str, config: Config, opset: int) -> None:
    """Write the network that re-scores masks (YOLACT++): float32 `[n,1,h,w] -> [n,C-1]`."""
    masks = torch.zeros((1, 1, config.proto_size, config.proto_size))
    _write(_MaskIouOutput(network), masks, path, "masks", ["iou"], opset, True)
    check(path)


def _write(module: nn.Module, example: Tensor, path: str, input_name: str, names: list[str],
           opset: int, open_batch: bool) -> None:
    # The tracing exporter: the other one knows no opset below 18 and needs onnxscript.
    known = inspect.signature(torch.onnx.export).parameters
    more: dict[str, Any] = {name: False for name in ("dynamo", "autograd_inlining")
                            if name in known}
    axes = {name: {0: "batch"} for name in [input_name] + names} if open_batch else None
    try:
        with warnings.catch_warnings(), _nothing_printed():
            # Of the tracer, about values that are the same for every image.
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (example,), path, input_names=[input_name],
                              output_names=names, opset_version=opset, dynamic_axes=axes, **more)
    except (RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"PyTorch {torch.__version__} cannot write this network with opset {opset} "
                        f"({first_line(error)[:300]}); choose another --opset, or a newer "
                        "PyTorch") from error


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """PyTorch prints the whole network, past `sys.stdout`, before it raises."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def simplify(path: str) -> None:
    """Compute what does not depend on the image: shapes, index tables; ONNX's own operators stay.

    ONNX Runtime does so whenever it opens a file, other runtimes need not.
    """
    onnx, runtime = require("onnx"), require("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = path
    options.log_severity_level = 3
    open_onnx(path, options=options)
    model = onnx.load(path)
    used = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.save(model, path)


def _to_half(path: str) -> None:
    """Convert what stands in the network's modules (nodes `/network/MODULE/..`) to half precision.

    Before and after them everything stays as it is; so do deformable convolutions, which ONNX
    Runtime has in single precision only.
    """
    onnx, float16 = require("onnx"), require("onnxruntime.transformers.float16")
    model = onnx.load(path)
    outside = [node.name for node in model.graph.node
               if not node.name.startswith("/network/") or node.name.count("/") < 3]
    model = float16.convert_float_to_float16(
        model, keep_io_types=True, node_block_list=outside,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, "DeformConv"])
    _join_casts(model.graph)
    require("onnxruntime.transformers.onnx_model").OnnxModel.graph_topological_sort(model.graph)
    onnx.save(model, path)


def _join_casts(graph: Any) -> None:
    """Let single precision pass between nodes that have it: the converter makes it half and single
    again after each.
    """
    onnx = require("onnx")
    casts = [node for node in graph.node if node.op_type == "Cast"]
    halves, singles = ([node for node in casts if node.attribute[0].i == kind]
                       for kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT))
    source = {node.output[0]: node.input[0] for node in halves}
    for node in singles:
        if node.input[0] in source:
            node.CopyFrom(onnx.helper.make_node("Identity", [source[node.input[0]]], node.output,
                                                name=node.name))
    used = {name for node in graph.node for name in node.input}
    for node in halves:
        if node.output[0] not in used:
            graph.node.remove(node)


def check(path: str) -> None:
    """A `UserError` where ONNX's checker refuses a file."""
    checker = require("onnx").checker
    try:
        checker.check_model(path, full_check=True)
    except (checker.ValidationError, RuntimeError) as error:
        raise UserError(f"ONNX's checker refuses the exported model ({first_line(error)[:300]}); "
                        "choose another --opset, or leave it out") from error
