"""Turn other annotation formats into COCO's: `python -m data.convert labelme raw --out=mydata`.

Writes `train.json`, `val.json` and `data.yaml` into the output folder. Images stay where they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from data.datasets import FOLDER_FILE
from data.tools.conversion import (
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
from utils.errors import UserError, nearest, some

FORMATS = {
    "labelme": "labelme JSON files (polygons, rectangles, circles, masks; a group is one object)",
    "yolo": "YOLO segmentation text with data.yaml, or with images/, labels/ and classes.txt",
    "voc": "Pascal VOC XML with SegmentationObject masks",
}


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
    if kind != "labelme":
        add_switch(parser, "--boxes_as_masks", help="objects without an outline get their box")
    return parser


def convert(kind: str, args: argparse.Namespace) -> List[str]:
    """Convert a dataset; returns the lines to print."""
    refuse_foreign_files(Path(args.out))
    problems = Problems(args.skip_bad)
    source, classes = Path(args.source), _words(args.classes)
    lines: List[str] = []
    if kind == "labelme":
        images, lines = read_labelme(source, problems)
        splits = {"train": images}
    elif kind == "yolo":
        splits, names = read_yolo(source, problems, args.boxes_as_masks, classes)
        classes = classes or names
    else:
        splits = read_voc(source, problems, args.boxes_as_masks)
    if list(splits) == ["train"]:
        splits = split_randomly(splits["train"], args.val_fraction, args.seed)
    splits = {split: images for split, images in splits.items() if images}
    if "train" not in splits:
        raise UserError(f"{args.source}: no image for training was left")
    names = choose_classes(splits, classes, problems)
    lines += write_dataset(splits, names, Path(args.out))
    path = Path(args.out) / FOLDER_FILE
    return problems.lines() + lines + [f"{path}: {len(names)} classes ({some(names, 10)})",
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
