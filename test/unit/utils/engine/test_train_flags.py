"""The command line of train.py: every field of a recipe by flag, by --set and from a file."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from data.config import Config, field_kinds, get_config, list_configs
from helpers.config_table import table
from helpers.paths import ROOT
from utils.engine.train_flags import flagged_fields, parse_train_flags, train_parser
from utils.errors import UserError
from utils.inference.eval_flags import eval_parser

OTHER = {  # a legal value other than the default, as text and as Python has it
    "name": ("mine", "mine"), "dataset": ("pascal_sbd", "pascal_sbd"), "num_classes": ("7", 7),
    "backbone": ("resnet50", "resnet50"), "backbone_weights": ("none", "none"),
    "selected_layers": ("0,1,2", (0, 1, 2)), "dcn_layers": ("0,1,2,3", (0, 1, 2, 3)),
    "dcn_interval": ("2", 2), "max_size": ("400", 400), "pixel_mean": ("1,2,3", (1.0, 2.0, 3.0)),
    "pixel_std": ("4,5,6.5", (4.0, 5.0, 6.5)), "fpn_features": ("64", 64),
    "fpn_num_downsample": None, "head_features": ("64", 64), "proto_features": ("64", 64),
    "num_prototypes": ("16", 16),
    "pred_scales": ("8+10,16+20,32+40,64+80,128+160",
                    ((8.0, 10.0), (16.0, 20.0), (32.0, 40.0), (64.0, 80.0), (128.0, 160.0))),
    "pred_aspect_ratios": ("1,0.5", (1.0, 0.5)), "use_square_anchors": ("False", False),
    "use_maskiou": ("true", True), "positive_iou": ("0.6", 0.6), "negative_iou": ("0.3", 0.3),
    "crowd_iou": ("0.5", 0.5), "masks_to_train": ("300", 300), "bbox_alpha": ("2", 2.0),
    "conf_alpha": ("2", 2.0), "mask_alpha": ("2", 2.0), "semantic_alpha": ("0", 0.0),
    "maskiou_alpha": ("2", 2.0), "discard_mask_area": ("9", 9), "ohem_negpos_ratio": ("2", 2.0),
    "augment_photometric": ("no", False), "augment_expand": ("no", False),
    "augment_crop": ("no", False), "augment_mirror": ("no", False), "optimizer": ("adamw", "adamw"),
    "batch_size": ("4", 4), "lr": ("1e-4", 1e-4), "momentum": ("0.5", 0.5), "decay": ("0", 0.0),
    "gamma": ("0.5", 0.5), "schedule": ("cosine", "cosine"), "lr_steps": ("10,20", (10, 20)),
    "lr_warmup_init": ("0", 0.0), "lr_warmup_until": ("7", 7), "lr_final_factor": ("0.1", 0.1),
    "max_iter": ("99", 99), "clip_grad_norm": ("10", 10.0), "nms_conf_thresh": ("0.1", 0.1),
    "nms_thresh": ("0.6", 0.6), "nms_top_k": ("300", 300), "max_num_detections": ("50", 50),
    "ema_decay": ("0.99", 0.99), "early_stopping": ("3", 3), "freeze": ("backbone", "backbone"),
    "class_weights": ("cat=2,dog=0.5", (("cat", 2.0), ("dog", 0.5))),
    "multi_scale": ("448,550", (448, 550)), "multi_scale_interval": ("5", 5),
    "epochs": ("7", 7), "augment_rotate": ("yes", True),
}
LEVELS = ["--set=fpn_num_downsample=0", "--set=pred_scales=24,48,96"]
"""One field decides how many levels another one has."""


def recipe(*flags):
    return parse_train_flags(["--validation_epoch=1"] + list(flags)).recipe


def expected(name):
    return get_config("yolact_base").replace(**{name: OTHER[name][1]})


def test_the_list_above_is_whole():
    assert list(OTHER) == list(field_kinds())
    base = get_config("yolact_base")
    assert not [name for name in OTHER if OTHER[name] and OTHER[name][1] == getattr(base, name)]


@pytest.mark.parametrize("name", [name for name in OTHER if OTHER[name]])
def test_every_field_is_set_on_the_command_line_and_from_a_file(name, tmp_path):
    text, value = OTHER[name]
    assert recipe(f"--set={name}={text}") == recipe("--set", f"{name}={text}") == expected(name)
    if name in flagged_fields():
        flag = Config.__dataclass_fields__[name].metadata["flags"][-1]
        assert recipe(f"{flag}={text}") == expected(name)
    path = tmp_path / "recipe.yaml"
    for stored in (text, json.loads(json.dumps(value))):
        path.write_text(yaml.safe_dump({"config": "yolact_base", "set": {name: stored}}))
        assert recipe(f"--config={path}") == expected(name)


def test_fields_that_belong_together_change_together(tmp_path):
    assert recipe(*LEVELS).feature_sizes == (69, 35, 18)
    with pytest.raises(UserError, match="for each of the 3 pyramid levels"):
        recipe(LEVELS[0])


def test_lists_in_brackets_mean_the_same():
    assert recipe("--set=lr_steps=[7, 9]").lr_steps == (7, 9)
    assert recipe("--set=fpn_num_downsample=0", "--set=pred_scales=[[24], [48.5], [96]]") == recipe(
        *LEVELS[:1], "--set=pred_scales=24,48.5,96")


def test_the_command_line_wins_over_the_file_and_flags_over_set(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("config: yolact_resnet50\nset: {lr: 0.5, decay: 0.25}\n"
                    "flags: {num_workers: 7, accumulate: 3}\n")
    args = parse_train_flags([f"--config={path}", "--set=lr=0.125", "--decay=0", "--accumulate=2"])
    assert args.recipe == get_config("yolact_resnet50", lr=0.125, decay=0.0)
    assert (args.num_workers, args.accumulate) == (7, 2)


def test_a_run_folder_is_rerun(tmp_path):
    config = get_config("yolact_shapes", lr=0.125)
    (tmp_path / "config.yaml").write_text(
        "{format: 2, id: x, program: train.py, config: yolact_shapes, set: {lr: 0.125}, "
        "flags: {seed: 5, fused_optimizer: false}}")
    assert parse_train_flags([f"--config={tmp_path / 'config.yaml'}"]).seed == 5
    args = parse_train_flags([f"--rerun={tmp_path}", "--max_iter=7"])
    assert args.recipe == config.replace(max_iter=7) and args.seed == 5
    assert parse_train_flags([f"--rerun={tmp_path}", "--config=yolact_base"]).recipe.name == (
        "yolact_base")


@pytest.mark.parametrize("word", ["", "None", "False"])
def test_nothing_to_resume(word):
    assert parse_train_flags([f"--resume={word}"]).resume is None


def test_resume_as_a_switch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("--resume", "--resume=True"):
        with pytest.raises(UserError, match="no unfinished training in"):
            parse_train_flags([word])


@pytest.mark.parametrize("flags, sentence", [
    (["--set=max_sise=400"], "has no field 'max_sise'; did you mean 'max_size'?"),
    (["--set=max_size"], "expected field=value, such as max_size=400"),
    (["--set=max_size=big"], "--set max_size is 'big', expected a whole number above 0"),
    (["--set=max_size=-5"], "--set max_size is '-5', expected a whole number above 0"),
    (["--set=use_maskiou=2"], "expected True or False"),
    (["--set=pixel_std=1,2"], "a list of 3 items"),
    (["--set=pixel_std=[1,2]"], "a list of 3 items"), (["--set=pixel_std=[1"], "not JSON"),
    (["--set=optimizer=sdg"], "did you mean 'sgd'?"),
    (["--set=max_size=-5", "--max_size=138"], "--set max_size is '-5', expected a whole number"),
    (["--config=absent.yaml"], "cannot read 'absent.yaml'"),
    (["--rerun=absent"], "no run folder of train.py (looked for"),
])
def test_mistakes_are_one_sentence(flags, sentence):
    with pytest.raises(UserError) as caught:
        recipe(*flags)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text, sentence", [
    ("[1, 2]", "is no mapping"), ("conifg: yolact_base", "did you mean 'config'?"),
    ("config: [1]", "needs the name of a recipe"), ("set: 5", "needs the name of a recipe"),
    ("config: yolact_bas", "did you mean 'yolact_base'?"), ("flags: 3", "is no mapping"),
    ("set: {lr: fast}", "--set lr is 'fast'"), ("set: {lr: -1}", "lr is -1"), ("a: [", "a: ["),
    ("set: {lr_steps: &a [*a]}", "&a holds itself, line 1"),
])
def test_mistakes_in_a_file_are_one_sentence(text, sentence, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        recipe(f"--config={path}")
    assert sentence in str(caught.value) or str(path) in str(caught.value)


@pytest.mark.parametrize("text, sentence", [
    ("num_worker: 3", "has 'num_worker' under flags; did you mean 'num_workers'?"),
    ("lr: 3", "has 'lr' under flags; fields of the recipe go under set"),
    ("resume: latest", "has 'resume' under flags"), ("5: 6", "has 5 under flags, which is no flag"),
])
def test_flags_of_a_file_that_do_not_exist_are_one_sentence(text, sentence, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("flags: {" + text + "}")
    with pytest.raises(UserError) as caught:
        recipe(f"--config={path}")
    assert str(path) in str(caught.value) and sentence in str(caught.value)


def test_flags_of_a_file_have_the_names_and_limits_of_the_command_line(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("flags: {workers: 3, quiet: true, useDDP: yes, track: null}")
    args = parse_train_flags([f"--config={path}"])
    assert (args.num_workers, args.quiet, args.use_ddp, args.track) == (3, True, True, None)
    for text, sentence in (("workers: -3", "--num_workers is '-3', expected a whole number"),
                           ("track: paper", "--track is 'paper', expected one of")):
        path.write_text("flags: {" + text + "}")
        with pytest.raises(SystemExit):
            parse_train_flags([f"--config={path}"])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("build", [train_parser, eval_parser])
def test_every_flag_has_a_sentence_and_its_default(build):
    parser = build()
    for action in parser._actions:
        assert action.help, action.option_strings
    text = " ".join(parser.format_help().split())
    flags = text.split("show this help message and exit ", 1)[1].split(" --")
    of_flags = " ".join(flags)
    assert of_flags.count("default") >= len(parser._actions) - 1
    for action in parser._actions[1:]:
        assert "default" in parser._get_formatter()._get_help_string(action)
    assert all(name in text for name in ("npu:0", "default: auto"))


def test_a_number_of_images_that_is_none(capsys):
    assert eval_parser().parse_args(["--max_images=-1"]).max_images == -1
    with pytest.raises(SystemExit):
        eval_parser().parse_args(["--max_images=-5"])
    assert "--max_images is '-5', expected a whole number from -1" in capsys.readouterr().err


def test_help_lists_the_recipes_and_what_can_be_scored():
    text = " ".join(train_parser().format_help().split())
    assert f"one of {', '.join(list_configs())};" in text
    assert "(default: the recipe's; yolact_base: 550)" in text
    assert ".onnx" in eval_parser().format_help()


def test_a_length_in_epochs_replaces_that_in_iterations(tmp_path):
    assert recipe("--epochs=7") == get_config("yolact_base", epochs=7)
    for flags in (["--epochs=7", "--max_iter=9"], ["--set=epochs=7", "--max_iter=9"]):
        with pytest.raises(UserError, match="--epochs=7 and --max_iter=9 are both the length"):
            recipe(*flags)
    (tmp_path / "config.yaml").write_text("config: yolact_resnet50\nset: {epochs: 7, max_iter: 9}")
    again = f"--rerun={tmp_path}"
    assert (recipe(again).epochs, recipe(again, "--epochs=3").epochs) == (7, 3)
    assert (recipe(again, "--max_iter=5").epochs, recipe(again, "--max_iter=5").max_iter) == (0, 5)


def test_two_different_cards_are_refused():
    with pytest.raises(UserError, match="--device=cuda:1 is card 1, --device_id=0 another"):
        recipe("--device=cuda:1", "--device_id=0")
    assert parse_train_flags(["--device=cuda:1", "--device_id=1"]).device_id == 1


def test_the_table_of_the_documentation_is_that_of_the_declarations():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert table() in page, "run python test/helpers/config_table.py"


def test_every_field_is_declared():
    for field in dataclasses.fields(Config):
        assert field.metadata["help"] and not field.metadata["help"].endswith("."), field.name
