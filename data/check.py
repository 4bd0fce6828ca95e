"""Look at a dataset before training on it: `python -m data.check my.yaml`.

Counts, sizes and classes as a table, everything that is wrong as sentences, suggestions for the
recipe, and a picture of the first batch as the network sees it.
"""

from __future__ import annotations

import argparse
import sys
from typing import List, Optional, Tuple

from data.checks.anchors import suggestions
from data.checks.images import ImageCheck, content_findings
from data.checks.memory import Memory
from data.checks.pictures import write_first_batch
from data.checks.quick import annotation_findings, keep_full
from data.checks.statistics import measure, table
from data.checks.turned import turned_notes
from data.coco import CocoDataset
from data.config import get_config
from data.dataset_yaml import find_dataset_file, read_dataset_file
from data.datasets import open_dataset
from utils.cli import EXIT_USER_ERROR, ArgumentParser, Bounded, add_switch, run_main
from utils.errors import UserError


def check_parser() -> ArgumentParser:
    """Parser of `python -m data.check`."""
    parser = ArgumentParser(prog="python -m data.check", description=(
        "Look at a dataset before training on it."))
    parser.add_argument("data", nargs="?", default=None, metavar="DATA",
                        help="what train.py takes as --data: a .yaml file or a folder")
    for name in ("train", "valid"):
        parser.add_argument("--{}_images".format(name), default=None, metavar="FOLDER")
        parser.add_argument("--{}_info".format(name), default=None, metavar="JSON")
    parser.add_argument("--config", default="yolact_base", help="recipe the data is for")
    parser.add_argument("--dataset", default=None, help="layout; default: the recipe's")
    add_switch(parser, "--strict", help="exit with 2 if anything is found")
    add_switch(parser, "--quick", help="look at the annotations only, open no image")
    parser.add_argument("--pictures", default="results/first_batch.png", metavar="PNG",
                        help="where the first batch goes; '' draws none")
    parser.add_argument("--seed", type=Bounded(int, 0), default=0, help="of the first batch")
    parser.add_argument("--num_workers", type=Bounded(int, 1), default=2,
                        help="threads that read images")
    return parser


def open_splits(args: argparse.Namespace, layout: str) -> List[CocoDataset]:
    """Training and, where there is one, validation data."""
    splits = [open_dataset(layout, args.data, args.train_images, args.train_info, "train")]
    described = find_dataset_file(args.data)
    pairs = args.train_images is not None or described is not None
    if args.valid_images is None and args.valid_info is None and pairs and not (
            described is not None and "val" in read_dataset_file(described).splits):
        return splits
    return splits + [open_dataset(layout, args.data, args.valid_images, args.valid_info, "val")]


def image_findings(splits: List[CocoDataset], memory: Memory,
                   workers: int) -> Tuple[List[str], List[str]]:
    """Sentences about the files themselves, and the paths of those that cannot be used.

    Every image is read once and remembered.
    """
    checks = [ImageCheck(name, dataset, memory, workers, _progress)
              for name, dataset in zip(("train", "val"), splits)]
    return ([text for check in checks for text in check.findings()] + content_findings(checks),
            [path for check in checks for path in check.unusable])


def check(args: argparse.Namespace) -> int:
    """Print everything; returns the exit code."""
    config = get_config(args.config)
    splits = open_splits(args, args.dataset or config.dataset)
    train, val = splits[0], (splits[1] if len(splits) > 1 else None)
    statistics = [measure(name, dataset) for name, dataset in zip(("train", "val"), splits)]
    print("\n".join(table(statistics, config.max_size)), flush=True)
    found = annotation_findings(train, val)
    if not args.quick:
        memory = Memory(train.annotation_file)
        images, files = image_findings(splits, memory, args.num_workers)
        keep_full(memory, train, val, images, files)
        if val is not None:  # a training that does not validate opens train alone
            keep_full(memory, train, None,
                      [text for text in images if text.startswith("train: ")], files)
        memory.save(forget=True)
        found += images
    if val is None:
        print("\nno validation split: training cannot be scored")
    print("\n" + ("{} finding{}:".format(len(found), "" if len(found) == 1 else "s") if found
                  else "Nothing wrong was found."))
    print("\n".join("  - " + text for text in found) + ("\n" if found else ""))
    if not args.quick:
        print("".join("{}\n\n".format(note) for name, dataset in zip(("train", "val"), splits)
                      for note in turned_notes(name, dataset)), end="")
    print("For {}:".format(config.name))
    print("\n".join("  - " + text for text in suggestions(statistics[0], config)))
    _draw(args, train)
    return EXIT_USER_ERROR if found and args.strict else 0


def _draw(args: argparse.Namespace, train: CocoDataset) -> None:
    if not args.pictures or args.quick:
        return
    try:
        count = write_first_batch(train, get_config(args.config), args.pictures, seed=args.seed)
    except UserError as problem:
        print("The first batch cannot be drawn: {}".format(problem))
        return
    print("The first {} images as the network sees them: {}".format(count, args.pictures))


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == total):
        end = "\n" if done == total else ""
        print("\rreading images: {} of {}".format(done, total), end=end, file=sys.stderr,
              flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """Command line entry."""
    return check(check_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
