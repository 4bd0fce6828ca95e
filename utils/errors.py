"""Exceptions with a sentence for the user, and words for such sentences.

Entry points catch `UserError`, print its sentence on stderr and exit with code 2 (see
`utils.cli.run_main`).
Every message says what was found, where, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from typing import Any, Iterable

_LONGEST = 2000
"""Characters of a sentence that is shown whole."""


class UserError(Exception):
    """Bad input from outside: a flag, a file, an annotation, a device that is not there."""


class TrainingError(Exception):
    """A training cannot go on; the message says why. Not the user's input: exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def some(values: Iterable[Any], count: int = 5) -> str:
    """The first `count` of them: `1, 2, 3, ...`."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:count]) + (", ..." if len(texts) > count else "")


def counted(number: int, noun: str) -> str:
    """`1 image` or `3 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """A line for a terminal: what would drive it, or begin another line, is escaped."""
    return "".join(letter if letter.isprintable() else
                   letter.encode("unicode_escape").decode("ascii") for letter in text)


def one_line(text: str) -> str:
    """A sentence for a terminal: what cannot be printed is escaped, what is endless is cut."""
    shown = printable(text)
    if len(shown) <= _LONGEST:
        return shown
    return f"{shown[:_LONGEST // 2]} ... {shown[-_LONGEST // 2:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
