"""What files bring: YAML and JSON as plain values, and whether these are of the form expected."""

from __future__ import annotations

import json
import re
from typing import Any, Callable, Dict, List, Tuple, Union

from utils.errors import UserError

_MOST_LETTERS, _DEEPEST, _MOST_ALIASES = 500000, 100, 20
"""Characters, levels and aliases of a YAML text; beyond them reading takes seconds to hours."""

LARGEST = 2 ** 31 - 1
"""Of iterations, images, seconds that people ask for: C, which counts them, has 31 bits."""

Form = Union[type, Tuple[type, ...], Callable[[Any], bool], Dict[str, Any], List[Any]]
"""A type, several, a condition, `{key: form}` of a mapping that has at least these keys (`key?` may
be missing, `*` are all), or `[form]` of a list of any length."""


def misfit(value: Any, form: Form, name: str = "the whole") -> str:
    """Where a value is not of its form: `mask.AP is a str`; an empty string if it is."""
    parts: list[tuple[str, Any, Form]] = []
    if isinstance(form, dict) and isinstance(value, dict):
        prefix = "" if name == "the whole" else f"{name}."
        for key, part in form.items():
            own = key.rstrip("?")
            found = value if key == "*" else [own] if own in value else []
            parts += [(f"{prefix}{name}", value[name], part) for name in found]
            if not found and own == key != "*":
                return f"{prefix}{own} is missing"
    elif isinstance(form, list) and isinstance(value, list):
        parts = [(f"{name}[{number}]", item, form[0]) for number, item in enumerate(value)]
    elif isinstance(form, (dict, list)) or not (
            isinstance(value, form) if isinstance(form, (type, tuple)) else form(value)):
        # Never the whole of what a file brings: it may be endless.
        shown = value[:60] if isinstance(value, str) else value
        simple = isinstance(value, (str, float)) or (isinstance(value, int)
                                                     and abs(value) <= LARGEST)
        kind = repr(shown) if simple and not isinstance(form, type) else f"a {type(value).__name__}"
        return f"{name} is {'nothing' if value is None else kind}"
    return next(filter(None, (misfit(item, part, place) for place, item, part in parts)), "")


def is_number(value: Any) -> bool:
    """Whether a value is a number that one can calculate with and draw; NaN is none."""
    return isinstance(value, (int, float)) and abs(value) < 1e30


def whole_number(text: str) -> int | None:
    """The number that a text spells in one to nine digits; None for any other text.

    `int` stumbles over superscripts, which are digits to `str.isdigit`, and over 5,000 digits;
    what counts cards or images in C over more than 31 bits.
    """
    return int(text) if re.match(r"[0-9]{1,9}\Z", text) else None


def parse_json(text: str, path: str) -> Any:
    """Values of a JSON text.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not JSON: {problem}") from None


def parse_yaml(text: str, path: str) -> Any:
    """Plain values of a YAML text; nothing in it is executed.

    Raises:
        UserError: it is not YAML (says line and column), or PyYAML is not installed.
    """
    try:
        import yaml  # the only reader of YAML here; all else works without
    except ImportError:
        raise UserError(f"{path}: reading YAML needs PyYAML: pip install pyyaml (or write the same "
                        "as .json)") from None
    if len(text) > _MOST_LETTERS or _depth(text) > _DEEPEST:
        raise UserError(f"{path}: {len(text)} characters, nested {_depth(text)} deep, expected a "
                        f"description of at most {_MOST_LETTERS} and {_DEEPEST}")
    try:
        if "*" in text:
            _check_aliases(yaml, text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError,
            RecursionError) as problem:
        # Dates and characters that do not exist are ValueErrors; PyYAML trips over its own tags.
        raise UserError(f"{path}: not YAML: {' '.join(str(problem).split())}") from None


def _check_aliases(yaml: Any, text: str) -> None:
    """Raise a `ValueError` for more than `_MOST_ALIASES`, or one that stands in what it means."""
    aliases, around = 0, []
    for event in yaml.parse(text):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            around.pop()
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if event.anchor in around:
                raise ValueError(f"&{event.anchor} holds itself, line {event.start_mark.line + 1}")
    if aliases > _MOST_ALIASES:
        raise ValueError(f"{aliases} aliases, expected at most {_MOST_ALIASES}")


def _depth(text: str) -> int:
    """How deep brackets lie in each other."""
    depth = deepest = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth = max(depth + (1 if found.group() in "[{" else -1), 0)
        deepest = max(deepest, depth)
    return deepest
