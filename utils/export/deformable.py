"""YOLACT++ for ATC, which has no parser for ONNX's `DeformConv`: ModelZoo's form of the network.

There a deformable convolution is a node `DeformableConv2D` of x, weight, offsets and bias. The
offsets `[B, 3T, h, w]` hold x of each of the T taps, then y of each, then the factors. No runtime
but Ascend's knows the operator, so a file is checked in two parts: its nodes, and all the rest.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from data.config import Config
from layers.deform_conv import DeformConv2d, modulated_deform_conv2d
from utils.export import graph
from utils.export.check import TOLERANCE, compare, keep_worst, of_images, refuse_apart, relative
from utils.exported import prepare, require
from yolact import Yolact, for_inference

OPERATOR = "DeformableConv2D"


def _convolve(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor, stride: int,
              padding: int) -> Tensor:
    """What a node computes."""
    right, down, factors = offsets.chunk(3, 1)
    return modulated_deform_conv2d(x, torch.stack((down, right), 2).flatten(1, 2), factors, weight,
                                   bias, stride, padding)


class _Node(torch.autograd.Function):
    """One node; ATC's parser (deformable_conv2d_plugin.cc) takes two strides and two pads."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        return _convolve(*given)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, offsets: Any, bias: Any, stride: int,
                 padding: int) -> Any:
        """Attributes are spelt as in ModelZoo's files."""
        return g.op(OPERATOR, x, weight, offsets, bias, strides_i=[stride] * 2,
                    pads_i=[padding] * 2, dilations_i=[1, 1], groups_i=1, defomable_groups_i=1)


class _DeformConv(DeformConv2d):
    """A deformable convolution that becomes one node; keeps its last result."""

    def forward(self, x: Tensor) -> Tensor:
        places, logits = self.conv_offset_mask(x).split([2 * self.taps, self.taps], 1)
        offsets = torch.cat((places, torch.sigmoid(logits)), 1)
        result: Tensor = _Node.apply(x, self.weight, offsets, self.bias, self.stride, self.padding)
        self.result = result.clone()  # what follows works in place
        return result


class _Cut:
    """An ONNX file whose deformable nodes are taken out, and put back.

    What is left has ONNX's own operators alone: what the nodes gave comes in, what they took goes
    out.
    """

    def __init__(self, path: str) -> None:
        self.path, self._onnx = path, require("onnx")
        model = self._onnx.load(path)
        self.nodes = [node for node in model.graph.node if node.op_type == OPERATOR]
        self.outputs = [output.name for output in model.graph.output]
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer
                        if any(tensor.name in node.input for node in self.nodes)}

    def take_out(self, results: list[Tensor]) -> None:
        """Write the file without its nodes; `results` are examples of what they give."""
        model, of = self._onnx.load(self.path), self._onnx.helper.make_tensor_value_info
        for node, result in zip(self.nodes, results):
            model.graph.node.remove(node)
            kind = self._onnx.TensorProto.FLOAT
            model.graph.input.append(of(node.output[0], kind, result.shape))
            model.graph.output.extend(of(node.input[n], kind, None) for n in (0, 2))
        self._onnx.save(model, self.path)

    def put_back(self) -> None:
        """Write the file with its nodes."""
        model = self._onnx.load(self.path)
        del model.graph.input[1:], model.graph.output[len(self.outputs):]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.weights.values())
        require("onnxruntime.transformers.onnx_model").OnnxModel.graph_topological_sort(
            model.graph)
        self._onnx.save(model, self.path)

    def run(self, images: np.ndarray, results: list[Tensor]) -> dict[str, Tensor]:
        """Outputs by name of the file without its nodes, and under the nodes' names what they give
        for what they take in it.
        """
        session = require("onnxruntime").InferenceSession(self.path,
                                                          providers=["CPUExecutionProvider"])
        given = {node.output[0]: result.numpy() for node, result in zip(self.nodes, results)}
        names = [output.name for output in session.get_outputs()]
        found = {name: torch.from_numpy(values) for name, values in zip(
            names, session.run(names, dict(given, **{graph.INPUT_NAME: images})))}
        for node in self.nodes:
            weight, bias = (torch.from_numpy(np.array(self._onnx.numpy_helper.to_array(
                self.weights[node.input[n]]))) for n in (1, 3))
            size = {attribute.name: list(attribute.ints) for attribute in node.attribute}
            found[node.output[0]] = _convolve(found[node.input[0]], weight, found[node.input[2]],
                                              bias, size["strides"][0], size["pads"][0])
        return found


def _prepared(network: Yolact) -> tuple[Yolact, list[_DeformConv]]:
    """A copy for export, and its deformable convolutions in the order in which they run."""
    ready = for_inference(network)
    convolutions = []
    for module in ready.modules():
        if isinstance(module, DeformConv2d):
            module.__class__ = _DeformConv
            convolutions.append(cast(_DeformConv, module))
            channels = torch.arange(3 * module.taps)
            order = torch.cat((channels[1:2 * module.taps:2], channels[0:2 * module.taps:2],
                               channels[2 * module.taps:]))
            for parameter in module.conv_offset_mask.parameters():
                parameter.copy_(parameter[order])
    return ready, convolutions


@torch.no_grad()
def write_for_atc(network: Yolact, path: str, config: Config, form: str, batch: int,
                  planes: np.ndarray) -> None:
    """Write a network with deformable convolutions as ATC takes it, and check the file.

    Its input is float32, normalised as in training; opset 11. `batch` are the images that the model
    takes, `planes` uint8 images `[n, 3, S, S]` RGB for the check.

    Raises:
        UserError: the file differs from the network.
    """
    ready, convolutions = _prepared(network)
    graph.trace_network(ready, path, config, form, batch, "float32", graph.DEFAULT_OPSET)
    ready(torch.from_numpy(planes))
    predictions = network.eval()(torch.from_numpy(planes))
    cut = _Cut(path)
    cut.take_out([convolution.result[:1].expand(batch, -1, -1, -1)
                  for convolution in convolutions])
    graph.simplify(path)
    graph.check(path)

    apart: dict[str, float] = {}
    for start in range(0, len(planes), batch):
        index = np.arange(start, start + batch) % len(planes)
        images = prepare(planes[index], {"layout": "NCHW", "type": "float32",
                                         "mean": config.pixel_mean, "std": config.pixel_std})
        results = [convolution.result[index] for convolution in convolutions]
        found = cut.run(images, results)
        keep_worst(apart, {OPERATOR: max(relative(result, found[node.output[0]])
                                         for node, result in zip(cut.nodes, results))})
        keep_worst(apart, compare(of_images(predictions, index),
                                  {name: found[name] for name in cut.outputs}, config))
    refuse_apart(apart, TOLERANCE)
    cut.put_back()
