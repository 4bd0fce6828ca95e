"""Look at a dataset before training on it: `python -m data.check my.yaml`.

Counts, sizes and classes as a table, everything that is wrong as sentences, suggestions for the
recipe, and a picture of the first batch as the network sees it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np

from data.coco import CocoDataset
from data.config import Config, get_config
from data.datasets import find_dataset_file, open_dataset, read_dataset_file
from data.tools.image_checks import (
    ImageCheck,
    Memory,
    class_findings,
    content_findings,
    file_stamp,
    file_state,
    overlap_findings,
    turned_notes,
)
from data.tools.statistics import measure, object_findings, suggestions, table
from utils.cli import EXIT_USER_ERROR, ArgumentParser, Bounded, add_switch, run_main
from utils.drawing import draw_instances, side_by_side
from utils.errors import UserError
from utils.files import write_whole

FULL = "full check "
_SHOWN = 5
_HEADERS = 2000
"""Images of a split whose headers are read before each training."""


def annotation_findings(train: CocoDataset, val: Optional[CocoDataset]) -> List[str]:
    """Sentences about both splits' annotations and how they go together."""
    found = object_findings("train", train)
    if val is None:
        return found + class_findings(measure("train", train), None)
    found += object_findings("val", val)
    found += class_findings(measure("train", train), measure("val", val))
    return found + overlap_findings(train, val)


def quick_check(train: CocoDataset, val: Optional[CocoDataset], config: Config,
                strict: bool = False) -> List[str]:
    """Lines to print before training; the same files are looked at once.

    What the annotation file's own report says is not repeated. Unreadable images are known where
    `python -m data.check` was run before.

    Raises:
        UserError: `strict`, and something was found.
    """
    memory = Memory(train.annotation_file)
    stamp = quick_stamp(train, val)
    kept = memory.recall(stamp)
    if kept is None:
        kept = json.dumps(annotation_findings(train, val))
        memory.keep(stamp, kept)
        memory.save()
    found = json.loads(kept)
    full = _recall_full(memory, FULL + stamp)
    found += full or []
    if strict and found:
        raise UserError("the data check found: {}".format("; ".join(found)))
    said = set(train.report.sentences()) | set(val.report.sentences() if val else [])
    new = [text for text in found if text.split(": ", 1)[-1] not in said]
    lines = ["Data check : {}{}".format(
        "nothing found" if not found else "{} finding{}".format(
            len(found), "" if len(found) == 1 else "s"),
        "" if full is not None else " in the annotations; python -m data.check reads the images "
        "too")]
    lines += ["  " + text for text in new[:_SHOWN]]
    if len(new) > _SHOWN:
        lines.append(f"  ... and {len(new) - _SHOWN} more; python -m data.check shows them")
    splits = {"train": train} if val is None else {"train": train, "val": val}
    for name, dataset in splits.items():
        lines += ["  " + note for note in turned_notes(name, dataset, _HEADERS)]
    return lines + ["  suggestion: " + text for text in suggestions(measure("train", train), config)
                    if "--pred_scales" in text]


def keep_full(memory: Memory, train: CocoDataset, val: Optional[CocoDataset],
              findings: Sequence[str], files: Sequence[str]) -> None:
    """Remember what a check of the images found in `files`, until one of these changes."""
    memory.keep(FULL + quick_stamp(train, val), json.dumps(
        {"findings": list(findings), "files": [[path, file_state(path)] for path in files]}))


def _recall_full(memory: Memory, stamp: str) -> Optional[List[str]]:
    """Findings that `keep_full` remembered; None for none, or where a file was seen to since."""
    kept = json.loads(memory.recall(stamp) or "null")
    if kept is None or any(file_state(path) != state for path, state in kept["files"]):
        return None
    return kept["findings"]


def quick_stamp(train: CocoDataset, val: Optional[CocoDataset]) -> str:
    """Changes with the annotation files and the image folders' names."""
    parts = [part for dataset in (train, val) if dataset is not None
             for part in (file_stamp(dataset.annotation_file), dataset.images_dir)]
    return " | ".join(parts)


