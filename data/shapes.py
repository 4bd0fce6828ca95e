"""The embedded dataset: drawn shapes with exact ground truth, in COCO's format and layout.

`python -m data.shapes OUT` writes OUT/train2017, OUT/val2017 and OUT/annotations, so whatever takes
a COCO folder takes OUT. Images show one to five circles, squares, triangles and stars, turned,
shaded and noisy, some hidden in part by later ones, on a textured and cluttered ground; a few show
a crowd (a tight group annotated as one region) or nothing at all.

The same seed gives the same pixels and the same ground truth with the same OpenCV and NumPy.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import cv2

from data.tools.synthetic import CLASS_NAMES, SPLITS, annotate, draw_scene
from utils.errors import UserError

VERSION = 2
"""Raised whenever the pixels or the ground truth of a seed change."""

STAMP = "shapes.json"
FIRST_IMAGE_ID = {"train": 1, "val": 1000001}


def write_dataset(folder: str, seed: int = 0, train: int = 2000, val: int = 300,
                  progress: Optional[Callable[[int, int], None]] = None) -> bool:
    """Write the dataset, or leave it as it is where it is complete with the same parameters.

    It is built beside `folder` and renamed, so that `folder` is never incomplete. A dataset of
    other parameters is replaced.

    Args:
        folder: where it goes; must be new, empty or hold such a dataset.
        seed: of all random choices, 0 or more.
        train: number of training images.
        val: number of validation images.
        progress: called with images done and images in all.

    Returns:
        True if it was written, False if it was there already.

    Raises:
        UserError: `folder` holds something else, or cannot be written.
    """
    for name, value, least in (("seed", seed, 0), ("train", train, 1), ("val", val, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; it has to be at least {least}")
    target = Path(folder)
    stamp = {"dataset": "shapes", "version": VERSION, "seed": seed, "train": train, "val": val}
    if _check_target(target) == stamp:
        return False
    partial = target.with_name(f"{target.name}.partial.{os.getpid()}")
    try:
        _write_splits(partial, stamp, progress)
        _replace(target, partial)
    except OSError as problem:
        raise UserError(f"cannot write the shapes dataset to {target}: {problem}") from problem
    finally:
        shutil.rmtree(str(partial), ignore_errors=True)
    return True


def _check_target(target: Path) -> Optional[Dict[str, Any]]:
    """Return the stamp of a dataset that is there; anything else in its place is a UserError."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        stamp = json.loads((target / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stamp = None
    if not isinstance(stamp, dict) or stamp.get("dataset") != "shapes":
        raise UserError(f"{target} exists and is not a shapes dataset (it has no valid {STAMP}); "
                        "nothing was written. Name another folder or remove it.")
    return stamp


def _write_splits(folder: Path, stamp: Dict[str, Any],
                  progress: Optional[Callable[[int, int], None]]) -> None:
    (folder / "annotations").mkdir(parents=True)
    done, total = 0, stamp["train"] + stamp["val"]
    for split in SPLITS:
        (folder / (split + "2017")).mkdir()
        content: Dict[str, Any] = {
            "info": {"description": "Drawn shapes, {} split, seed {}".format(split, stamp["seed"]),
                     "version": str(VERSION)},
            "licenses": [], "images": [], "annotations": [],
            "categories": [{"id": number, "name": name, "supercategory": "shape"}
                           for number, name in enumerate(CLASS_NAMES, 1)]}
        for index in range(stamp[split]):
            scene = draw_scene(stamp["seed"], split, index)
            image_id = FIRST_IMAGE_ID[split] + index
            name = f"{image_id:012d}.png"
            if not cv2.imwrite(str(folder / (split + "2017") / name), scene.image):
                raise OSError(f"image {name} could not be written")
            height, width = scene.image.shape[:2]
            content["images"].append({"id": image_id, "file_name": name, "height": height,
                                      "width": width})
            for annotation in annotate(scene):
                number = len(content["annotations"]) + FIRST_IMAGE_ID[split]
                content["annotations"].append(dict(annotation, id=number, image_id=image_id))
            done += 1
            if progress is not None:
                progress(done, total)
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    (folder / STAMP).write_text(json.dumps(stamp), encoding="utf-8")


def _replace(target: Path, partial: Path) -> None:
    """Put the finished folder in place of an empty or older one."""
    if target.exists():
        old = target.with_name(f"{target.name}.old.{os.getpid()}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(str(old), ignore_errors=True)
    else:
        partial.rename(target)


def _show_progress(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"drawing shapes: {done} of {total} images", flush=True)


def main(argv: List[str]) -> int:
    """Command line: `python -m data.shapes OUT [--seed N] [--train N] [--val N]`."""
    from utils.cli import ArgumentParser  # only the command line needs it

    parser = ArgumentParser(prog="python -m data.shapes", description=(
        "Write the embedded dataset of drawn shapes in COCO's format and layout."))
    parser.add_argument("folder", metavar="OUT", help="folder to write; kept if it is complete")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=300, help="validation images")
    args = parser.parse_args(argv)
    written = write_dataset(args.folder, args.seed, args.train, args.val, _show_progress)
    print("{}: {} training and {} validation images {}".format(
        args.folder, args.train, args.val, "written" if written else "are there already"))
    return 0


if __name__ == "__main__":
    from utils.cli import run_main

    sys.exit(run_main(main, sys.argv[1:]))
