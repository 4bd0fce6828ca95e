"""Command line of train.py: the flags of the existing Ascend port under the same names."""

from __future__ import annotations

import argparse
import os
from typing import Any, Sequence, Tuple

from utils.cli import ArgumentParser, Bounded, add_switch
from utils.errors import UserError
from utils.run_folder import CONFIG, read_run_config

AUTO = "auto"
DEFAULT_EMA_DECAY = 0.9998
"""Of --ema without a number; about the last 5000 steps count."""


class BatchSize(Bounded):
    """Type of --batch_size: `auto`, or a whole number."""

    def __init__(self) -> None:
        super().__init__(int, 1)

    def __call__(self, text: str) -> Any:
        """Read the text."""
        return AUTO if text.strip().lower() == AUTO else super().__call__(text)

    def __str__(self) -> str:
        return super().__str__() + ", or auto"


class ClassFactors:
    """Type of --class_weights: `balanced`, or `cat=2,dog=0.5` as (name, factor) pairs."""

    def __call__(self, text: str) -> Any:
        """Read the text; names are compared with the data's later."""
        if "=" not in text:
            return text
        pairs = [part.rpartition("=") for part in text.split(",")]
        try:
            return tuple((name.strip(), float(factor)) for name, _, factor in pairs)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}', expected 'balanced' or factors such as "
                                             "cat=2,dog=0.5") from None


class InputSides:
    """Type of --multi_scale: `448,550,640`."""

    def __call__(self, text: str) -> Tuple[int, ...]:
        """Read the text; the configuration checks the sides."""
        try:
            return tuple(int(side) for side in text.split(",") if text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}', expected input sides in pixels such as "
                                             "448,550,640") from None


class AnchorSides:
    """Type of --pred_scales: `20+30,42+60` becomes ((20.0, 30.0), (42.0, 60.0))."""

    def __call__(self, text: str) -> Tuple[Tuple[float, ...], ...]:
        """Read the text; the configuration checks the number of levels."""
        try:
            sides = tuple(tuple(float(side) for side in level.split("+"))
                          for level in text.split(","))
        except ValueError:
            sides = ()
        if not sides or not all(0 < side < float("inf") for level in sides for side in level):
            raise argparse.ArgumentTypeError(f"'{text}', expected sides above 0 such as 24,48,96 "
                                             "or 20+30,42+60")
        if len({len(level) for level in sides}) > 1:
            raise argparse.ArgumentTypeError(f"'{text}', expected the same number of sides in each "
                                             "level")
        return sides


def train_parser() -> ArgumentParser:
    """Parser of train.py; a flag left out is None where the configuration knows better."""
    parser = ArgumentParser(prog="train.py", description="Train YOLACT on a COCO-format dataset.")
    _add_data(parser)
    _add_schedule(parser)
    _add_training_options(parser)
    _add_checkpoints(parser)
    _add_device(parser)
    _add_logging(parser)
    _add_run_folder(parser)
    parser.set_defaults(stored_config=None, command_line=None)
    return parser


