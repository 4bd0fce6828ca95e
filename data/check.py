"""Look at a dataset before training on it: `python -m data.check my.yaml`.

Counts, sizes and classes as a table, everything that is wrong as sentences, suggestions for the
recipe, and an image of the first batch as the network sees it.
"""

from __future__ import annotations

import argparse
import os
import sys

import cv2
import numpy as np

from data.coco import CocoDataset
from data.config import Config
from data.config_file import read_recipe
from data.datasets import describe, open_dataset
from data.tools.findings import (
    annotation_findings,
    copy_findings,
    image_findings,
    suggestions,
    table,
    turned_notes,
)
from utils.cli import EXIT_USER_ERROR, ArgumentParser, Bounded, add_switch, print_lines, run_main
from utils.drawing import draw_instances, side_by_side
from utils.errors import UserError, counted
from utils.files import write_whole

_SHOWN = 5
_COLUMNS = 4
_SIDE = 400
"""Smaller inputs are shown enlarged to about this many pixels, larger ones reduced."""


def quick_check(train: CocoDataset, val: CocoDataset | None, config: Config,
                strict: bool = False) -> list[str]:
    """Lines to print before training; no image is opened.

    What the annotation file's own report says is not repeated.

    Raises:
        UserError: `strict`, and something was found.
    """
    splits = {"train": train} if val is None else {"train": train, "val": val}
    found = annotation_findings(splits) + copy_findings(splits, same_name=True)
    if strict and found:
        raise UserError(f"the data check found: {'; '.join(found)}")
    said = {text for dataset in splits.values() for text in dataset.report.sentences()}
    new = [text for text in found if text.split(": ", 1)[-1] not in said]
    lines = [f"Data check : {counted(len(found), 'finding') if found else 'nothing found'} in the "
             "annotations; python -m data.check reads the images too"]
    lines += ["  " + text for text in new[:_SHOWN]]
    if len(new) > _SHOWN:
        lines.append(f"  ... and {len(new) - _SHOWN} more; python -m data.check shows them")
    return lines + ["  suggestion: " + text for text in suggestions(train, config)
                    if ": --" in text]


