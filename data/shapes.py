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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Tuple

import cv2
import numpy as np

from data.tools.conversion import Outline, run_lengths
from utils.cli import ArgumentParser, run_main
from utils.errors import UserError

VERSION = 3
"""Raised whenever the pixels or the ground truth of a seed change."""

STAMP = "shapes.json"
FIRST_IMAGE_ID = {"train": 1, "val": 1000001}

CLASS_NAMES = ("circle", "square", "triangle", "star")
SPLITS = ("train", "val")

MIN_RADIUS, MAX_RADIUS = 16, 64
MAX_OBJECTS = 5
MIN_VISIBLE = 0.4
EMPTY_SHARE, CROWD_SHARE = 0.03, 0.06
PLACING_TRIES = 12
MIN_CONTRAST = 170
"""Least sum over BGR of the differences between a shape's colour and what lies under it."""

Place = Tuple[slice, slice]
"""Rows and columns of the canvas."""

_CORNERS = {"circle": 36, "square": 4, "triangle": 3, "star": 10}
_FINE = 8  # samples along a pixel's side
_SHIFT = 4  # fractional bits of OpenCV's coordinates


@dataclass
class ShapeObject:
    """One object (or crowd) of a scene; later ones lie over earlier ones.

    Attributes:
        label: index into `CLASS_NAMES`.
        points: outline of the whole shape, float64 `[n, 2]` x, y in pixels; None for a crowd.
        visible: bool `[h, w]`, what later objects have left of it.
        area: pixels of the whole object.
    """

    label: int
    points: np.ndarray | None
    visible: np.ndarray
    area: int


@dataclass
class Scene:
    """An image, uint8 `[h, w, 3]` BGR, and its objects in drawing order."""

    image: np.ndarray
    objects: list[ShapeObject]


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draw image `index` of a split; it depends on nothing but these three values."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    height, width = (8 * rng.integers(23, 28, 2)).tolist()
    canvas = _background(rng, height, width)
    objects: list[ShapeObject] = []
    if rng.random() >= EMPTY_SHARE:
        if rng.random() < CROWD_SHARE:
            _add_crowd(rng, canvas, objects)
        for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
            _add_shape(rng, canvas, objects)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects)


