"""What stands in an exported graph: operators, shapes, folded normalisation, deformable nodes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from backbone import BatchNorm2d
from helpers.deterministic import load_deterministic_weights, small_config, small_plus_config
from helpers.exports import export, require_onnx
from helpers.prediction_weights import save_weights
from utils.export.graph import INPUT_NAME, Outputs, prepared, write_network
from yolact import build_yolact

onnx, onnxruntime = require_onnx()
pytestmark = pytest.mark.skipif(int(torch.__version__.split(".")[0]) < 2,
                                reason="exports are made with current PyTorch")

RAW = {"Add", "Concat", "Conv", "MaxPool", "Relu", "Reshape", "Resize", "Softmax", "Split", "Tanh",
       "Transpose"}
"""ATC takes each at opset 11: its parser (Ascend/canndev, ops/built-in/framework/onnx_plugin)
registers Add, Relu and Tanh in similar_opp_plugins.cc and the others in files of their own."""
DARKNET = {"LeakyRelu"}  # leakyrelu_plugin.cc there
UINT8 = {"Cast", "Div", "Sub"}  # cast_plugin.cc, similar_opp_plugins.cc
DETECTIONS = {"Abs", "And", "Clip", "Div", "Exp", "Expand", "Gather", "GatherElements", "Greater",
              "Less", "Max", "Min", "Mul", "Not", "Pad", "ReduceMax", "ReduceSum", "Slice", "Sub",
              "TopK", "Unsqueeze", "Where", "Cast"}
"""ONNX's own. Not all of these have been looked up among those that ATC takes."""


def operators(path):
    model = onnx.load(str(path))
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    return Counter(node.op_type for node in model.graph.node), model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


def test_operators_of_raw(weights, tmp_path):
    found, model = operators(export(weights, tmp_path / "float") + "/model.onnx")
    assert set(found) <= RAW
    assert model.opset_import[0].version == 11
    found, _ = operators(export(weights, tmp_path / "uint8", "--input=uint8") + "/model.onnx")
    assert UINT8 <= set(found) <= RAW | UINT8


def test_operators_of_detections_have_static_shapes(weights, tmp_path):
    folder = export(weights, tmp_path / "out", "--outputs=detections", "--batch_size=2")
    found, model = operators(folder + "/model.onnx")
    assert set(found) <= RAW | DETECTIONS
    # Every value has a shape that is known without an image.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {value.name: value.type.tensor_type.shape for value in
              [*inferred.value_info, *inferred.input, *inferred.output]}
    for node in inferred.node:
        for name in node.output:
            assert all(size.dim_value > 0 for size in shapes[name].dim), (node.op_type, name)


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_darknet53"])
def test_normalisation_is_folded(name):
    config = small_config(name)
    network = load_deterministic_weights(build_yolact(config)).eval()
    ready = prepared(network)
    assert not [module for module in ready.modules() if isinstance(module, BatchNorm2d)]
    assert any(isinstance(module, BatchNorm2d) for module in network.modules())
    images = torch.randn(1, 3, 138, 138)
    with torch.no_grad():
        for one, other in zip(*(Outputs(part, config, "raw")(images)
                                for part in (ready, network))):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_operators_of_other_recipes(tmp_path):
    for name, config, opset, expected in (
            ("darknet", small_config("yolact_darknet53"), 11, RAW - {"MaxPool"} | DARKNET),
            ("plus", small_plus_config("yolact_plus_resnet50"), 19,
             RAW | {"DeformConv", "Sigmoid"})):
        network = load_deterministic_weights(build_yolact(config)).eval()
        path = str(tmp_path / (name + ".onnx"))
        write_network(prepared(network), path, config, "raw", 1, "float32", opset,
                      False)
        found, _ = operators(path)
        assert set(found) == expected
    assert found["DeformConv"] == 13


def test_the_image_is_normalised_as_in_training(tmp_path):
    config = small_config("yolact_resnet50")
    network = load_deterministic_weights(build_yolact(config)).eval()
    images = np.random.RandomState(0).randint(0, 256, (1, 3, 138, 138)).astype(np.uint8)
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1)
                 for values in (config.pixel_mean, config.pixel_std))
    inputs = {"uint8": images, "float32": (images - mean) / std}
    found = {}
    for kind, values in inputs.items():
        path = str(tmp_path / (kind + ".onnx"))
        write_network(prepared(network), path, config, "raw", 1, kind, 11, False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found[kind] = session.run(None, {INPUT_NAME: values})
    for one, other in zip(found["uint8"], found["float32"]):
        np.testing.assert_allclose(one, other, atol=1e-4)
