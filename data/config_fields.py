"""How a field of the configuration is declared, and its values: as Python has them and as text.

A field is declared once, with `option`: default, range, sentence and flag. Checks, the flags of
train.py, `--set`, `--config FILE` and the table in docs/training.md all read that declaration.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence, Union

from utils.cli import str2bool
from utils.errors import nearest
from utils.parsing import LARGEST, is_number

_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}
LIMITS = {int: f", at most {LARGEST}", float: ", below 1e30"}
"""Of any number, whatever its field says."""


def option(default: Any, help: str, *, above: float | None = None, at_least: float | None = None,
           at_most: float | None = None, choices: Sequence[str] = (), flags: Sequence[str] = (),
           metavar: str | None = None, flag_alone: Any = None, example: str = "") -> Any:
    """Declare a field of a configuration.

    Args:
        default: of the base recipe.
        help: what it is, with its unit.
        above: limit of a number; the value is larger.
        at_least: smallest number.
        at_most: largest number.
        choices: the texts that are allowed.
        flags: names of the field's flag, the common one first; without any, `--set` sets it.
        metavar: what stands for the value in --help.
        flag_alone: value of the flag given without one; None: it needs one.
        example: how a list is written as text.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "above": above, "at_least": at_least, "at_most": at_most,
        "choices": tuple(choices), "flags": tuple(flags), "metavar": metavar,
        "flag_alone": flag_alone, "example": example})


def fraction(default: float, help: str) -> Any:
    """Declare a field that is a number from 0 to 1, see `option`."""
    return option(default, help, at_least=0, at_most=1)


def expected_value(kind: Any, declared: Mapping[str, Any]) -> str:
    """What a declared field of type `kind` takes, in words: `a whole number above 0`."""
    if declared["example"]:
        return f"{expectation(kind)}; as text such as {declared['example']}"
    number = "a whole number" if kind is int else "a number"
    if declared["above"] is not None:
        return f"{number} above {declared['above']:g}"
    if declared["at_most"] is not None:
        return f"{number} from {declared['at_least']:g} to {declared['at_most']:g}"
    if declared["at_least"] is not None:
        return f"{number}, {declared['at_least']:g} or more"
    return expectation(kind)


def value_problem(value: Any, kind: Any, declared: Mapping[str, Any]) -> str:
    """What is expected in place of `value` in a field of type `kind`; empty if it may stand there.

    `kind` is as `typing.get_type_hints` gives it, `declared` the field's metadata from `option`.
    """
    if not _fits(value, kind):
        return f"expected {expectation(kind)}{LIMITS.get(kind, '')}"
    above, least, most = declared["above"], declared["at_least"], declared["at_most"]
    if (above is not None and not value > above) or (least is not None and value < least) or (
            most is not None and value > most):
        return f"expected {expected_value(kind, declared)}"
    choices = declared["choices"]
    if choices and value not in choices:
        return f"expected one of {', '.join(choices)}{nearest(str(value), choices)}"
    return ""


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of type `kind`, e.g. `Tuple[int, ...]`.

    Whole numbers are numbers, True and False are not. Lists do not pass for tuples.
    """
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is float:
        return is_number(value) and not isinstance(value, bool)
    parts = kind.__args__
    if kind.__origin__ is Union:
        return any(_fits(value, part) for part in parts)
    if not isinstance(value, tuple):
        return False
    if parts[-1] is Ellipsis:
        return all(_fits(item, parts[0]) for item in value)
    return len(value) == len(parts) and all(map(_fits, value, parts))


def expectation(kind: Any) -> str:
    """What a field of this type takes, for a sentence: `a list, each item a whole number`."""
    if kind in _WORDS:
        return _WORDS[kind]
    parts = kind.__args__
    if kind.__origin__ is Union:
        return " or ".join(expectation(part) for part in parts)
    if parts[-1] is Ellipsis:
        return f"a list, each item {expectation(parts[0])}"
    return f"a list of {len(parts)} items ({', '.join(map(expectation, parts))})"


def freeze(value: Any) -> Any:
    """Lists become tuples and dicts pairs, all the way down, so that a Config is hashable."""
    if isinstance(value, dict):
        return tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def parse(text: str, kind: Any, separator: str = ",") -> Any:
    """A value of type `kind` from text: `24,48`, `20+30,42+60` (lists in a list), `cat=2,dog=0.5`.

    Raises:
        ValueError: the text is no such value.
    """
    if kind is bool:
        return str2bool(text)
    if kind in _WORDS:
        return kind(text.strip())
    parts = kind.__args__
    if kind.__origin__ is Union:  # a word, or a list of pairs
        return parse(text, parts[-1]) if "=" in text or not text else text
    if parts[0] is str:  # a pair; its name may have an equals sign
        items = list(text.rpartition("=")[::2])
    else:
        items = text.split(separator) if text.strip() else []
    kinds = parts[:1] * len(items) if parts[-1] is Ellipsis else parts
    if len(kinds) != len(items):
        raise ValueError(text)
    return tuple(parse(item, part, "+") for item, part in zip(items, kinds))


def as_text(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, tuple):
        inner = isinstance(value[0], tuple) if value else False
        return ",".join("+".join(f"{item:g}" for item in level) if inner else f"{level:g}"
                        for level in value) or "none"
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else (
        str(value))
