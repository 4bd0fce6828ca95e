"""Bring the classes of a network and the categories of a dataset together."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from utils.errors import UserError


def match_categories(class_names: Optional[Sequence[str]], num_classes: int,
                     categories: Sequence[Tuple[int, str]], weights: str,
                     annotations: str) -> Tuple[List[int], List[str]]:
    """Find the category id of each class: by name if the same names are known, else by order.

    Args:
        class_names: of the network, in order; None if nobody knows.
        num_classes: foreground classes of the network.
        categories: id and name, sorted by id.
        weights: name of the weights, for sentences.
        annotations: name of the annotation file, for sentences.

    Returns:
        The ids by 0-based class index, and sentences for the user.

    Raises:
        UserError: the network and the dataset have different numbers of classes.
    """
    names = [name for _, name in categories]
    if num_classes != len(categories):
        raise UserError(
            "{} was trained for {} classes{}, but {} has {}{}; evaluate on a dataset with the same "
            "classes, or give weights trained for this one".format(
                weights, num_classes, _named(class_names), annotations, len(names), _named(names)))
    ids = [number for number, _ in categories]
    if class_names is None or list(class_names) == names:
        return ids, []
    strangers = len(set(class_names) - set(names))
    if strangers:
        return ids, ["{} of the {} class names of {} are not in {}: classes are matched by their "
                     "order".format(strangers, num_classes, weights, annotations)]
    by_name = {name: number for number, name in categories}
    return [by_name[name] for name in class_names], []


def _named(names: Optional[Sequence[str]]) -> str:
    if names is None:
        return ""
    return " ({}{})".format(", ".join(names[:4]), ", ..." if len(names) > 4 else "")
