"""Classes of a network and of a dataset: their names, their ids, their weights in the loss."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from data.config import BALANCED
from utils.errors import UserError, nearest, some


class ClassList(NamedTuple):
    """Foreground classes in the network's order."""

    names: list[str]
    category_ids: list[int]
    """What files in COCO's format call them."""


# COCO 2017 numbers its 80 categories 1..90 and leaves out these.
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush"""
_PASCAL = """
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""


def known_classes(dataset: str) -> ClassList:
    """The 80 categories of `coco2017`, or the 20 classes of `pascal_sbd`."""
    text, gaps = (_COCO, _COCO_GAPS) if dataset == "coco2017" else (_PASCAL, ())
    names = [name.strip() for name in text.replace("\n", " ").split(",")]
    return ClassList(names, [n for n in range(1, len(names) + len(gaps) + 1) if n not in gaps])


def find_classes(count: int, names: Sequence[str] | None = None,
                 category_ids: Sequence[int] | None = None,
                 dataset: str | None = None) -> ClassList:
    """What is known about the `count` foreground classes of a network: names and ids as they are
    stored with its weights, else those of the weights' `dataset` if their number fits.

    Raises:
        ValueError: not `count` names or ids.
    """
    for values in (names, category_ids):
        if values is not None and len(values) != count:
            raise ValueError(f"{len(values)} names or ids for {count} classes")
    for its_dataset in ("coco2017", "pascal_sbd"):
        known = known_classes(its_dataset)
        fits = list(names) == known.names if names is not None else (
            dataset == its_dataset and count == len(known.names))
        if fits:
            return ClassList(known.names, known.category_ids if category_ids is None
                             else list(category_ids))
    return ClassList(
        [f"class {n}" for n in range(1, count + 1)] if names is None else list(names),
        list(range(1, count + 1)) if category_ids is None else list(category_ids))


LARGEST_FACTOR = 10.0
"""Balanced factors stay between this and its inverse: a class seen twice must not rule the loss."""

_SHOWN = 10


def class_factors(setting: str | tuple[tuple[str, float], ...], class_names: Sequence[str],
                  objects_per_class: Sequence[int]) -> list[float] | None:
    """C factors, of the background (1) and of each class in order; None where all are 1.

    `setting` is `Config.class_weights`, classes and objects are those of the training data. A
    balanced factor divides by the class's objects; a class without any has 1.

    Raises:
        UserError: the setting names a class that the data does not have.
    """
    if not setting:
        return None
    if setting == BALANCED:
        # Inverse frequency, so that the mean over all objects is 1 (but for the limit).
        counts = np.asarray(objects_per_class, np.float64)
        present = counts > 0
        factors = np.ones(len(counts))
        factors[present] = counts.sum() / (present.sum() * counts[present])
        return [1.0, *factors.clip(1 / LARGEST_FACTOR, LARGEST_FACTOR).tolist()]
    given = dict(pair for pair in setting if not isinstance(pair, str))
    for name in given:
        if name not in class_names:
            raise UserError(f"class_weights names '{name}', which is no class of the training data"
                            f"{nearest(name, class_names) or '.'} Its classes: "
                            f"{some(class_names, _SHOWN)}")
    return [1.0] + [float(given.get(name, 1.0)) for name in class_names]


def match_categories(class_names: Sequence[str] | None, num_classes: int,
                     categories: Sequence[tuple[int, str]], weights: str, annotations: str,
                     by_name: bool = False) -> tuple[list[int | None], list[str]]:
    """Find the category id of each class: by name, or by order where nobody knows the names.

    `class_names` are the network's, in order, `categories` ids and names, sorted by id. With
    `by_name` the two may have different classes: those that share a name (letter case aside) are
    brought together.

    Returns:
        The ids by 0-based class index, None for a class that the dataset does not have (only with
        `by_name`), and sentences for the user.

    Raises:
        UserError: the classes are not the same and `by_name` is not set, or none are shared.
    """
    names = [name for _, name in categories]
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"{weights} predicts {num_classes} classes, but {len(class_names)} class "
                        "names are stored with it; the files do not belong together")
    if class_names is None and by_name:
        raise UserError(f"--map_classes needs the class names of {weights}, and they are not "
                        "known: they are stored in the .state file beside a .pth, and in "
                        ".safetensors")
    if class_names is None and num_classes == len(categories):
        return [number for number, _ in categories], []
    if class_names is None or not by_name and sorted(class_names) != sorted(names):
        known_names, hint = ("names unknown", "") if class_names is None else (
            ", ".join(class_names),
            ", or score the classes that share a name with --map_classes")
        raise UserError(f"{weights} has {num_classes} classes ({known_names}), but "
                        f"{annotations} has {len(names)} ({', '.join(names)}); evaluate on a "
                        f"dataset with the same classes, give weights trained for this one{hint}")
    mine = [name.strip().lower() if by_name else name for name in class_names]
    theirs = [name.strip().lower() if by_name else name for name in names]
    known = dict(zip(theirs, (number for number, _ in categories)))
    ids = [known.get(name) for name in mine]
    if not any(name in known for name in mine):
        raise UserError(f"no class of {weights} ({', '.join(class_names)}) has the name of a "
                        f"category of {annotations} ({', '.join(names)}); evaluate on another "
                        "dataset")
    notes = []
    dropped = [name for name, number in zip(class_names, ids) if number is None]
    if dropped:
        notes.append(f"{len(dropped)} of {len(class_names)} classes are not in {annotations} and "
                     f"left out: {', '.join(dropped)}")
    missed = [name for name, key in zip(names, theirs) if key not in mine]
    if missed:
        notes.append(f"{len(missed)} of {len(names)} categories are unknown to {weights} and score "
                     f"0: {', '.join(missed)}")
    return ids, notes
