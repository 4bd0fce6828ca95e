"""Command line of train.py: the flags of the existing Ascend port under the same names.

Flags of the recipe are those that the fields of `data.config.Config` declare; the others are here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any, Mapping, Sequence

from data.config import Config, field_kinds, list_configs
from data.config_fields import LIMITS, as_text, expected_value, parse, value_problem
from data.config_file import parse_setting, read_recipe
from utils.cli import (
    ArgumentParser,
    Bounded,
    add_device_flags,
    add_npu_modes,
    add_switch,
    foreign_words,
    refuse_two_cards,
)
from utils.engine.trackers import TRACKERS
from utils.errors import UserError, counted, nearest
from utils.parsing import whole_number

AUTO = "auto"
UNFINISHED = "unfinished"
"""What --resume alone means."""


class BatchSize(Bounded):
    """Type of --batch_size: `auto`, or a whole number."""

    def __init__(self) -> None:
        super().__init__(int, 1)
        self.expected += ", or auto"

    def __call__(self, text: str) -> Any:
        return AUTO if text.strip().lower() == AUTO else super().__call__(text)


class FieldValue:
    """Type of a flag that sets a field of the configuration."""

    def __init__(self, kind: Any, declared: Mapping[str, Any]) -> None:
        self._kind, self._declared = kind, declared
        limit = LIMITS.get(kind, "") if declared["at_most"] is None else ""
        self.expected = expected_value(kind, declared) + limit

    def __call__(self, text: str) -> Any:
        """Read the text; choices are left to the configuration, which names the nearest."""
        value = parse(text, self._kind)
        if not self._declared["choices"] and value_problem(value, self._kind, self._declared):
            raise ValueError(text)
        return value


def train_parser() -> ArgumentParser:
    """Parser of train.py; a flag of the recipe that is left out is None."""
    fields = {name: f"it is a field of the recipe: --set {name}=VALUE" for name in field_kinds()
              if name not in flagged_fields()}
    same, instead = foreign_words("train")
    parser = ArgumentParser(prog="train.py", description="Train YOLACT on a COCO-format dataset.",
                            same=same, instead={**fields, **instead})
    _add_data(parser)
    _add_recipe_and_steps(parser)
    _add_checkpoints(parser)
    _add_device(parser)
    _add_records(parser)
    return parser


def parse_train_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    A file given with --config, or a run folder with --rerun, sets defaults: flags and changes to a
    recipe. Of what is given more than once, the command line's own flag wins, then --set, then the
    file.

    Returns:
        The flags, with `recipe`, the `Config` that they ask for, and `command_line`.

    Raises:
        UserError: a file that is none, a field that does not exist, a value out of its range.
    """
    # Not above: what reads files takes seconds to import, and --help needs none of it.
    from data.datasets import default_root, layout_name
    from utils.weights_folder import run_to_resume

    parser = train_parser()
    args = parser.parse_args(argv)
    resume = args.resume
    if resume == UNFINISHED or os.path.isdir(resume or ""):
        args.rerun, resume = run_to_resume("" if resume == UNFINISHED else resume,
                                           args.save_folder)
    rerun = args.rerun
    file = _file_of_run(rerun) if rerun else args.config
    config, flags, recorded = read_recipe(file)
    args = parser.parse_args(_words_of(flags, parser, "" if recorded else file) + list(argv))
    args.resume, args.rerun = resume, rerun
    if args.rerun and any(word.split("=", 1)[0] == "--config" for word in argv):
        config = read_recipe(args.config)[0]
    changes = dict(map(parse_setting, args.settings))
    changes.update((name, getattr(args, name)) for name in flagged_fields()
                   if getattr(args, name) is not None)
    if "dataset" in changes:
        changes["dataset"] = layout_name(changes["dataset"])
    if "max_iter" in changes and changes.setdefault("epochs", 0):
        raise UserError(f"--epochs={changes['epochs']} and --max_iter={changes['max_iter']} are "
                        "both the length of the training; give one of them")
    refuse_two_cards(args.node_device, args.device_id)
    args.recipe = config.replace(**changes)
    if args.data is None and args.train_images is None:
        args.data = default_root(args.recipe.dataset)
    if args.recipe.early_stopping and args.validation_epoch in (0, -1):
        raise UserError(f"--early_stopping={args.recipe.early_stopping} counts validations, and "
                        "there are none; give --validation_epoch=1 to validate after every epoch")
    args.command_line = ["python", "train.py"] + list(argv)
    return args


def _words_of(flags: Mapping[str, Any], parser: ArgumentParser, file: str) -> list[str]:
    """Flags of a file as a command line has them; names that nothing here has are an error in a
    `file` that somebody wrote, and left out where a run recorded them (`file` is empty).
    """
    names = {name: action.option_strings[0] for action in parser._actions
             for name in (action.dest, *(word[2:] for word in action.option_strings))
             if action.dest not in ("help", "config", "rerun", "resume", *flagged_fields())}
    words = []
    for key, value in flags.items():
        if file and key not in names:
            known = "; fields of the recipe go under set" if key in field_kinds() else (
                nearest(str(key), names) or ", which is no flag that it can give")
            raise UserError(f"--config: '{file}' has {key!r} under flags{known}")
        if key in names and value is not None:
            words += [f"{names[key]}={each}" for each in (
                value if isinstance(value, list) else [value])]
    return words