_COLUMNS = 4
_SIDE = 400
"""Smaller inputs are shown enlarged to about this many pixels, larger ones reduced."""


def write_first_batch(dataset: CocoDataset, config: Config, path: str, count: int = 8,
                      seed: int = 0) -> int:
    """Draw the first batch of a training with this seed; returns the number of images.

    Raises:
        UserError: an image cannot be read, or the picture not be written.
    """
    from data.batch import Batch  # PyTorch is needed for this alone
    from data.loader import build_train_loader

    count = min(count, len(dataset))
    # Images, boxes and masks of a batch do not depend on the priors: any will do, if there is one
    # for each object.
    priors = np.tile(np.array([[0.5, 0.5, 1.0, 1.0]], np.float32), (dataset.max_objects + 1, 1))
    config = config.replace(num_classes=len(dataset.categories) + 1)
    loader = build_train_loader(dataset, config, priors, batch_size=count, seed=seed)
    batch = next(iter(loader))
    assert isinstance(batch, Batch)
    names = dataset.class_names
    zoom = max(1, _SIDE // config.max_size)
    side = config.max_size * zoom if zoom > 1 else min(config.max_size, _SIDE)
    pictures, titles = [], []
    for n in range(count):
        rows = np.flatnonzero(batch.gt_labels[n].numpy() > 0)
        image = cv2.resize(np.ascontiguousarray(batch.images[n].numpy()[::-1].transpose(1, 2, 0)),
                           (side, side), interpolation=cv2.INTER_AREA if zoom == 1
                           else cv2.INTER_CUBIC)
        masks = [cv2.resize(batch.gt_masks[n, row].numpy(), (side, side),
                            interpolation=cv2.INTER_NEAREST) > 0 for row in rows]
        pictures.append(draw_instances(
            image, batch.gt_boxes[n].numpy()[rows] * side, masks,
            [names[label - 1] for label in batch.gt_labels[n].numpy()[rows]], class_names=names))
        titles.append("image {}: {} object{}".format(
            int(batch.image_ids[n]), len(rows), "" if len(rows) == 1 else "s"))
    data = cv2.imencode(".png", _grid(pictures, titles))[1].tobytes()
    write_whole(path, lambda stream: stream.write(data))
    return count


def _grid(pictures: List[np.ndarray], titles: List[str]) -> np.ndarray:
    rows = [side_by_side(pictures[n:n + _COLUMNS], titles[n:n + _COLUMNS])
            for n in range(0, len(pictures), _COLUMNS)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([cv2.copyMakeBorder(
        row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for row in rows])


def check_parser() -> ArgumentParser:
    """Parser of `python -m data.check`."""
    parser = ArgumentParser(prog="python -m data.check", description=(
        "Look at a dataset before training on it."))
    parser.add_argument("data", nargs="?", default=None, metavar="DATA",
                        help="what train.py takes as --data: a .yaml file or a folder")
    for name in ("train", "valid"):
        parser.add_argument(f"--{name}_images", default=None, metavar="FOLDER")
        parser.add_argument(f"--{name}_info", default=None, metavar="JSON")
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
        print("".join(f"{note}\n\n" for name, dataset in zip(("train", "val"), splits)
                      for note in turned_notes(name, dataset)), end="")
    print(f"For {config.name}:")
    print("\n".join("  - " + text for text in suggestions(statistics[0], config)))
    _draw(args, train)
    return EXIT_USER_ERROR if found and args.strict else 0


def _draw(args: argparse.Namespace, train: CocoDataset) -> None:
    if not args.pictures or args.quick:
        return
    try:
        count = write_first_batch(train, get_config(args.config), args.pictures, seed=args.seed)
    except UserError as problem:
        print(f"The first batch cannot be drawn: {problem}")
        return
    print(f"The first {count} images as the network sees them: {args.pictures}")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == total):
        end = "\n" if done == total else ""
        print(f"\rreading images: {done} of {total}", end=end, file=sys.stderr,
              flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """Command line entry."""
    return check(check_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
