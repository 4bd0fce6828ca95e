"""Anchors and boxes: how many fit, and which would fit better."""

from __future__ import annotations

import numpy as np
import pytest

from data.config import get_config
from data.config_fields import as_text
from data.config_file import parse_setting
from data.tools.findings import anchor_shapes, fitted_scales, shape_recall
from utils.cli import run_main
from utils.engine.train_flags import parse_train_flags


def test_anchor_shapes_are_the_priors_of_the_recipe():
    from layers.anchors import make_priors

    for name in ("yolact_base", "yolact_resnet50_pascal", "yolact_shapes", "yolact_plus_base"):
        config = get_config(name)
        shapes = anchor_shapes(config.pred_scales, config)
        priors = make_priors(config).numpy()[:, 2:] * config.max_size
        assert np.allclose(np.unique(priors.round(2), axis=0), np.unique(shapes.round(2), axis=0),
                           atol=0.02)


def test_recall_and_fitted_anchors():
    boxes, anchors = np.array([[10.0, 20.0]]), np.array([[10.0, 10.0], [20.0, 20.0]])
    assert shape_recall(boxes, anchors) == 1 and shape_recall(boxes, anchors[:1] * 0.99) == 0
    sides = np.concatenate([np.full(50, side) for side in (7.0, 30.0, 100.0)])
    boxes = np.column_stack([sides, sides]) * np.linspace(0.95, 1.05, 150)[:, None]
    fitted = fitted_scales(boxes, ((1,), (2,), (3,)))
    assert np.allclose([level[0] for level in fitted], [7, 30, 100], rtol=0.1)
    config = get_config("yolact_base", pred_aspect_ratios=[1])
    assert shape_recall(boxes, anchor_shapes(fitted, config)) == 1
    assert shape_recall(boxes, anchor_shapes(((30,),), config)) == pytest.approx(1 / 3)
    assert parse_setting("pred_scales=" + as_text(((20, 30.5), (42, 60))))[1] == (
        (20, 30.5), (42, 60))


@pytest.mark.parametrize("text,expected", [
    ("20,", "all of the same length"), ("a", "such as 24,48,96 or 20+30,42+60"),
    ("20,-3,4,5,6", "sides and aspect ratios above 0"), ("nan", "such as 24,48,96"),
    ("20+30,4,5,6,7", "all of the same length"),
])
def test_mistakes_in_anchor_sides(capsys, text, expected):
    assert run_main(parse_train_flags, ["--pred_scales=" + text]) == 2
    assert expected in capsys.readouterr().err