def write_first_batch(dataset: CocoDataset, config: Config, path: str, count: int = 8,
                      seed: int = 0) -> int:
    """Draw the first batch of a training with this seed; returns the number of images.

    Raises:
        UserError: an image cannot be read, or the drawing not be written.
    """
    from data.loader import TrainDataset, TrainLoader  # PyTorch is needed for this alone

    count = min(count, len(dataset))
    # Images, boxes and masks of a batch do not depend on the priors: any will do, if there is one
    # for each object.
    priors = np.tile(np.array([[0.5, 0.5, 1.0, 1.0]], np.float32), (dataset.max_objects + 1, 1))
    config = config.replace(num_classes=len(dataset.categories) + 1)
    samples = TrainDataset.from_config(dataset, config, lambda recipe: priors, seed)
    batch = next(iter(TrainLoader(samples, count)))
    names = dataset.class_names
    zoom = max(1, _SIDE // config.max_size)
    side = config.max_size * zoom if zoom > 1 else min(config.max_size, _SIDE)
    drawn, titles = [], []
    for n in range(count):
        rows = np.flatnonzero(batch.gt_labels[n].numpy() > 0)
        image = cv2.resize(np.ascontiguousarray(batch.images[n].numpy()[::-1].transpose(1, 2, 0)),
                           (side, side), interpolation=cv2.INTER_AREA if zoom == 1
                           else cv2.INTER_CUBIC)
        masks = [cv2.resize(batch.gt_masks[n, row].numpy(), (side, side),
                            interpolation=cv2.INTER_NEAREST) > 0 for row in rows]
        drawn.append(draw_instances(
            image, batch.gt_boxes[n].numpy()[rows] * side, masks,
            [names[label - 1] for label in batch.gt_labels[n].numpy()[rows]], class_names=names))
        titles.append(f"image {int(batch.image_ids[n])}: {counted(len(rows), 'object')}")
    columns = min(_COLUMNS, count)
    while len(drawn) % columns:
        drawn.append(np.full_like(drawn[0], 255))
        titles.append("")
    grid = np.concatenate([side_by_side(drawn[n:n + columns], titles[n:n + columns])
                           for n in range(0, len(drawn), columns)])
    write_whole(path, cv2.imencode(".png", grid)[1].tobytes())
    return count


def check_parser() -> ArgumentParser:
    """Parser of `python -m data.check`."""
    parser = ArgumentParser(prog="python -m data.check", description=(
        "Look at a dataset before training on it."))
    parser.add_argument("data", nargs="?", default=None, metavar="DATA",
                        help="what train.py takes as --data: a .yaml file or a folder")
    for name in ("train", "valid"):
        parser.add_argument(f"--{name}_images", default=None, metavar="FOLDER")
        parser.add_argument(f"--{name}_info", default=None, metavar="JSON")
    parser.add_argument("--config", default="yolact_base", metavar="NAME|FILE.yaml",
                        help="recipe the data is for, or a file as for train.py")
    parser.add_argument("--dataset", default=None, help="layout; default: the recipe's")
    add_switch(parser, "--strict", help="exit with 2 if anything is found")
    add_switch(parser, "--quick", help="look at the annotations only, open no image")
    parser.add_argument("--pictures", default="results/first_batch.png", metavar="PNG",
                        help="where the first batch goes; '' draws none")
    parser.add_argument("--seed", type=Bounded(int, 0), default=0, help="of the first batch")
    parser.add_argument("--num_workers", type=Bounded(int, 1), default=2,
                        help="threads that read images")
    return parser


def _open_splits(args: argparse.Namespace, layout: str) -> dict[str, CocoDataset]:
    splits = {"train": open_dataset(layout, args.data, args.train_images, args.train_info, "train",
                                    allow_empty=True)}
    given = args.valid_images is not None or args.valid_info is not None
    described = None if given else describe(layout, args.data)
    if given or (described is None and args.train_images is None) or (
            described is not None and "val" in described.splits):
        splits["val"] = open_dataset(layout, args.data, args.valid_images, args.valid_info, "val",
                                     allow_empty=True)
    return splits


def _refuse_replacing(pictures: str, splits: dict[str, CocoDataset]) -> None:
    """Raise a `UserError` where the drawing would replace an image, or a file of another kind."""
    name = os.path.basename(pictures)
    images = (path for dataset in splits.values()
              for path in map(dataset.image_path, range(len(dataset)))
              if os.path.basename(path) == name)
    if pictures and (not name.lower().endswith(".png") or os.path.realpath(pictures) in map(
            os.path.realpath, images)):
        raise UserError(f"--pictures is '{pictures}', expected the name of a .png file that is no "
                        "image of the dataset")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == total):
        print(f"\rreading images: {done} of {total}", end="\n" if done == total else "",
              file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line entry: print everything; returns the exit code."""
    args = check_parser().parse_args(argv)
    config = read_recipe(args.config)[0]
    splits = _open_splits(args, args.dataset or config.dataset)
    _refuse_replacing(args.pictures, splits)
    print_lines([splits["train"].origin] * bool(splits["train"].origin) + table(splits))
    found = annotation_findings(splits)
    if not args.quick:
        found += image_findings(splits, args.num_workers, _progress)
    found += copy_findings(splits, same_name=args.quick)
    if "val" not in splits:
        print_lines(["", "no validation split: training cannot be scored"])
    print_lines(["", f"{counted(len(found), 'finding')}:" if found else "Nothing wrong was found.",
                 *("  - " + text for text in found), ""])
    for note in turned_notes(splits) if not args.quick else ():
        print_lines([note, ""])
    print_lines([f"For {config.name}:",
                 *("  - " + text for text in suggestions(splits["train"], config))])
    if args.pictures and not args.quick:
        try:
            count = write_first_batch(splits["train"], config, args.pictures, seed=args.seed)
            print(f"The first {count} images as the network sees them: {args.pictures}")
        except UserError as problem:
            print_lines([f"The first batch cannot be drawn: {problem}"])
    return EXIT_USER_ERROR if found and args.strict else 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
