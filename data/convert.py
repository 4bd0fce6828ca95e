"""Turn other annotation formats into COCO's: `python -m data.convert labelme raw --out=mydata`.

Writes `train.json`, `val.json` and `data.yaml` into the output folder. Images stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from data.description import FOLDER_FILE
from data.tools.conversion import Conversion, refuse_foreign_files, write_dataset
from data.tools.formats import FORMATS, convert
from utils.cli import ArgumentParser, Bounded, add_switch, print_lines, run_main
from utils.errors import UserError, nearest, some

_BOXES = ("yolo", "voc")
"""Formats whose objects may have a box only."""


def parser_of(kind: str) -> ArgumentParser:
    """Parser of one format's command line."""
    parser = ArgumentParser(prog=f"python -m data.convert {kind}",
                            description=f"Convert {FORMATS[kind].title}.")
    parser.add_argument("source", help="folder (yolo: or data.yaml)")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="where train.json, val.json and data.yaml go")
    parser.add_argument("--val_fraction", type=float, default=0.2,
                        help="of the images for validation, where the source has no split")
    parser.add_argument("--seed", type=Bounded(int, 0), default=0, help="of that split")
    if kind != "coco":
        parser.add_argument("--classes", default=None, metavar="A,B,..",
                            help="class names in the order wanted; default: all that occur, sorted "
                                 "(yolo: those of data.yaml; masks: object)")
        add_switch(parser, "--skip_bad", help="leave out and count what cannot be converted")
    if kind in _BOXES:
        add_switch(parser, "--boxes_as_masks", help="objects without an outline get their box")
    return parser


def convert_into(kind: str, args: argparse.Namespace) -> List[str]:
    """Convert a dataset and write it; returns the lines to print."""
    out = Path(args.out)
    refuse_foreign_files(out)
    given = {key: value for key, value in vars(args).items() if key not in ("source", "out")}
    if "classes" in given:
        given["classes"] = _words(args.classes)
    conversion = Conversion(**given)
    parts, names = convert(kind, Path(args.source), conversion)
    lines = write_dataset(parts, names, out)
    described = f": {len(names)} classes ({some(names, 10)})" if names else ""
    path = out / FOLDER_FILE
    return conversion.lines() + lines + [f"{path}{described}",
                                         f"next: python -m data.check {path}"]


def _words(text: Optional[str]) -> List[str]:
    words = [word.strip() for word in (text or "").split(",")]
    if words == [""]:
        return []
    if "" in words or len(set(words)) < len(words):
        raise UserError(f"--classes is '{text}', expected different names with a comma between "
                        "two; a number of YOLO's is the place of its name")
    return words


def main(argv: List[str]) -> int:
    """Command line entry."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m data.convert FORMAT SOURCE --out=FOLDER\n\n" + "\n".join(
            f"  {kind:8s} {form.title}" for kind, form in FORMATS.items())
            + "\n\npython -m data.convert FORMAT --help shows the flags of each")
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        raise UserError(f"unknown format '{argv[0]}'{nearest(argv[0], FORMATS) or '.'} Known: "
                        f"{', '.join(FORMATS)}.")
    print_lines(convert_into(argv[0], parser_of(argv[0]).parse_args(argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