def parse_train_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; with --rerun the flags of an earlier run are the defaults.

    Returns:
        The flags, with `command_line`, and `stored_config`: the configuration of the earlier run,
        None where there is none or --config asks for another one.

    Raises:
        UserError: --rerun names no run folder of train.py.
    """
    parser = train_parser()
    args = parser.parse_args(argv)
    if args.rerun is not None:
        stored = read_run_config(args.rerun) or {}
        fields = stored.get("run", {}).get("config")
        if not isinstance(stored.get("flags"), dict) or not isinstance(fields, dict):
            raise UserError(f"--rerun is '{args.rerun}', which is no run folder of train.py "
                            f"(looked for {CONFIG} with flags and configuration)")
        flags = {key: value for key, value in stored["flags"].items() if key in vars(args)}
        parser.set_defaults(**flags)
        other_config = any(word.split("=", 1)[0] == "--config" for word in argv)
        args = parser.parse_args(argv)
        args.stored_config = None if other_config else fields
    args.command_line = ["python", "train.py"] + list(argv)
    return args


def images_per_card(args: argparse.Namespace, default: int, cards: int) -> int:
    """Batch size of each card, from --batch_alloc, --batch_size in numbers, or `default`."""
    if args.batch_alloc is None:
        return args.batch_size or default
    sizes = args.batch_alloc.split(",")
    if len(sizes) != cards or len(set(sizes)) != 1 or not sizes[0].isdigit() or sizes[0] == "0":
        raise UserError("--batch_alloc is '{}', expected the same whole number for each of {} "
                        "card{}, separated by commas: shapes are static and cards wait for each "
                        "other".format(args.batch_alloc, cards, "" if cards == 1 else "s"))
    return int(sizes[0])


def _add_data(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", "--data_path", default=None, metavar="FOLDER|YAML",
                       help="root of the dataset, e.g. with train2017/, val2017/, annotations/; or "
                            "a file that names images and annotations (docs/data.md)")
    group.add_argument("--dataset", default=None,
                       help="layout below --data; default: the configuration's")
    group.add_argument("--train_images", default=None, metavar="FOLDER",
                       help="training images, where they do not lie in a known layout")
    group.add_argument("--train_info", default=None, metavar="JSON",
                       help="COCO annotations of --train_images")
    group.add_argument("--valid_images", default=None, metavar="FOLDER")
    group.add_argument("--valid_info", default=None, metavar="JSON")
    add_switch(group, "--strict",
               help="stop at the first unusable annotation instead of dropping it, and at "
                    "whatever else the data check finds")
    group.add_argument("--num_workers", type=Bounded(int, 0), default=2,
                       help="loader processes per card; 0 loads in the training process")


def _add_schedule(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("model and schedule")
    group.add_argument("--config", default="yolact_base_config",
                       help="recipe, e.g. yolact_resnet50")
    group.add_argument("--pred_scales", type=AnchorSides(), default=None, metavar="A,B+C,..",
                       help="anchor sides in pixels for each pyramid level, finest first, several "
                            "of a level joined by +; python -m data.check suggests them")
    group.add_argument("--backbone_weights", default=None, metavar="FILE",
                       help="ImageNet backbone; 'none' trains from scratch; default: the "
                            "configuration's file in --save_folder")
    group.add_argument("--batch_size", type=BatchSize(), default=None, metavar="N|auto",
                       help="images per card and step; auto takes as many as fit into its memory")
    group.add_argument("--batch_alloc", default=None, metavar="N,N,..",
                       help="images per step of each card; the same number for every card")
    group.add_argument("--accumulate", type=Bounded(int, 1), default=1, metavar="N",
                       help="batches whose gradients make up one step")
    add_switch(group, "--sync_bn", help="batch norm over the images of all cards")
    group.add_argument("--max_iter", type=Bounded(int, 1), default=None,
                       help="iterations at the configuration's batch size (see --no_autoscale)")
    group.add_argument("--lr", "--learning_rate", type=Bounded(float, 0, True),
                       default=None, dest="lr")
    group.add_argument("--momentum", type=Bounded(float, 0), default=None)
    group.add_argument("--decay", "--weight_decay", type=Bounded(float, 0),
                       default=None, dest="decay")
    group.add_argument("--gamma", type=Bounded(float, 0), default=None)
    add_switch(group, "--no_autoscale",
               help="do not scale learning rate and iterations by batch size x cards")
    group.add_argument("--seed", type=Bounded(int, 0), default=0,
                       help="of weights, order and augmentation")


def _add_training_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training options, all off unless the configuration has "
                                      "them (docs/training.md)")
    group.add_argument("--ema", "--ema_decay", type=Bounded(float, 0), nargs="?", default=None,
                       const=DEFAULT_EMA_DECAY, dest="ema_decay", metavar="DECAY",
                       help="score and save a moving average of the weights; default decay: "
                            f"{DEFAULT_EMA_DECAY}"
                       )
    group.add_argument("--schedule", default=None, metavar="step|cosine",
                       help="shape of the learning rate after its warm-up")
    group.add_argument("--clip_grad_norm", type=Bounded(float, 0), default=None, metavar="NORM",
                       help="largest norm of the whole gradient; 0 does not limit it")
    group.add_argument("--early_stopping", type=Bounded(int, 0), default=None, metavar="N",
                       help="end after N validations in a row without a better mask mAP")
    group.add_argument("--freeze", default=None, metavar="backbone|STAGES",
                       help="do not train the backbone, or its stem and first STAGES stages")
    group.add_argument("--class_weights", type=ClassFactors(), default=None,
                       metavar="balanced|NAME=FACTOR,..",
                       help="factor on the confidence loss of a class's positives, by its name or "
                            "by inverse frequency")
    group.add_argument("--multi_scale", type=InputSides(), default=None, metavar="S,S,..",
                       help="input sides in pixels to train on, drawn in turn")
    group.add_argument("--multi_scale_interval", type=Bounded(int, 1), default=None, metavar="N",
                       help="iterations that keep a side; default: the configuration's, 10")


def _add_checkpoints(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--save_folder", default="weights/")
    group.add_argument("--save_interval", type=Bounded(int, 1), default=2000,
                       help="iterations between files")
    add_switch(group, "--keep_latest",
               help="keep the newest file only (and every --keep_latest_interval); files of later "
                    "iterations stay")
    group.add_argument("--keep_latest_interval", type=Bounded(int, 1), default=100000,
                       help="iterations whose files stay all the same")
    group.add_argument("--resume", default=None, metavar="FILE|latest|interrupt",
                       help="go on from a checkpoint; with its .state beside it, exactly")
    group.add_argument("--weights", default=None, metavar="FILE",
                       help="start a new training from the weights of a whole network, also one "
                            "of other classes; no backbone file is needed then")
    group.add_argument("--start_iter", type=int, default=-1,
                       help="iteration to start at where --resume finds weights only")
    add_switch(group, "--no_interrupt", help="do not save when the run is interrupted")


def _add_device(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--node_device", default="auto", help="auto, npu, cuda or cpu")
    group.add_argument("--device_id", type=Bounded(int, 0), default=None,
                       help="index of the card on this host")
    add_switch(group, "--cuda", default=True,
               help="False is the original's spelling of --node_device=cpu")
    group.add_argument("--opt_level", default="O0", metavar="O0|O1|O2",
                       help="precision: O0 float32; O1 convolutions in half precision, parameters "
                            "in float32; O2 parameters in half precision too (docs/ascend.md)")
    group.add_argument("--loss_scale", default=None, metavar="dynamic|NUMBER",
                       help="factor on the loss that keeps small gradients; default: dynamic for "
                            "float16, none for bfloat16")
    add_switch(group, "--fused_optimizer",
               help="SGD by the Ascend plugin's fused kernels; waits for the device in each step, "
                    "which the default does not (PyTorch 1.5 and 1.8: at O1 and O2 only)")
    add_switch(group, "--fused_loss",
               help="cross entropy of the classes by the Ascend plugin's fused kernel (A2 and A3; "
                    "up to 10 images of 550 pixels per card)")
    group.add_argument("--amp_dtype", default="auto", metavar="auto|float16|bfloat16",
                       help="half-precision type of O1 and O2; auto is float16")
    group.add_argument("--loader_timeout", type=Bounded(float, 0), default=45, metavar="SECONDS",
                       help="end the run when a batch takes longer (the first: ten times this); "
                            "0 waits for ever")
    group.add_argument("--local_rank", "--local-rank", type=int, default=None,
                       help="set by launchers; LOCAL_RANK in the environment wins")
    add_switch(group, "--useDDP", default=True, dest="use_ddp",
               help="several cards train in one process each; nothing else exists here")


def _add_logging(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("log and validation")
    group.add_argument("--log_folder", default="logs/")
    add_switch(group, "--no_log", help="write nothing to --log_folder and --tensorboard")
    add_switch(group, "--log_gpu",
               help="accepted for the original's sake: the log always has the memory")
    group.add_argument("--tensorboard", default=None, metavar="FOLDER",
                       help="write losses, speed and validations for TensorBoard, too")
    add_switch(group, "--train_performance", help="measure speed only: save no weights")
    group.add_argument("--fps_start_iter", type=Bounded(int, 0), default=None,
                       help="steps left out of avg_fps; default: a tenth of the run, at most 100")
    group.add_argument("--validation_epoch", type=int, default=-1,
                       help="epochs between validations; -1 leaves them to eval.py")
    group.add_argument("--validation_size", type=Bounded(int, 1), default=5000,
                       help="images per validation")


def _add_run_folder(parser: ArgumentParser) -> None:
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
