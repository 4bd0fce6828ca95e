"""Turn other annotation formats into COCO's: `python -m data.convert labelme raw --out=mydata`.

Writes `train.json`, `val.json` and `data.yaml` into the output folder. Images stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from data.tools.conversion import (
    FoundImage,
    Problems,
    choose_classes,
    refuse_foreign_files,
    split_randomly,
    write_dataset,
)
from data.tools.labelme import read_labelme
from data.tools.voc import read_voc
from data.tools.yolo import read_yolo
from utils.cli import ArgumentParser, add_switch, run_main
from utils.errors import UserError, nearest

FORMATS = {
    "labelme": "labelme JSON files (polygons, rectangles, circles, masks; a group is one object)",
    "yolo": "YOLO segmentation text with data.yaml, or with images/, labels/ and classes.txt",
    "voc": "Pascal VOC XML with SegmentationObject masks",
}
_IGNORED_LABELS = "__ignore__,_background_"


def parser_of(kind: str) -> ArgumentParser:
    """Parser of one format's command line."""
    parser = ArgumentParser(prog=f"python -m data.convert {kind}",
                            description=f"Convert {FORMATS[kind]}.")
    parser.add_argument("source", help="folder (yolo: or data.yaml)")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="where train.json, val.json and data.yaml go")
    parser.add_argument("--classes", default=None, metavar="A,B,..",
                        help="class names in the order wanted; default: all that occur, sorted "
                             "(yolo: those of data.yaml)")
    parser.add_argument("--val_fraction", type=float, default=0.2,
                        help="of the images for validation, where the source has no split")
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    add_switch(parser, "--skip_bad", help="leave out and count what cannot be converted")
    if kind == "labelme":
        parser.add_argument("--ignore_labels", default=_IGNORED_LABELS, metavar="A,B,..")
        parser.add_argument("--ignore_shapes", default="", metavar="TYPE,..",
                            help="shape types to leave out, e.g. point,line")
    else:
        add_switch(parser, "--boxes_as_masks", help="objects without an outline get their box")
    if kind == "voc":
        parser.add_argument("--images", default=None, metavar="FOLDER",
                            help="images; default: JPEGImages in the source")
    return parser


def _read(kind: str, args: argparse.Namespace, problems: Problems
          ) -> Tuple[Dict[str, List[FoundImage]], Optional[List[str]], List[str]]:
    """Images of each split, the class names where the source has them, and notes."""
    source, classes = Path(args.source), _words(args.classes) or None
    if kind == "labelme":
        images, notes = read_labelme(source, problems, _words(args.ignore_labels),
                                     _words(args.ignore_shapes))
        return {"train": images}, classes, notes
    if kind == "yolo":
        splits, names = read_yolo(source, problems, args.boxes_as_masks, classes)
        return splits, classes or names, []
    return read_voc(source, problems, args.boxes_as_masks,
                    Path(args.images) if args.images else None), classes, []


def convert(kind: str, args: argparse.Namespace) -> List[str]:
    """Convert a dataset; returns the lines to print."""
    refuse_foreign_files(Path(args.out))
    problems = Problems(args.skip_bad)
    splits, classes, lines = _read(kind, args, problems)
    if list(splits) == ["train"]:
        splits = split_randomly(splits["train"], args.val_fraction, args.seed)
    splits = {split: images for split, images in splits.items() if images}
    if "train" not in splits:
        raise UserError(f"{args.source}: no image for training was left")
    names = choose_classes(splits, classes, problems)
    path = write_dataset(splits, names, Path(args.out), lines.append)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return problems.lines() + lines + [f"{path}: {len(names)} classes ({shown})",
                                       f"next: python -m data.check {path}"]


def _words(text: Optional[str]) -> List[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def main(argv: List[str]) -> int:
    """Command line entry."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m data.convert FORMAT SOURCE --out=FOLDER\n\n" + "\n".join(
            f"  {kind:8s} {text}" for kind, text in FORMATS.items())
            + "\n\npython -m data.convert FORMAT --help shows the flags of each")
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        raise UserError(f"unknown format '{argv[0]}'{nearest(argv[0], FORMATS) or '.'} Known: "
                        f"{', '.join(FORMATS)}.")
    print("\n".join(convert(argv[0], parser_of(argv[0]).parse_args(argv[1:]))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