def _or_none(text: str) -> str | None:
    """ModelZoo's scripts pass an empty --resume where there is nothing to resume, others True."""
    return {"": None, "none": None, "false": None, "true": UNFINISHED}.get(text.lower(), text)


def flagged_fields() -> list[str]:
    """Fields of a `Config` that have a flag."""
    return [field.name for field in dataclasses.fields(Config) if field.metadata["flags"]]


def _file_of_run(place: str) -> str:
    """The configuration in a run folder, or the file itself."""
    path = place if os.path.isfile(place) else os.path.join(place, "config.yaml")
    if not os.path.isfile(path):
        raise UserError(f"'{place}' is no run folder of train.py (looked for '{path}'); "
                        "--rerun and --resume read the flags of a training there")
    return path


def images_per_card(args: argparse.Namespace, default: int, cards: int) -> int:
    """Batch size of each card, from --batch_alloc, --batch_size in numbers, or `default`."""
    if args.batch_alloc is None:
        return args.batch_size or default
    sizes = args.batch_alloc.split(",")
    size = whole_number(sizes[0])
    if len(sizes) != cards or len(set(sizes)) != 1 or not size:
        raise UserError(f"--batch_alloc is '{args.batch_alloc}', expected the same whole number "
                        f"for each of {counted(cards, 'card')}, separated by "
                        "commas: shapes are static and cards wait for each other")
    return size


def _add_data(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", "--data_path", default=None, metavar="FOLDER|YAML",
                       help="root of the dataset: COCO's layout, a YOLO, labelme, VOC or Roboflow "
                            "folder, or images with masks; or a file that names images and "
                            "annotations (docs/data.md; default: data/coco, if it is there)")
    group.add_argument("--train_images", default=None, metavar="FOLDER",
                       help="training images, where they do not lie in a known layout")
    group.add_argument("--train_info", default=None, metavar="JSON",
                       help="COCO annotations of --train_images")
    group.add_argument("--valid_images", default=None, metavar="FOLDER",
                       help="validation images, where they do not lie in a known layout")
    group.add_argument("--valid_info", default=None, metavar="JSON",
                       help="COCO annotations of --valid_images")
    add_switch(group, "--strict",
               help="stop where annotations are unusable instead of dropping them, and at whatever "
                    "else the data check finds")
    group.add_argument("--num_workers", "--workers", type=Bounded(int, 0), default=2, metavar="N",
                       help="loader processes per card; 0 loads in the training process")


def _add_recipe_and_steps(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("recipe (docs/training.md lists all fields)")
    group.add_argument("--config", default="yolact_base", metavar="NAME|FILE.yaml",
                       help=f"one of {', '.join(list_configs())}; or a file with a recipe's name "
                            "and changes, such as config.yaml of a run folder")
    group.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE",
                       help="change a field of the recipe, e.g. --set nms_thresh=0.6; repeatable")
    kinds = field_kinds()
    for field in dataclasses.fields(Config):
        declared = field.metadata
        if declared["flags"]:
            alone: dict[str, Any] = {} if declared["flag_alone"] is None else {
                "nargs": "?", "const": declared["flag_alone"]}
            group.add_argument(*declared["flags"], dest=field.name, default=None,
                               type=FieldValue(kinds[field.name], declared),
                               metavar=declared["metavar"], help=f"{declared['help']} (default: "
                               f"the recipe's; yolact_base: {as_text(field.default)})", **alone)

    group = parser.add_argument_group("steps")
    group.add_argument("--batch_size", "--batch", type=BatchSize(), default=None,
                       metavar="N|auto", help="images per card and step; auto takes as many as fit "
                       "into its memory (default: the recipe's batch_size)")
    group.add_argument("--batch_alloc", default=None, metavar="N,N,..",
                       help="images per step of each card; the same number for every card")
    group.add_argument("--accumulate", type=Bounded(int, 1), default=1, metavar="N",
                       help="batches whose gradients make up one step")
    add_switch(group, "--sync_bn", help="batch norm over the images of all cards")
    add_switch(group, "--no_autoscale",
               help="do not scale learning rate and iterations by batch size x cards")
    group.add_argument("--seed", type=Bounded(int, 0), default=0,
                       help="of weights, order and augmentation")


