"""Find and open a dataset: a COCO layout, a data.yaml, another tool's folder, or files by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Sequence

import numpy as np

from data.coco import CocoDataset
from data.convert import cached_conversion, expected_layouts, recognise
from data.description import EXAMPLE, FOLDER_FILE, DatasetFile, Split, read_dataset_file
from utils.errors import UserError, nearest
from utils.files import similar

_SUFFIXES = (".yaml", ".yml", ".json")
_SUFFIX = "_dataset"
"""The original's names of layouts end so."""
_LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "coco2017": {"train": ("train2017", "annotations/instances_train2017.json"),
                 "val": ("val2017", "annotations/instances_val2017.json")},
    "coco2014": {"train": ("train2014", "annotations/instances_train2014.json"),
                 "val": ("val2014", "annotations/instances_val2014.json")},
    "coco2017_testdev": {"train": ("train2017", "annotations/instances_train2017.json"),
                         "val": ("test2017", "annotations/image_info_test-dev2017.json")},
    "pascal_sbd": {"train": ("img", "pascal_sbd_train.json"),
                   "val": ("img", "pascal_sbd_val.json")}}
_ALL_IMAGES = "images"
"""Where the original has those of all splits."""
_PLACES = {"pascal_sbd": "data/sbd"}
_PLACE = "data/coco"
"""Where the original looks for a dataset."""


def open_dataset(layout: str, root: str | None, images: str | None, info: str | None,
                 split: str, allow_empty: bool = False) -> CocoDataset:
    """Load one split, `train` or `val`; images are not opened.

    `root` is --data, a folder with this layout or a description; `images` and `info` are
    --train_images and --train_info or those of validation, and win over it. With `allow_empty` a
    dataset without a single object is none of the errors.

    Raises:
        UserError: something is missing or inconsistent, class names differ from those of the
            description, or there is no object to learn or score.
    """
    place, described = find_dataset(layout, root, images, info, split)
    dataset = CocoDataset(*place)
    if described is not None:
        _check_names(described, dataset)
        dataset.origin = described.origin
    if not allow_empty:
        refuse_empty(dataset, range(len(dataset)))
    return dataset


def refuse_empty(dataset: CocoDataset, indices: Sequence[int]) -> None:
    """Raise a `UserError` if there is no object to learn or score in these images."""
    report, packed = dataset.report, dataset.annotations
    if report.objects == 0:
        lost = "".join(f"; {text}" for text in report.sentences()[1:])
        raise UserError(f"{report.file}: of {report.annotations} annotations none is an object to "
                        f"learn or score ({report.crowds} are crowds, {report.dropped} were "
                        f"dropped{lost}); python -m data.check shows what the file holds")
    if not np.isin(packed.owners[~packed.crowd], indices).any():
        raise UserError(f"{report.file}: none of the {len(indices)} images that were chosen shows "
                        "an object to score; choose more")


def find_dataset(layout: str, root: str | None, images: str | None, info: str | None,
                 split: str) -> tuple[Split, DatasetFile | None]:
    """Image folder and annotation file from what the command line gave, as for `open_dataset`, and
    the description that names them, where one does.

    Raises:
        UserError: nothing was given, or half of a pair, or what was given is not there.
    """
    prefix = "train" if split == "train" else "valid"
    if (images is None) != (info is None):
        raise UserError(f"--{prefix}_images and --{prefix}_info belong together; give both or "
                        "neither")
    if images is not None and info is not None:
        return (Path(images), Path(info)), None
    described = describe(layout, root)
    root = root or default_root(layout)
    if root is None:
        parts = ", ".join(_LAYOUTS.get(layout_name(layout), {}).get(split, ()))
        raise UserError(f"no dataset: give --data=FOLDER (layout {layout}: {parts}), "
                        f"--data=FILE.yaml (see docs/data.md), or --{prefix}_images and "
                        f"--{prefix}_info")
    if described is None:
        return dataset_paths(layout, root, split), None
    if split not in described.splits:
        raise UserError(f"{described.path}: has no '{split}', only {', '.join(described.splits)}; "
                        f"{EXAMPLE.replace('train', split)}")
    for part in _missing(described.splits[split]):
        raise UserError(f"{described.path}: '{split}' names {part.absolute()}, which was not found "
                        f"(paths are relative to the file they stand in){similar(part)}")
    return described.splits[split], described


