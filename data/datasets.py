"""Open the dataset that a command line means, whichever way it was given."""

from __future__ import annotations

from typing import Optional

from data.coco import CocoDataset
from data.dataset_yaml import find_dataset_file, read_dataset_file
from data.layouts import find_dataset


def open_dataset(layout: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str, strict: bool = False,
                 require_annotations: bool = True) -> CocoDataset:
    """Load one split; images are not opened.

    Args:
        layout: below `root`, where that is a folder without a `data.yaml`.
        root: --data: a folder, or a file as in `data.dataset_yaml`.
        images: --train_images or --valid_images; wins over `root`.
        info: --train_info or --valid_info; belongs to `images`.
        split: `train` or `val`.
        strict: see `CocoDataset`.
        require_annotations: see `CocoDataset`.

    Raises:
        UserError: something is missing or inconsistent, or class names differ from those of the
            description.
    """
    dataset = CocoDataset(*find_dataset(layout, root, images, info, split), strict=strict,
                          require_annotations=require_annotations)
    described = find_dataset_file(root)
    if described is not None and images is None:
        read_dataset_file(described).check_names(dataset.class_names, dataset.annotation_file)
    return dataset
