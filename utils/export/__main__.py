"""Export a network: `python -m utils.export WEIGHTS --out=FOLDER`.

The folder holds ONNX models (with --format=om Ascend models, too), `model.yaml`, and `run.py`,
which needs nothing of this repository. eval.py and `Predictor` take the folder in the place of
weights.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, cast

from utils.cli import ArgumentParser, Bounded, add_switch, run_main
from utils.errors import UserError, printable
from utils.export.atc import AIPP, PRECISION_MODES, SCRIPT, AtcPlan, add_om_models, parse_socs
from utils.exported import FORMS, INPUT_TYPES, is_export, require
from utils.parsing import whole_number

if TYPE_CHECKING:
    from utils.export.folder import Plan
    from yolact import Yolact

DYNAMIC = "dynamic"
_MOST_IMAGES = 1024
DEFAULT_SOC, DEFAULT_SECONDS, HALF_MODE = "310P3", 3600.0, "force_fp16"


def export_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m utils.export", description="Export a network to ONNX "
                            "and to Ascend's OM, with all that is needed to run it elsewhere.")
    parser.add_argument("weights", metavar="WEIGHTS",
                        help="weights file, run folder, latest or interrupt, as for eval.py")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--config", default=None, metavar="NAME|FILE.yaml",
                        help="recipe, where the weights do not say it; or a file as for train.py")
    parser.add_argument("--save_folder", default="weights/",
                        help="where latest and interrupt are looked for")
    parser.add_argument("--outputs", choices=FORMS, default="raw",
                        help="raw: what ModelZoo's models give; detections: Fast NMS inside")
    parser.add_argument("--batch_size", default="1", metavar="N,N,..|dynamic",
                        help="images of a batch, a model for each; dynamic: any number")
    parser.add_argument("--input", choices=INPUT_TYPES, default="float32",
                        help="float32: images normalised by the caller; uint8: as they are read")
    add_switch(parser, "--half", help="weights and arithmetic in half precision")
    parser.add_argument("--images", default=None, metavar="FOLDER",
                        help="check the export with images of this folder (or in/*.jpg), too")
    parser.add_argument("--opset", type=Bounded(int, 11), default=None,
                        help="of ONNX; default 11, with deformable convolutions 19")
    om = parser.add_argument_group("Ascend's OM, beside ONNX")
    om.add_argument("--format", choices=("onnx", "om"), default="onnx",
                    help="om: run ATC, or, where it is not installed, write atc.sh")
    om.add_argument("--soc", default=None, metavar="NAME,NAME,..",
                    help="chips to make models for, as 'npu-smi info' names them; default "
                         + DEFAULT_SOC)
    om.add_argument("--precision_mode", choices=PRECISION_MODES, default=None,
                    help=f"of ATC; default: ATC's own, with --half {HALF_MODE}")
    om.add_argument("--atc_seconds", type=Bounded(float, 1), default=None,
                    help=f"time that ATC may take for a model; default {DEFAULT_SECONDS:g}")
    return parser


def plan_of(args: argparse.Namespace) -> Plan:
    """What the flags ask for; a batch that is none is a `UserError`."""
    from utils.export.folder import Plan

    if args.batch_size == DYNAMIC and args.outputs != "raw":
        raise UserError(f"--batch_size is {DYNAMIC}, but --outputs={args.outputs} has fixed "
                        "shapes; give numbers, such as 1,8")
    batches: tuple[int | None, ...] = (None,)
    if args.batch_size != DYNAMIC:
        numbers = [whole_number(word) for word in args.batch_size.split(",")]
        if not all(number and number <= _MOST_IMAGES for number in numbers) or (
                len(set(numbers)) < len(numbers)):
            raise UserError(f"--batch_size is '{args.batch_size}', expected different numbers "
                            f"from 1 to {_MOST_IMAGES}, such as 1 or 1,8, or {DYNAMIC}")
        batches = tuple(numbers)
    if args.format == "onnx":
        return Plan(args.outputs, batches, args.input, args.half, args.opset)
    if args.batch_size == DYNAMIC:
        raise UserError(f"--batch_size is {DYNAMIC}, but a model for Ascend has a fixed one; give "
                        "numbers, such as 1,8")
    # ATC takes single precision and normalised images; it sees to the rest itself.
    return Plan(args.outputs, batches, "float32", False, args.opset, for_atc=True)


def atc_plan_of(args: argparse.Namespace) -> AtcPlan | None:
    """What the flags ask of ATC; None where they ask for ONNX alone."""
    if args.format == "onnx":
        for flag in ("soc", "precision_mode", "atc_seconds"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} is for Ascend's models; add --format=om, or leave it "
                                "out")
        return None
    if args.half and args.precision_mode not in (None, HALF_MODE):
        raise UserError(f"--half is --precision_mode={HALF_MODE}, but --precision_mode is "
                        f"{args.precision_mode}; leave one of them out")
    return AtcPlan(parse_socs(DEFAULT_SOC if args.soc is None else args.soc),
                   args.precision_mode or (HALF_MODE if args.half else ""), args.input == "uint8",
                   args.atc_seconds or DEFAULT_SECONDS)


def main(argv: list[str]) -> int:
    args = export_parser().parse_args(argv)
    if not args.out:
        raise UserError("--out is empty, expected a folder")
    args.out = os.path.normpath(args.out)  # a/../b is b, though there be no a

    # Here, as --help and mistakes in flags need not wait for PyTorch.
    from utils.export.check import check_images, differences
    from utils.export.folder import clear, new_folder, write_description, write_models
    from utils.inference.detector import CPU, load_model
    from utils.memory import explain_out_of_memory

    plan, atc = plan_of(args), atc_plan_of(args)
    for library in ("onnx", "onnxruntime"):
        require(library)
    if is_export(args.weights):
        raise UserError(f"'{args.weights}' is an export already; give the weights it came from")
    loaded = load_model(args.weights, args.save_folder, args.config)
    network = cast("Yolact", loaded.model)
    print(f"Weights : {loaded.report}", flush=True)
    planes = check_images(loaded.config.max_size, args.images)
    with new_folder(args.out) as folder, explain_out_of_memory(CPU):
        facts = write_models(loaded, network, plan, folder, planes)
        write_description(facts, folder)
        apart = differences(network, loaded.config, folder, plan.half, planes)
        facts["differences"] = apart
        onnx_models, notes, before = facts["models"], [], os.listdir(folder)
        if atc is not None:
            notes = add_om_models(facts, loaded.config, atc, folder, args.out,
                                  lambda line: print(line, flush=True))
            # ATC leaves more than its models.
            clear(folder, [*before, AIPP, SCRIPT, *(entry["file"] for entry in facts["models"])])
        write_description(facts, folder)
    print(f"Checked : {len(planes)} images; largest relative difference from PyTorch: "
          + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    if plan.form == "detections" and "detections" not in apart:
        print("          the network finds nothing in the images of the check: no detections were "
              "compared; give some of its own with --images=FOLDER")
    for entry in onnx_models:
        path = os.path.join(args.out, entry["file"])
        print(f"Wrote   : {printable(path)}, batch {entry['batch'] or DYNAMIC}, "
              f"opset {entry['opset']}, {os.path.getsize(path) / 1e6:.1f} MB")
    print("\n".join(notes + [
        f"Try     : python {shlex.quote(os.path.join(args.out, 'run.py'))} image.jpg --out=drawn",
        f"          python eval.py {shlex.quote('--trained_model=' + args.out)} "
        "--val_data=/data/coco"]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