def describe(layout: str, root: str | None) -> DatasetFile | None:
    """The description that --data means: itself, the one in its folder, or that of a folder of
    another tool, which is converted into the user's cache; None where there is none.

    Raises:
        UserError: the description or the other tool's folder cannot be read.
    """
    root = root or default_root(layout)
    path = find_dataset_file(root)
    described = None if path is None else read_dataset_file(path)
    source = path or Path(root or "").expanduser()
    kind: str | None = "yolo"
    if path is None:
        if root is None or not os.path.isdir(str(source)) or _is_layout(layout, source):
            return None
        kind, source = recognise(source)
    if described is None and kind is not None:
        made, origin = cached_conversion(kind, source)
        described = read_dataset_file(made)
        assert described is not None
        described.origin = origin
    return described


def layout_name(name: str) -> str:
    """`coco2017` for the original's `coco2017_dataset`."""
    return name[:-len(_SUFFIX)] if name.endswith(_SUFFIX) else name


def default_root(layout: str) -> str | None:
    """Where the original looks for its datasets, below the current folder, if it is there."""
    place = _PLACES.get(layout_name(layout), _PLACE)
    return place if Path(place).is_dir() else None


def _is_layout(layout: str, root: Path) -> bool:
    """Whether a folder has an annotation file of a known layout."""
    return any((root / file).exists()
               for _, file in _LAYOUTS.get(layout_name(layout), {}).values())


def _missing(split: Split) -> list[Path]:
    """Those of image folder and annotation file that are not there."""
    images, annotations = split
    # A name that is too long makes pathlib raise.
    return ([] if os.path.isdir(str(images)) else [images]) + (
        [] if os.path.isfile(str(annotations)) else [annotations])


def dataset_paths(layout: str, root: str | Path, split: str) -> Split:
    """Image folder and annotation file of one split of a known layout below `root`.

    Raises:
        UserError: an unknown layout, or something of it is missing; says what was looked for and
            what layout is expected.
    """
    layout = layout_name(layout)
    if layout not in _LAYOUTS:
        raise UserError(f"unknown dataset layout '{layout}'{nearest(layout, _LAYOUTS) or '.'} "
                        f"Known: {', '.join(_LAYOUTS)}.")
    root, parts = Path(root).expanduser(), _LAYOUTS[layout][split]
    expected = f"the {layout} layout expects {parts[0]}/ and {parts[1]} in the data folder"
    if not os.path.isdir(str(root)):
        found = "is not a folder" if os.path.exists(str(root)) else "not found"
        raise UserError(f"data folder {found}: looked for {root.absolute()}; {expected}")
    images, annotations = root / parts[0], root / parts[1]
    if not images.is_dir() and (root / _ALL_IMAGES).is_dir() and annotations.is_file():
        images = root / _ALL_IMAGES
    for path in _missing((images, annotations)):
        what = "image folder" if path == images else "annotation file"
        here = root.absolute()
        near = [here.parent] + sorted(path for path in here.iterdir() if path.is_dir())[:50]
        hint = "".join(f"; did you mean {folder}?" for folder in near
                       if all((folder / part).exists() for part in parts))
        if not hint and path == images and not _is_layout(layout, root):
            hint = f"; {expected_layouts(root)}"
        raise UserError(f"{what} not found: looked for {path.absolute()}; {expected}{hint}")
    return images, annotations


def find_dataset_file(root: str | Path | None) -> Path | None:
    """The description that `--data` means: itself, or the one in its folder; None if neither."""
    if root is None:
        return None
    path = Path(root).expanduser()
    if path.suffix.lower() in _SUFFIXES and not os.path.isdir(str(path)):
        return path
    inside = path / FOLDER_FILE
    return inside if os.path.isfile(str(inside)) else None


def _check_names(described: DatasetFile, dataset: CocoDataset) -> None:
    """Raise a `UserError` with the first difference between the names given and those found."""
    names, found = described.names, dataset.class_names
    if names is None or names == found:
        return
    where = next((n for n, (a, b) in enumerate(zip(names, found)) if a != b),
                 min(len(names), len(found)))
    expected, there = (f"'{some[where]}'" if where < len(some) else "nothing"
                       for some in (names, found))
    raise UserError(f"{described.path}: class {where + 1} of names is {expected}, but category "
                    f"{where + 1} of {dataset.annotation_file} is {there} ({len(names)} names, "
                    f"{len(found)} categories in the order of their ids); correct names or leave "
                    "it out")
