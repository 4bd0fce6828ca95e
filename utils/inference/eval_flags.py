"""Command line of eval.py: the flags of the existing Ascend port under the same names."""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from utils.cli import (
    ArgumentParser,
    Bounded,
    add_device_flags,
    add_npu_modes,
    add_switch,
    foreign_words,
    refuse_two_cards,
)
from utils.errors import UserError


def parse_eval_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; flags that contradict each other are a `UserError`."""
    args = eval_parser().parse_args(argv)
    if not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score_threshold is {args.score_threshold:g}, expected 0 to 1: scores "
                        "are fractions, not per cent")
    given = [f"--{name}" for name in ("image", "images", "video")
             if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} exclude each other; give one of them")
    if given and args.device_graph:
        raise UserError(f"--device_graph is for scoring a dataset; leave it out with {given[0]}")
    refuse_two_cards(args.eval_device, args.device_id)
    return args


def eval_parser() -> ArgumentParser:
    same, instead = foreign_words("eval")
    parser = ArgumentParser(prog="eval.py", description="Score YOLACT weights on a COCO-format "
                            "dataset, or draw what they find in an image.", same=same,
                            instead=instead)
    _add_weights_and_data(parser)
    _add_images(parser)
    _add_detection_and_output(parser)
    return parser


def _add_weights_and_data(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    group.add_argument("--trained_model", "--weights", default="latest",
                       metavar="FILE|FOLDER|latest|interrupt",
                       help="weights; configuration and class names come from the .state beside "
                            "them; or an export: its folder, or an .onnx or .om file in it")
    group.add_argument("--save_folder", default="weights/",
                       help="where latest and interrupt are looked for")
    group.add_argument("--config", default=None, metavar="NAME|FILE.yaml",
                       help="recipe, or a file as for train.py; default: that of the .state file, "
                            "or of the weights file's name")

    group = parser.add_argument_group("data")
    group.add_argument("--val_data", "--data", "--data_path", default=None,
                       metavar="FOLDER|YAML",
                       help="root of the dataset, or a file that names images and annotations, as "
                            "for train.py (docs/data.md; default: data/coco, if it is there)")
    group.add_argument("--dataset", default=None,
                       help="layout below --val_data; default: the configuration's")
    group.add_argument("--valid_images", default=None, metavar="FOLDER",
                       help="images, where they do not lie in a known layout")
    group.add_argument("--valid_info", default=None, metavar="JSON",
                       help="COCO annotations of --valid_images")
    add_switch(group, "--map_classes", help="where network and dataset have different classes, "
                      "score those that share a name")
    group.add_argument("--max_images", type=Bounded(int, -1), default=-1, metavar="N",
                       help="at most this many; 0 or -1 is all")
    group.add_argument("--num_workers", "--workers", type=Bounded(int, 0), default=2, metavar="N",
                       help="processes that read images; 0 reads in the main process")
    group.add_argument("--batch_size", "--batch", type=Bounded(int, 1), default=4, metavar="N",
                       help="images that pass together")
    add_switch(group, "--shuffle", help="take the images in random order")
    group.add_argument("--seed", type=Bounded(int, 0), default=None, help="of --shuffle")


def _add_images(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("images, instead of scoring a dataset")
    group.add_argument("--image", default=None, metavar="IN[:OUT]",
                       help="draw what is found in one image; default output: results/IN.png")
    group.add_argument("--images", default=None, metavar="FOLDER[:OUT]",
                       help="the same for a folder, or for a pattern such as 'in/*.jpg'")
    group.add_argument("--video", default=None, metavar="IN[:OUT]",
                       help="the same for a video or the number of a camera, e.g. in.mp4:out.mp4, "
                       "0:out.mp4; a camera without output is shown in a window")
    group.add_argument("--video_multiframe", type=Bounded(int, 1), default=1,
                       help="frames of a video that pass together")
    group.add_argument("--top_k", type=Bounded(int, 1), default=5,
                       help="objects shown per image, best first")
    for flag, what in (("masks", "masks"), ("bboxes", "boxes"), ("text", "class names"),
                       ("scores", "scores behind the class names")):
        add_switch(group, "--display_" + flag, default=True, help="draw " + what)
    add_switch(group, "--display_fps", help="write the speed onto the frames of a video")
    add_switch(group, "--output_json", help="write what is shown in COCO's result format, too")
    group.add_argument("--json_masks", choices=("rle", "polygon"), default="rle",
                       help="masks in it: exact run lengths, or outlines")
    add_switch(group, "--crops", help="cut each object out, with a transparent background")


def _add_detection_and_output(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("detection")
    add_switch(group, "--fast_nms", default=True,
                      help="False suppresses one by one, on the host")
    add_switch(group, "--cross_class_nms", help="suppress over all classes together")
    group.add_argument("--score_threshold", type=float, default=0.0,
                       help="leave out detections up to this score")
    group.add_argument("--max_num_detections", type=Bounded(int, 1), default=None,
                       help="detections per image; default: the configuration's")
    add_switch(group, "--no_crop", help="do not cut objects off outside their rectangles")

    group = parser.add_argument_group("output")
    add_switch(group, "--output_coco_json", help="write result files for COCO's server")
    add_switch(group, "--detect", help="do not score: with --output_coco_json, only write them")
    add_switch(group, "--no_sort", help="images always keep the order of the annotation file; "
                      "accepted for the original's scripts")
    for flag, what in (("bbox", "boxes"), ("mask", "masks")):
        group.add_argument(f"--{flag}_det_file", default=f"results/{flag}_detections.json",
                           metavar="JSON", help=f"where --output_coco_json writes the {what}")
    group.add_argument("--per_class_file", default="results/per_class.csv", metavar="CSV",
                       help="average precision of each class; '' writes none")
    group.add_argument("--run_folder", default="none", metavar="none|auto|FOLDER",
                       type=lambda text: text or "none",
                       help="run folder that gets scores, confusion matrix, images and report; "
                            "auto: that of the training that made the weights, if it is there")
    add_switch(group, "--no_bar", "--quiet", help="show no progress, also on a terminal")
    add_switch(group, "--benchmark", help="time each stage of the evaluation")

    group = parser.add_argument_group("device")
    add_device_flags(group, "--eval_device", "--node_device")
    group.add_argument("--precision", choices=("float32", "bfloat16", "float16", "auto"),
                       default="float32", help="type in which the network computes; auto: bfloat16 "
                       "on a CPU or a CUDA card that computes it, else float32")
    add_npu_modes(group)
    add_switch(group, "--device_graph",
               help="record network and detection on the card once, and replay them with one "
                    "launch a batch (CUDA, and NPU from the 910B on); to score a dataset")


def changed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What of the flags that scores depend on is not the default, by name."""
    defaults = eval_parser()
    return {name: getattr(args, name) for name in (
        "fast_nms", "cross_class_nms", "score_threshold", "max_num_detections", "no_crop",
        "map_classes", "precision") if getattr(args, name) != defaults.get_default(name)}


def nms_kind(args: argparse.Namespace) -> str:
    """Which suppression the flags ask for, as `layers.detection.Detect` names it."""
    if not args.fast_nms:
        return "traditional"
    return "cross_class" if args.cross_class_nms else "fast"