def annotate(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations of a scene without `id` and `image_id`; categories count from 1.

    A shape in full view has its own outline; a partly hidden one, and a crowd, the run lengths of
    what is visible.
    """
    annotations = []
    for item in scene.objects:
        area = int(item.visible.sum())
        outline: Outline = run_lengths(item.visible)
        box = [float(side) for side in cv2.boundingRect(item.visible.astype(np.uint8))]
        if item.points is not None and area == item.area:
            outline = [item.points.ravel().tolist()]
            low, high = item.points.min(axis=0), item.points.max(axis=0)
            box = np.concatenate([low, high - low]).tolist()
        annotations.append({"category_id": item.label + 1, "iscrowd": int(item.points is None),
                            "area": area, "bbox": box, "segmentation": outline})
    return annotations


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float64 `[h, w, 3]`: base colour, gradient, three octaves of noise and clutter lines."""
    slope = rng.integers(-40, 41, (2, 3))
    y, x = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[None, :, None]
    canvas = rng.integers(50, 206, 3) + slope[0] * y + slope[1] * x
    for cell, strength, channels in ((32, 28, 3), (8, 12, 1), (4, 8, 1)):
        canvas += _noise(rng, (height, width, channels), cell, strength)
    canvas = np.clip(canvas, 0, 255)
    for _ in range(rng.integers(2, 8)):
        angle = np.radians(rng.integers(360))
        along = np.array([np.cos(angle), np.sin(angle)]) * rng.integers(15, 91)
        across = np.array([-np.sin(angle), np.cos(angle)]) * rng.uniform(0.6, 1.5)
        corners = [along + across, along - across, -along - across, across - along]
        place, cover = _cover(rng.uniform(0, [width, height]) + corners, canvas)
        _blend(canvas, place, rng.integers(0, 256, 3), cover)
    return canvas


def _noise(rng: np.random.Generator, shape: tuple[int, ...], cell: int,
           strength: int) -> np.ndarray:
    """Random values, `cell` pixels apart, with what lies between interpolated."""
    rows, columns = shape[0] // cell + 2, shape[1] // cell + 2
    lattice = rng.integers(-strength, strength + 1, (rows, columns) + shape[2:])
    blown = cv2.resize(lattice.astype(np.float32), (columns * cell, rows * cell),
                       interpolation=cv2.INTER_LINEAR)
    half = cell // 2
    return blown[half:half + shape[0], half:half + shape[1]].reshape(shape)


def _shape_points(rng: np.random.Generator, label: int, radius: int,
                  centre: np.ndarray) -> np.ndarray:
    """Outline of a turned shape, float64 `[n, 2]` in whole eighths of a pixel."""
    corners = _CORNERS[CLASS_NAMES[label]]
    angles = np.radians(rng.integers(360) + np.arange(corners) * (360 / corners))
    reach = np.full((corners, 1), float(radius))
    if CLASS_NAMES[label] == "star":
        reach[1::2] *= 0.45
    points = centre + reach * np.column_stack([np.cos(angles), np.sin(angles)])
    return np.rint(points * 8) / 8


def _add_shape(rng: np.random.Generator, canvas: np.ndarray, objects: list[ShapeObject]) -> None:
    """Place one shape so that every earlier object stays visible enough, and paint it."""
    size = np.array(canvas.shape[1::-1])
    label = int(rng.integers(len(CLASS_NAMES)))
    for attempt in range(PLACING_TRIES):
        radius = int(rng.integers(MIN_RADIUS, MAX_RADIUS - attempt * 4 + 1))
        points = _shape_points(rng, label, radius, rng.uniform(radius, size - radius))
        region = _region(points, canvas)
        if all((item.visible & ~region).sum() >= MIN_VISIBLE * item.area for item in objects):
            _put(objects, ShapeObject(label, points, region, int(region.sum())))
            _paint_shape(rng, canvas, points, radius, _contrasting(rng, canvas[region]))
            return


def _add_crowd(rng: np.random.Generator, canvas: np.ndarray, objects: list[ShapeObject]) -> None:
    """Paint a tight group of small shapes of one class and annotate them as one crowd."""
    label = int(rng.integers(len(CLASS_NAMES)))
    x, y = rng.integers(45, np.array(canvas.shape[1::-1]) - 45 + 1)
    color = _contrasting(rng, canvas[y - 20:y + 20, x - 20:x + 20].reshape(-1, 3))
    region = np.zeros(canvas.shape[:2], dtype=bool)
    for _ in range(rng.integers(7, 14)):
        radius = int(rng.integers(7, 11))
        points = _shape_points(rng, label, radius, [x, y] + rng.integers(-32, 33, 2))
        _paint_shape(rng, canvas, points, radius, color + rng.integers(-25, 26, 3))
        region |= _region(points, canvas)
    _put(objects, ShapeObject(label, None, region, int(region.sum())))


def _put(objects: list[ShapeObject], new: ShapeObject) -> None:
    for item in objects:
        item.visible &= ~new.visible
    objects.append(new)


def _contrasting(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour that stands out from the pixels `under` (`[n, 3]`) it will cover."""
    candidates = rng.integers(10, 246, (8, 3))
    contrast = np.abs(candidates - under.mean(axis=0)).sum(axis=1)
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    return candidates[enough[0] if len(enough) else int(contrast.argmax())]


def _cover(points: np.ndarray, canvas: np.ndarray) -> tuple[Place, np.ndarray]:
    """Where on the canvas a polygon lies, and how much of each pixel there it covers (0..1)."""
    size = canvas.shape[1::-1]
    left, top = np.clip(np.floor(points.min(axis=0)), 0, size).astype(int).tolist()
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, size).astype(int).tolist()
    width, height = max(right - left, 1), max(bottom - top, 1)
    fine = np.zeros((height * _FINE, width * _FINE), np.uint8)
    # To OpenCV a pixel's centre is a whole number.
    fixed = ((points - [left, top]) * _FINE - 0.5) * (1 << _SHIFT)
    cv2.fillPoly(fine, [np.rint(fixed).astype(np.int32)], 255, shift=_SHIFT)
    cover = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA) / 255
    return (slice(top, bottom), slice(left, right)), cover[:bottom - top, :right - left]


def _region(points: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Bool `[h, w]`, pixels at least half inside the polygon."""
    place, cover = _cover(points, canvas)
    region = np.zeros(canvas.shape[:2], dtype=bool)
    region[place] = cover >= 0.5
    return region


def _blend(canvas: np.ndarray, place: Place, color: np.ndarray, cover: np.ndarray) -> None:
    """Mix a colour, of all pixels or of each, into the canvas as far as `cover` (0..1) says."""
    canvas[place] += (color - canvas[place]) * cover[:, :, None]


def _paint_shape(rng: np.random.Generator, canvas: np.ndarray, points: np.ndarray, radius: int,
                 color: np.ndarray) -> None:
    """Paint a shape with a shading across it and some noise."""
    centre = points.mean(axis=0)
    slope = rng.integers(-30, 31, 2) / radius
    place, cover = _cover(points, canvas)
    rows, columns = np.ogrid[place]
    shading = (slope[0] * (columns - centre[0]) + slope[1] * (rows - centre[1])
               + _noise(rng, cover.shape, cell=4, strength=14))
    shaded = np.clip(np.clip(color, 0, 255) + shading[:, :, None], 0, 255)
    _blend(canvas, place, shaded, cover)


def write_dataset(folder: str, seed: int = 0, train: int = 2000, val: int = 300,
                  progress: Callable[[int, int], None] | None = None) -> bool:
    """Write the dataset, or leave it as it is where it is complete with the same parameters.

    It is built beside `folder` and renamed, so that `folder` is never incomplete. A dataset of
    other parameters is replaced.

    `progress` is called with images done and images in all. Returns whether it was written and not
    there already.

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
        if target.exists():
            shutil.rmtree(str(target))
        partial.rename(target)
    except OSError as problem:
        raise UserError(f"cannot write the shapes dataset to {target}: {problem}") from problem
    finally:
        shutil.rmtree(str(partial), ignore_errors=True)
    return True


def _check_target(target: Path) -> dict[str, Any] | None:
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


def _write_splits(folder: Path, stamp: dict[str, Any],
                  progress: Callable[[int, int], None] | None) -> None:
    (folder / "annotations").mkdir(parents=True)
    done, total = 0, stamp["train"] + stamp["val"]
    for split in SPLITS:
        (folder / (split + "2017")).mkdir()
        content: dict[str, Any] = {
            "info": {"description": f"Drawn shapes, {split} split, seed {stamp['seed']}",
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


def _show_progress(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"drawing shapes: {done} of {total} images", flush=True)


def main(argv: list[str]) -> int:
    """Command line: `python -m data.shapes OUT [--seed N] [--train N] [--val N]`."""
    parser = ArgumentParser(prog="python -m data.shapes", description=(
        "Write the embedded dataset of drawn shapes in COCO's format and layout."))
    parser.add_argument("folder", metavar="OUT", help="folder to write; kept if it is complete")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--val", type=int, default=300, help="validation images")
    args = parser.parse_args(argv)
    written = write_dataset(args.folder, args.seed, args.train, args.val, _show_progress)
    print(f"{args.folder}: {args.train} training and {args.val} validation images "
          f"{'written' if written else 'are there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
