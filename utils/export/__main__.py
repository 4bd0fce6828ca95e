"""Export a network: `python -m utils.export WEIGHTS --out=FOLDER`.

The folder holds ONNX models (with --format=om Ascend models, too), `model.yaml`, and `run.py`,
which needs nothing of this repository. eval.py and `Predictor` take the folder in the place of
weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional, Sequence, Tuple

from utils.cli import ArgumentParser, Bounded, add_switch, run_main
from utils.errors import UserError
from utils.export.folder import (
    Plan,
    new_folder,
    require_libraries,
    write_description,
    write_models,
)
from utils.export.graph import FORMS, INPUT_TYPES
from utils.export.verify import differences
from utils.exported import is_export
from utils.inference.detector import LoadedModel, load_model
from yolact import Yolact

DYNAMIC = "dynamic"


def export_parser() -> ArgumentParser:
    """Parser of this command."""
    parser = ArgumentParser(prog="python -m utils.export", description="Export a network to ONNX "
                            "and to Ascend's OM, with all that is needed to run it elsewhere.")
    parser.add_argument("weights", metavar="WEIGHTS",
                        help="weights file, run folder, latest or interrupt, as for eval.py")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--config", default=None, help="recipe, where the weights do not say it")
    parser.add_argument("--save_folder", default="weights/",
                        help="where latest and interrupt are looked for")
    parser.add_argument("--outputs", choices=FORMS, default="raw",
                        help="raw: what ModelZoo's models give; detections: Fast NMS inside")
    parser.add_argument("--batch_size", default="1", metavar="N,N,..|dynamic",
                        help="images of a batch, a model for each; dynamic: any number")
    parser.add_argument("--input", choices=tuple(INPUT_TYPES), default="float32",
                        help="float32: images normalised by the caller; uint8: as they are read")
    add_switch(parser, "--half", help="weights and arithmetic in half precision")
    parser.add_argument("--opset", type=Bounded(int, 11), default=None,
                        help="of ONNX; default 11, with deformable convolutions 19")
    return parser


def plan_of(args: argparse.Namespace) -> Plan:
    """What the flags ask for; a batch that is none is a `UserError`."""
    if args.batch_size == DYNAMIC and args.outputs != "raw":
        raise UserError(f"--batch_size is {DYNAMIC}, but --outputs={args.outputs} has fixed "
                        "shapes; give numbers, such as 1,8")
    batches: Tuple[Optional[int], ...] = (None,)
    if args.batch_size != DYNAMIC:
        words = args.batch_size.split(",")
        if not all(word.isdigit() and int(word) for word in words) or len(set(words)) < len(words):
            raise UserError(f"--batch_size is '{args.batch_size}', expected different numbers "
                            f"from 1 on, such as 1 or 1,8, or {DYNAMIC}")
        batches = tuple(int(word) for word in words)
    return Plan(args.outputs, batches, args.input, args.half, args.opset)


def load(args: argparse.Namespace) -> Tuple[LoadedModel, Yolact]:
    """The weights to export."""
    if is_export(args.weights):
        raise UserError(f"'{args.weights}' is an export already; give the weights it came from")
    loaded = load_model(args.weights, args.save_folder, args.config)
    assert isinstance(loaded.model, Yolact)
    return loaded, loaded.model


def _run(argv: List[str]) -> int:
    args = export_parser().parse_args(argv)
    plan = plan_of(args)
    require_libraries()
    loaded, network = load(args)
    print(f"Weights : {loaded.report}", flush=True)
    with new_folder(args.out) as folder:
        facts = write_models(loaded, network, plan, folder)
        write_description(facts, folder)
        apart = differences(network, loaded.config, folder, plan.half)
        write_description(dict(facts, differences=apart), folder)
    print("Checked : largest relative difference from PyTorch: "
          + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    for entry in facts["models"]:
        path = os.path.join(args.out, entry["file"])
        print(f"Wrote   : {path}, batch {entry['batch'] or DYNAMIC}, opset {entry['opset']}, "
              f"{os.path.getsize(path) / 1e6:.1f} MB")
    print(f"Try     : python {os.path.join(args.out, 'run.py')} image.jpg --out=drawn\n"
          f"          python eval.py --trained_model={args.out} --val_data=/data/coco")
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run with these arguments; returns the exit code (2: something the user has to change)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
