"""Values of a configuration: immutable, and of the types that its fields are declared with."""

from __future__ import annotations

import math
from typing import Any, Union

_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` may stand in a field of type `kind`, e.g. `Tuple[int, ...]`.

    Whole numbers are numbers, True and False are not. Lists do not pass for tuples.
    """
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (
            math.isfinite(value))
    if kind is str:
        return isinstance(value, str)
    parts = kind.__args__
    if kind.__origin__ is Union:
        return any(fits(value, part) for part in parts)
    if not isinstance(value, tuple):
        return False
    if parts[-1] is Ellipsis:
        return all(fits(item, parts[0]) for item in value)
    return len(value) == len(parts) and all(map(fits, value, parts))


def expectation(kind: Any) -> str:
    """What `fits` accepts, for a sentence: `a list of whole numbers`."""
    if kind in _WORDS:
        return _WORDS[kind]
    parts = kind.__args__
    if kind.__origin__ is Union:
        return " or ".join(expectation(part) for part in parts)
    if parts[-1] is Ellipsis:
        return "a list, each item {}".format(expectation(parts[0]))
    return "a list of {} items ({})".format(len(parts), ", ".join(map(expectation, parts)))


def freeze(value: Any) -> Any:
    """Lists become tuples and dicts pairs, all the way down, so that a Config is hashable."""
    if isinstance(value, dict):
        return tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value
