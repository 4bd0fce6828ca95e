"""A recipe by its name or from a file, as every --config takes it, and values for its fields."""

from __future__ import annotations

from typing import Any

from data.config import Config, check_known, field_kinds, get_config
from data.config_fields import expected_value, freeze, parse, value_problem
from utils.errors import UserError, nearest
from utils.files import read_whole
from utils.parsing import parse_json, parse_yaml

_FILE_KEYS = ("config", "set", "flags")
"""What a file for --config may have."""


def read_recipe(name: str) -> tuple[Config, dict[str, Any], bool]:
    """Configuration and flags that a recipe's name or a file for --config means, and whether a
    run recorded them, perhaps one of another version of this project.

    Args:
        name: of a recipe; or a YAML file with `config`, a recipe's name, `set`, values by field,
            and `flags`, values by flag, each of which may be missing.

    Raises:
        UserError: the file is missing, is no such file, or has a value out of its range.
    """
    if not name.endswith((".yaml", ".yml", ".json")):
        return get_config(name), {}, False
    try:
        text = read_whole(name).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--config: cannot read '{name}': {error}") from None
    content = parse_yaml(text, name)
    if not isinstance(content, dict) or not isinstance(content.get("flags", {}), dict):
        raise UserError(f"--config: '{name}' is no mapping with config, set and flags")
    recorded = "program" in content
    for key in [] if recorded else content:  # a run folder's has more
        if key not in _FILE_KEYS:
            raise UserError(f"--config: '{name}' has a key {key!r}{nearest(str(key), _FILE_KEYS)}; "
                            f"known: {', '.join(_FILE_KEYS)}")
    config, changes = content.get("config", "yolact_base"), content.get("set", {})
    if not isinstance(config, str) or not isinstance(changes, dict):
        raise UserError(f"--config: '{name}' needs the name of a recipe under config, and values "
                        "by field under set")
    settings = dict(parse_setting(f"{key}={value}") if isinstance(value, str) else (key, value)
                    for key, value in changes.items())
    return get_config(config).replace(**settings), content.get("flags", {}), recorded


def parse_setting(text: str) -> tuple[str, Any]:
    """Field and value of `--set field=value`.

    Raises:
        UserError: there is no such field, or it takes no such value.
    """
    name, separator, value = text.partition("=")
    name = name.strip()
    if not separator:
        raise UserError(f"--set is '{text}', expected field=value, such as max_size=400")
    check_known(name, "--set: a configuration")
    kind, declared = field_kinds()[name], Config.__dataclass_fields__[name].metadata
    try:
        bracketed = value.strip().startswith("[")
        parsed = freeze(parse_json(value, f"--set {name}")) if bracketed else parse(value, kind)
        problem = value_problem(parsed, kind, declared)
    except ValueError:
        problem = f"expected {expected_value(kind, declared)}"
    if problem:
        raise UserError(f"--set {name} is '{value}', {problem}")
    return name, parsed
