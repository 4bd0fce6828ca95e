"""Bring the classes of a network and the categories of a dataset together."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from utils.errors import UserError

Matched = Tuple[List[Optional[int]], List[str]]


def match_categories(class_names: Optional[Sequence[str]], num_classes: int,
                     categories: Sequence[Tuple[int, str]], weights: str,
                     annotations: str, by_name: bool = False) -> Matched:
    """Find the category id of each class: by name, or by order where nobody knows the names.

    Args:
        class_names: of the network, in order; None if nobody knows.
        num_classes: foreground classes of the network.
        categories: id and name, sorted by id.
        weights: name of the weights, for sentences.
        annotations: name of the annotation file, for sentences.
        by_name: let the network and the dataset have different classes; those that share a name
            (letter case aside) are brought together.

    Returns:
        The ids by 0-based class index, None for a class that the dataset does not have (only with
        `by_name`), and sentences for the user.

    Raises:
        UserError: the classes are not the same and `by_name` is not set, or none are shared.
    """
    names = [name for _, name in categories]
    if class_names is not None and len(class_names) != num_classes:
        raise UserError("{} predicts {} classes, but {} class names are stored with it; the files "
                        "do not belong together".format(weights, num_classes, len(class_names)))
    if by_name:
        return _match_by_name(class_names, categories, weights, annotations)
    if class_names is None and num_classes == len(categories):
        return [number for number, _ in categories], []
    if class_names is None or sorted(class_names) != sorted(names):
        raise UserError(
            "{} was trained for {} classes ({}), but {} has {} ({}); evaluate on a dataset with "
            "the same classes, give weights trained for this one{}".format(
                weights, num_classes, _list(class_names), annotations, len(names), _list(names),
                "" if class_names is None else
                ", or score the classes that share a name with --map_classes"))
    by_their_name = {name: number for number, name in categories}
    return [by_their_name[name] for name in class_names], []


def _match_by_name(class_names: Optional[Sequence[str]], categories: Sequence[Tuple[int, str]],
                   weights: str, annotations: str) -> Matched:
    if class_names is None:
        raise UserError("--map_classes needs the class names of {}, and they are not known: they "
                        "are stored in the .state file beside a .pth, and in .safetensors".format(
                            weights))
    known = {_key(name): number for number, name in categories}
    ids = [known.get(_key(name)) for name in class_names]
    names = [name for _, name in categories]
    if all(number is None for number in ids):
        raise UserError("no class of {} ({}) has the name of a category of {} ({}); evaluate on "
                        "another dataset".format(weights, _list(class_names), annotations,
                                                 _list(names)))
    notes = []
    dropped = [name for name, number in zip(class_names, ids) if number is None]
    if dropped:
        notes.append("{} of {} classes are not in {} and left out: {}".format(
            len(dropped), len(class_names), annotations, _list(dropped)))
    trained = {_key(name) for name in class_names}
    missed = [name for name in names if _key(name) not in trained]
    if missed:
        notes.append("{} of {} categories are unknown to {} and score 0: {}".format(
            len(missed), len(names), weights, _list(missed)))
    return ids, notes


def _key(name: str) -> str:
    return name.strip().lower()


def _list(names: Optional[Sequence[str]]) -> str:
    return "names unknown" if names is None else ", ".join(names)
