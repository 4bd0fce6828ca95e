"""The table of all configuration fields in docs/training.md, made from their declarations.

python test/helpers/config_table.py        writes it into the page
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.config import Config, field_kinds  # noqa: E402
from data.config_fields import as_text, expected_value  # noqa: E402

BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def table():
    """Markdown, with the lines that mark its begin and end."""
    lines = ["| field (default of the base recipe) | flag | what it is | takes |",
             "|---|---|---|---|"]
    for field in dataclasses.fields(Config):
        declared = field.metadata
        takes = ", ".join(declared["choices"]) or expected_value(field_kinds()[field.name],
                                                                 declared)
        flags = ", ".join(f"`{flag}`" for flag in declared["flags"])
        lines.append(f"| `{field.name}` ({as_text(field.default)}) | {flags} | "
                     f"{declared['help']} | {takes} |")
    return BEGIN + "\n".join(lines).replace("||", "|") + "\n" + END


if __name__ == "__main__":
    page = ROOT / "docs" / "training.md"
    content = page.read_text(encoding="utf-8")
    page.write_text(re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: table(), content,
                           flags=re.S), encoding="utf-8")
