"""Pieces of an HTML page. Whatever text goes in is escaped; images go in as data."""

from __future__ import annotations

import base64
import html
from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

from utils.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but what is in it."""


def page(title: str, body: str) -> str:
    """A whole document that needs nothing beside itself."""
    return (
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta "
        f"http-equiv=\"Content-Security-Policy\" content=\"{escape(POLICY)}\">\n<meta "
        "name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<link rel=\"icon\" "
        f"href=\"data:,\">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def escape(value: Any) -> str:
    """Text as HTML shows it, letter for letter."""
    return html.escape(str(value), quote=True)


def section(name: str, title: str, *parts: str) -> str:
    """A section with an anchor; '' where all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A sentence or several."""
    return f"<p{_class(kind)}>{escape(text)}</p>" if text else ""


def card(content: str, heading: str = "", kind: str = "") -> str:
    """A frame around something; '' around nothing."""
    if not content:
        return ""
    return '<div class="{}">{}{}</div>'.format(
        " ".join(["card"] + kind.split()),
        f"<h3>{escape(heading)}</h3>" if heading else "", content)


def grid(kind: str, items: Iterable[str]) -> str:
    """Things beside each other as far as there is room."""
    content = "\n".join(item for item in items if item)
    return f'<div class="{kind}">\n{content}\n</div>' if content else ""


def image(data: Optional[bytes], description: str, kind: str = "", caption: str = "") -> str:
    """A PNG or JPEG as part of the page; '' for None."""
    if not data:
        return ""
    mime = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    tag = '<img{} src="data:{};base64,{}" alt="{}">'.format(
        _class(kind), mime, base64.b64encode(data).decode("ascii"), escape(description))
    return "<figure>{}{}</figure>".format(
        tag, f"<figcaption>{escape(caption)}</figcaption>" if caption else "")


def key_figure(value: str, name: str, kind: str = "") -> str:
    """A number that matters, with its name below."""
    return '<div class="{}"><b>{}</b><span>{}</span></div>'.format(
        " ".join(["figure"] + kind.split()), escape(value), escape(name))


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], numbers_from: int = 1,
          best: Optional[int] = None, tall: bool = False) -> str:
    """A table; '' without rows.

    Args:
        heads: names of the columns.
        rows: cells; None shows as a dash.
        numbers_from: columns from this one on are numbers, set to the right.
        best: row that stands out.
        tall: scroll it in a window of its own.
    """
    if not rows:
        return ""
    lines = ["<thead><tr>{}</tr></thead><tbody>".format("".join(
        "<th{}>{}</th>".format(_class("number" if n >= numbers_from else ""), escape(head))
        for n, head in enumerate(heads)))]
    for number, row in enumerate(rows):
        lines.append("<tr{}>{}</tr>".format(
            _class("best" if number == best else ""),
            "".join("<td{}>{}</td>".format(_class("number" if n >= numbers_from else ""),
                                           "&ndash;" if cell is None else escape(cell))
                    for n, cell in enumerate(row))))
    return '<div class="{}"><table>{}</tbody></table></div>'.format(
        "scroll tall" if tall else "scroll", "\n".join(lines))


def pairs(values: Iterable[Tuple[str, Any]], changed: Sequence[str] = ()) -> str:
    """A table of names and values; those named in `changed` stand out; '' without any."""
    lines: List[str] = []
    for name, value in values:
        lines.append("<tr><th>{}</th><td{}>{}</td></tr>".format(
            escape(name), _class("changed" if name in changed else ""), escape(_plain(value))))
    if not lines:
        return ""
    return '<table class="pairs"><tbody>{}</tbody></table>'.format("\n".join(lines))


def details(summary: str, content: str) -> str:
    """Something that opens on a click; '' for nothing."""
    if not content:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def code(text: str) -> str:
    """Lines to copy."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "[{}]".format(", ".join(_plain(item) for item in value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
