from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.config import get_config
from yolact import build_yolact

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "state_dict_keys.json"


@pytest.mark.parametrize("name", ["yolact_base", "yolact_im400", "yolact_im700",
                                  "yolact_darknet53", "yolact_resnet50",
                                  "yolact_resnet50_pascal", "yolact_plus_base",
                                  "yolact_plus_resnet50"])
def test_keys_order_and_shapes_are_the_originals(name):
    expected = json.loads(GOLDEN.read_text())[name]
    network = build_yolact(get_config(name))
    state = network.state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == list(
        (k, v) for k, v in expected["keys"].items())
    assert len(state) == expected["num_keys"]
    assert sum(p.numel() for p in network.parameters()) == expected["num_params"]
