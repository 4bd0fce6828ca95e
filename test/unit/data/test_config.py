"""Recipes; and configurations from a file are complete, of the right types and in range."""

from __future__ import annotations

import pytest

from data.config import Config, get_config, list_configs
from utils.errors import UserError

NEW_FIELDS = ("ema_decay", "early_stopping", "freeze", "class_weights", "multi_scale",
              "multi_scale_interval")


def stored(**changes):
    return dict(get_config("yolact_shapes").to_dict(), **changes)


@pytest.mark.parametrize("name", list_configs())
def test_a_stored_recipe_comes_back_equal(name):
    config = get_config(name)
    assert Config.from_dict(config.to_dict()) == config


def test_the_training_options_come_back_equal():
    config = get_config("yolact_base", ema_decay=0.999, early_stopping=3, freeze="2",
                        class_weights={"cat": 2, "dog": 0.5}, multi_scale=[416, 550])
    assert Config.from_dict(config.to_dict()) == config
    assert config.class_weights == (("cat", 2), ("dog", 0.5)) and hash(config)


def test_a_checkpoint_of_an_earlier_version_means_the_defaults():
    old = {key: value for key, value in stored().items() if key not in NEW_FIELDS}
    assert Config.from_dict(old) == get_config("yolact_shapes")


def test_all_training_options_are_off():
    config = get_config("yolact_base")
    assert [getattr(config, field) for field in NEW_FIELDS[:-1]] == [0, 0, "none", (), ()]


@pytest.mark.parametrize("field", ["lr", "num_classes", "backbone", "nms_top_k"])
def test_a_missing_field_is_not_filled_in(field):
    values = stored()
    del values[field]
    with pytest.raises(UserError, match=f"'yolact_shapes' has no '{field}'"):
        Config.from_dict(values)


def test_a_field_of_a_newer_version_is_named():
    with pytest.raises(UserError, match="'lookahead' that is not known here; a newer version"):
        Config.from_dict(stored(lookahead=5))


@pytest.mark.parametrize("field, value, expected", [
    ("lr", "fast", "a finite number"), ("lr", float("nan"), "a finite number"),
    ("lr", True, "a finite number"), ("lr", None, "a finite number"), ("lr", 0, "above 0"),
    ("batch_size", 2.5, "a whole number"), ("batch_size", -1, "above 0"),
    ("use_maskiou", 1, "True or False"), ("optimizer", 3, "a text"),
    ("optimizer", "sdg", "did you mean 'sgd'"), ("name", "../../etc", "part of a file name"),
    ("pixel_std", (1, 2), "a list of 3 items"), ("pixel_std", (1, 0, 1), "above 0"),
    ("lr_steps", 7, "a list, each item a whole number"), ("lr_steps", (9, 3), "ascending"),
    ("pred_scales", ((1, "2"),), "each item a list, each item a finite number"),
    ("momentum", -0.1, "0 or more"), ("nms_thresh", 1.5, "from 0 to 1"),
    ("negative_iou", 0.6, "at most positive_iou, which is 0.5"),
    ("max_num_detections", 201, "at most nms_top_k, which is 200"),
    ("nms_top_k", 10 ** 9, "a whole number from 1 to 10000"),
    ("ema_decay", 1.0, "below 1"), ("ema_decay", -0.1, "below 1"),
    ("early_stopping", -1, "0 or more"),
    ("freeze", "5", "1 to 4"), ("freeze", "head", "'backbone'"), ("freeze", 2, "a text"),
    ("class_weights", "balance", "'balanced'"), ("class_weights", {"cat": 0}, "above 0"),
    ("class_weights", ["cat"], "a text or a list"),
])
def test_an_odd_value_is_one_sentence(field, value, expected):
    with pytest.raises(UserError) as caught:
        Config.from_dict(stored(**{field: value}))
    assert field in str(caught.value) or field == "name"
    assert expected in str(caught.value)


def test_a_damaged_file_without_a_name():
    with pytest.raises(UserError, match="no 'name'"):
        Config.from_dict({"lr": 1.0})
