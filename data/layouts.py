"""Which folder and file under a data root belong to which part of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional, Tuple, Union

from data.dataset_yaml import find_dataset_file, split_of_file
from utils.errors import UserError, nearest

_LAYOUTS: Dict[str, Dict[str, Tuple[str, str]]] = {
    "coco2017": {
        "train": ("train2017", "annotations/instances_train2017.json"),
        "val": ("val2017", "annotations/instances_val2017.json"),
        "test": ("test2017", "annotations/image_info_test-dev2017.json"),
    },
    "pascal_sbd": {
        "train": ("img", "pascal_sbd_train.json"),
        "val": ("img", "pascal_sbd_val.json"),
    },
}


def dataset_paths(dataset: str, root: Union[str, Path], split: str) -> Tuple[Path, Path]:
    """Return the image folder and the annotation file of one split.

    Args:
        dataset: `coco2017` or `pascal_sbd` (a `Config.dataset`).
        root: the data root, as given with --data.
        split: `train`, `val`, or `test` (COCO's test-dev, without ground truth).

    Raises:
        UserError: an unknown dataset or split, or something of the layout is missing; says what was
            looked for and what layout is expected.
    """
    if dataset not in _LAYOUTS:
        raise UserError("unknown dataset layout '{}'{} Known: {}.".format(
            dataset, nearest(dataset, _LAYOUTS) or ".", ", ".join(_LAYOUTS)))
    splits = _LAYOUTS[dataset]
    if split not in splits:
        raise UserError("dataset layout '{}' has no split '{}'{} Known: {}.".format(
            dataset, split, nearest(split, splits) or ".", ", ".join(splits)))
    root = Path(root).expanduser()
    images, annotations = (root / part for part in splits[split])
    expected = "the {} layout expects {}/ and {} in the data folder".format(dataset, *splits[split])
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "not found"
        raise UserError("data folder {}: looked for {}; {}".format(
            found, root.absolute(), expected))
    for path, what, there in ((images, "image folder", images.is_dir()),
                              (annotations, "annotation file", annotations.is_file())):
        if not there:
            raise UserError("{} not found: looked for {}; {}{}".format(
                what, path.absolute(), expected, _elsewhere(root, splits[split])))
    return images, annotations


def find_dataset(dataset: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str) -> Tuple[Path, Path]:
    """Image folder and annotation file from what the command line gave.

    Args:
        dataset: layout below `root`, see `dataset_paths`.
        root: --data, or None; a folder, or a file as in `data.dataset_yaml`.
        images: --train_images or --valid_images; wins over `root`.
        info: --train_info or --valid_info; belongs to `images`.
        split: `train` or `val`.

    Raises:
        UserError: nothing was given, or half of a pair.
    """
    prefix = "train" if split == "train" else "valid"
    if (images is None) != (info is None):
        raise UserError("--{0}_images and --{0}_info belong together; give both or neither".format(
            prefix))
    if images is not None and info is not None:
        return Path(images), Path(info)
    if root is None:
        raise UserError("no dataset: give --data=FOLDER (layout {}: {}), --data=FILE.yaml (see "
                        "docs/data.md), or --{prefix}_images and --{prefix}_info".format(
                            dataset, ", ".join(_LAYOUTS.get(dataset, {}).get(split, ())),
                            prefix=prefix))
    described = find_dataset_file(root)
    if described is not None:
        return split_of_file(described, split)
    return dataset_paths(dataset, root, split)


def _elsewhere(root: Path, parts: Tuple[str, str]) -> str:
    """A hint where the layout is one folder up or down."""
    root = root.absolute()
    try:
        below = sorted(path for path in root.iterdir() if path.is_dir())[:50]
    except OSError:
        below = []
    for candidate in [root.parent] + below:
        if all((candidate / part).exists() for part in parts):
            return "; did you mean {}?".format(candidate)
    return ""