def _add_checkpoints(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--save_folder", default="weights/", help="where weights files are written")
    group.add_argument("--save_interval", type=Bounded(int, 1), default=2000,
                       help="iterations between files that stay; in between there is one on the "
                            "way, of the last validation or at most ten minutes ago")
    add_switch(group, "--keep_latest",
               help="keep the newest file only (and every --keep_latest_interval); files of later "
                    "iterations stay")
    group.add_argument("--keep_latest_interval", type=Bounded(int, 1), default=100000,
                       help="iterations whose files stay all the same")
    group.add_argument("--resume", default=None, nargs="?", const=UNFINISHED, type=_or_none,
                       metavar="FILE|RUN FOLDER|latest|interrupt",
                       help="go on from a checkpoint; with its .state beside it, exactly. Alone: "
                            "the newest training in --save_folder that is not at its end, with its "
                            "data, recipe and flags; so, too, with a run folder. Flags that are "
                            "given win")
    group.add_argument("--weights", "--trained_model", default=None, metavar="FILE",
                       help="start a new training from the weights of a whole network, also one "
                            "of other classes; no backbone file is needed then")
    group.add_argument("--start_iter", type=int, default=-1,
                       help="iteration to start at where --resume finds weights only")
    add_switch(group, "--no_interrupt", help="do not save when the run is interrupted")


def _add_device(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    add_device_flags(group, "--node_device")
    group.add_argument("--opt_level", default="O0", metavar="O0|O1|O2",
                       help="precision: O0 float32; O1 convolutions in half precision, parameters "
                            "in float32; O2 parameters in half precision too (docs/ascend.md)")
    group.add_argument("--loss_scale", default=None, metavar="dynamic|NUMBER",
                       help="factor on the loss that keeps small gradients; default: dynamic for "
                            "float16, none for bfloat16")
    add_switch(group, "--fused_loss",
               help="cross entropy of the classes by the Ascend plugin's fused kernel (A2 and A3; "
                    "up to 10 images of 550 pixels per card)")
    add_switch(group, "--device_graph",
               help="record a step on the card once for each input side, and replay it with one "
                    "launch (CUDA, and NPU from the 910B on)")
    add_npu_modes(group)
    group.add_argument("--amp_dtype", default="auto", metavar="auto|float16|bfloat16",
                       help="half-precision type of O1 and O2; auto is float16")
    group.add_argument("--loader_timeout", type=Bounded(float, 0), default=45, metavar="SECONDS",
                       help="end the run when a batch takes longer (the first: ten times this); "
                            "0 waits for ever")
    group.add_argument("--step_timeout", type=Bounded(float, 0), default=180, metavar="SECONDS",
                       help="end a run of several processes when a step takes longer (the first "
                            "steps, and those after a validation: ten times this); 0 waits for "
                            "ever")
    group.add_argument("--local_rank", "--local-rank", type=int, default=None,
                       help="set by launchers; LOCAL_RANK in the environment wins")
    add_switch(group, "--useDDP", default=True, dest="use_ddp",
               help="several cards train in one process each; nothing else exists here")


def _add_records(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("log and validation")
    group.add_argument("--log_folder", default="logs/", help="where the log files are written")
    add_switch(group, "--no_log", help="write nothing to --log_folder, --tensorboard and --track")
    add_switch(group, "--log_gpu",
               help="accepted for the original's sake: the log always has the memory")
    add_switch(group, "--quiet", help="print no progress bar and no line for every ten iterations; "
               "the logs have them all the same")
    group.add_argument("--tensorboard", default=None, metavar="FOLDER",
                       help="write losses, speed and validations for TensorBoard, too")
    group.add_argument("--track", default=None, choices=TRACKERS,
                       help="send losses, speed and validations there, too, by the package of that "
                            "name, which has to be installed and knows the server or project from "
                            "its own environment variables")
    add_switch(group, "--train_performance", help="measure speed only: save no weights")
    group.add_argument("--fps_start_iter", type=Bounded(int, 0), default=None,
                       help="steps left out of avg_fps; default: a tenth of the run, at most 100")
    group.add_argument("--validation_epoch", type=Bounded(int, -1), default=None, metavar="N",
                       help="epochs between validations; 0 or -1 leaves them to eval.py; default: "
                            "where there is a validation set, as often as takes a tenth of the "
                            "time at most, and at the end")
    group.add_argument("--validation_size", type=Bounded(int, 1), default=5000, metavar="N",
                       help="images per validation")
    add_switch(group, "--map_classes", help="validate on the classes that share a name, where "
               "training and validation data have different ones")

    group = parser.add_argument_group("run folder (docs/training.md)")
    group.add_argument("--project", default=os.environ.get("YOLACT_RUNS") or "runs",
                       metavar="FOLDER",
                       help="where run folders are made; default: YOLACT_RUNS of the environment, "
                            "or runs")
    group.add_argument("--name", default=None,
                       help="of this run's folder; default: that of the configuration. A name that "
                            "is taken gets a number: NAME-2")
    add_switch(group, "--no_run_folder", help="make none")
    group.add_argument("--rerun", default=None, metavar="FOLDER",
                       help="start again with the flags and the configuration of a run folder; "
                            "other flags given here win")
