"""Look at a dataset before training on it: `python -m data.check my.yaml`.

Counts, sizes and classes as a table, everything that is wrong as sentences, suggestions for the
recipe, and an image of the first batch as the network sees it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Dict, List, Optional, Sequence

import cv2
import numpy as np

from data.coco import CocoDataset
from data.config import Config, get_config
from data.datasets import find_dataset_file, open_dataset, read_dataset_file
from data.tools.findings import (
    FindingsCache,
    annotation_findings,
    counted,
    file_state,
    image_findings,
    overlap_findings,
    turned_notes,
)
from data.tools.statistics import measure, suggestions, table
from utils.cli import EXIT_USER_ERROR, ArgumentParser, Bounded, add_switch, run_main
from utils.drawing import draw_instances, side_by_side
from utils.errors import UserError
from utils.files import write_whole

_SHOWN = 5
_COLUMNS = 4
_SIDE = 400
"""Smaller inputs are shown enlarged to about this many pixels, larger ones reduced."""

Splits = Dict[str, CocoDataset]
"""Training data as `train` and, where there is any, validation data as `val`."""


def quick_check(train: CocoDataset, val: Optional[CocoDataset], config: Config,
                strict: bool = False) -> List[str]:
    """Lines to print before training; annotation files that did not change are looked at once.

    What the annotation file's own report says is not repeated. Unreadable images are known where
    `python -m data.check` was run before.

    Raises:
        UserError: `strict`, and something was found.
    """
    splits = {"train": train} if val is None else {"train": train, "val": val}
    cache = FindingsCache(train.annotation_file)
    kept = cache.recall("annotations of " + _state(splits))
    if kept is None:
        kept = json.dumps(annotation_findings(splits))
        cache.keep("annotations of " + _state(splits), kept)
        cache.save()
    found = json.loads(kept)
    of_images = _recall_images(cache, splits)
    if of_images is not None:
        found += of_images
    elif val is not None:
        found += overlap_findings(train, val)
    if strict and found:
        raise UserError(f"the data check found: {'; '.join(found)}")
    said = {text for dataset in splits.values() for text in dataset.report.sentences()}
    new = [text for text in found if text.split(": ", 1)[-1] not in said]
    line = f"Data check : {counted(len(found), 'finding') if found else 'nothing found'}"
    if of_images is None:
        line += " in the annotations; python -m data.check reads the images too"
    lines = [line] + ["  " + text for text in new[:_SHOWN]]
    if len(new) > _SHOWN:
        lines.append(f"  ... and {len(new) - _SHOWN} more; python -m data.check shows them")
    return lines + ["  suggestion: " + text for text in suggestions(measure("train", train), config)
                    if "--pred_scales" in text]


def _state(splits: Splits) -> str:
    """Changes with the annotation files and the image folders' names."""
    return " | ".join(f"{file_state(dataset.annotation_file)} {dataset.images_dir}"
                      for dataset in splits.values())


def _keep_images(cache: FindingsCache, splits: Splits, findings: Sequence[str],
                 files: Sequence[str]) -> None:
    """Remember what was found in the image files, until one of `files` changes."""
    cache.keep("images of " + _state(splits), json.dumps(
        {"findings": list(findings), "files": [[path, file_state(path)] for path in files]}))


def _recall_images(cache: FindingsCache, splits: Splits) -> Optional[List[str]]:
    """Findings that `_keep_images` remembered; None for none, or where a file changed since."""
    kept = json.loads(cache.recall("images of " + _state(splits)) or "null")
    if kept is None or any(file_state(path) != state for path, state in kept["files"]):
        return None
    return kept["findings"]


def write_first_batch(dataset: CocoDataset, config: Config, path: str, count: int = 8,
                      seed: int = 0) -> int:
    """Draw the first batch of a training with this seed; returns the number of images.

    Raises:
        UserError: an image cannot be read, or the drawing not be written.
    """
    from data.loader import build_train_loader  # PyTorch is needed for this alone

    count = min(count, len(dataset))
    # Images, boxes and masks of a batch do not depend on the priors: any will do, if there is one
    # for each object.
    priors = np.tile(np.array([[0.5, 0.5, 1.0, 1.0]], np.float32), (dataset.max_objects + 1, 1))
    config = config.replace(num_classes=len(dataset.categories) + 1)
    batch = next(iter(build_train_loader(dataset, config, priors, batch_size=count, seed=seed)))
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
    data = cv2.imencode(".png", _grid(drawn, titles))[1].tobytes()
    write_whole(path, lambda stream: stream.write(data))
    return count


def _grid(images: List[np.ndarray], titles: List[str]) -> np.ndarray:
    rows = [side_by_side(images[n:n + _COLUMNS], titles[n:n + _COLUMNS])
            for n in range(0, len(images), _COLUMNS)]
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


def _open_splits(args: argparse.Namespace, layout: str) -> Splits:
    splits = {"train": open_dataset(layout, args.data, args.train_images, args.train_info, "train",
                                    allow_empty=True)}
    described = find_dataset_file(args.data)
    pairs = args.train_images is not None or described is not None
    if args.valid_images is not None or args.valid_info is not None or not pairs or (
            described is not None and "val" in read_dataset_file(described).splits):
        splits["val"] = open_dataset(layout, args.data, args.valid_images, args.valid_info, "val",
                                     allow_empty=True)
    return splits


def _check_images(splits: Splits, workers: int) -> List[str]:
    """Findings in the image files, remembered for the quick check."""
    cache = FindingsCache(splits["train"].annotation_file)
    found, files = image_findings(splits, cache, workers, _progress)
    _keep_images(cache, splits, found, files)
    if "val" in splits:  # a training that does not validate opens train alone
        _keep_images(cache, {"train": splits["train"]},
                     [text for text in found if text.startswith("train: ")], files)
    cache.save(forget=True)
    return found


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == total):
        print(f"\rreading images: {done} of {total}", end="\n" if done == total else "",
              file=sys.stderr, flush=True)


def _draw(args: argparse.Namespace, train: CocoDataset, config: Config) -> None:
    try:
        count = write_first_batch(train, config, args.pictures, seed=args.seed)
    except UserError as problem:
        print(f"The first batch cannot be drawn: {problem}")
        return
    print(f"The first {count} images as the network sees them: {args.pictures}")


def main(argv: Optional[List[str]] = None) -> int:
    """Command line entry: print everything; returns the exit code."""
    args = check_parser().parse_args(argv)
    config = get_config(args.config)
    splits = _open_splits(args, args.dataset or config.dataset)
    statistics = [measure(name, dataset) for name, dataset in splits.items()]
    print("\n".join(table(statistics, config.max_size)), flush=True)
    found = annotation_findings(splits)
    if not args.quick:
        found += _check_images(splits, args.num_workers)
    elif "val" in splits:
        found += overlap_findings(splits["train"], splits["val"])
    if "val" not in splits:
        print("\nno validation split: training cannot be scored")
    print(f"\n{counted(len(found), 'finding')}:" if found else "\nNothing wrong was found.")
    print("\n".join("  - " + text for text in found) + ("\n" if found else ""))
    for note in turned_notes(splits) if not args.quick else ():
        print(f"{note}\n")
    print(f"For {config.name}:")
    print("\n".join("  - " + text for text in suggestions(statistics[0], config)))
    if args.pictures and not args.quick:
        _draw(args, splits["train"], config)
    return EXIT_USER_ERROR if found and args.strict else 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
