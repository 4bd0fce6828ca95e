"""The description of a dataset: data.yaml, the images and annotations of each split."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence, Tuple

from utils.errors import UserError, nearest
from utils.files import read_text
from utils.parsing import parse_json, parse_yaml

SPLITS = ("train", "val", "test")
FOLDER_FILE = "data.yaml"
"""What a folder given with --data may hold in place of a known layout."""

Split = Tuple[Path, Path]
"""Image folder and annotation file."""

EXAMPLE = "expected for example 'train: {images: images/train, annotations: train.json}'"
_PARTS = ("images", "annotations")


@dataclass
class DatasetFile:
    """A description that has been read; nothing it names has been opened."""

    path: str
    splits: dict[str, Split]
    """By `train`, `val` and `test`, made absolute by the file's own folder."""
    names: list[str] | None
    """Class names the annotation files have to have, in the order of their ids."""
    origin: str = ""
    """What it was made from, in a sentence, where that is another tool's folder."""


def read_dataset_file(path: Path) -> DatasetFile | None:
    """Read a description; None for one of YOLO's.

    Raises:
        UserError: it is missing, not YAML, or has other keys than those above.
    """
    content = parse_description(path)
    if is_yolo(content):
        return None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {shown(content)}, {EXAMPLE}")
    if isinstance(content.get("images"), list):
        raise UserError(f"{path} is an annotation file, --data takes a folder or a description of "
                        "the dataset; give --train_images and --train_info (--valid_images and "
                        "--valid_info) instead")
    _refuse_unknown(path, "", content, SPLITS + ("names",))
    splits = {split: _split(path, split, content[split]) for split in SPLITS if split in content}
    if not splits:
        raise UserError(f"{path}: has neither train nor val; {EXAMPLE}")
    return DatasetFile(str(path), splits, _names(path, content.get("names")))


def format_dataset_file(splits: dict[str, tuple[str, str]], names: Sequence[str]) -> str:
    """Text of a description; a JSON string is a YAML string, so any path and name is safe."""
    lines = []
    for split, parts in splits.items():
        lines.append(f"{split}:")
        lines += [f"  {key}: {_quoted(part)}" for key, part in zip(_PARTS, parts)]
    lines += ["names:"] * bool(names) + [f"  - {_quoted(name)}" for name in names]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As YAML; what is not text in a path (file names in GBK on Linux) is escaped."""
    is_text = text.encode("utf-8", "ignore") == text.encode("utf-8", "surrogatepass")
    return json.dumps(text, ensure_ascii=not is_text)


def is_yolo(content: Any) -> bool:
    """Whether a description is YOLO's: a split is the path of images, not of annotations."""
    return isinstance(content, dict) and any(isinstance(content.get(split), (str, list))
                                             for split in SPLITS)


def parse_description(path: Path, notes: list[str] | None = None) -> Any:
    """Values of a YAML or JSON file, unchecked; `notes` as of `read_text`.

    Raises:
        UserError: it is missing or neither of both.
    """
    text = read_text(path, "dataset file", notes)
    return (parse_json if path.suffix.lower() == ".json" else parse_yaml)(text, str(path))


def _split(path: Path, split: str, value: Any) -> Split:
    if not isinstance(value, dict):
        raise UserError(f"{path}: '{split}' is {shown(value)}, "
                        f"{EXAMPLE.replace('train', split)}")
    _refuse_unknown(path, split + ".", value, _PARTS)
    found = []
    for part, expected in zip(_PARTS, ("a folder with images", "a COCO instances file")):
        text = value.get(part)
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise UserError(f"{path}: '{split}.{part}' is {shown(text)}, expected the path of "
                            f"{expected}")
        expanded = os.path.expanduser(text)  # leaves the home of an unknown user as it is
        found.append(Path(os.path.normpath(os.path.join(str(path.parent), expanded))))
    return found[0], found[1]


def _names(path: Path, value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: names is {shown(value)}, expected a list of class names such as "
                        "[cat, dog]")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: names holds {shown(name)}, expected texts; put it in quotes "
                            "(YAML reads no, yes, on, off as truth values)")
        if value.count(name) > 1:
            raise UserError(f"{path}: names holds '{name}' {value.count(name)} times; class names "
                            "have to be unique")
    return value


def _refuse_unknown(path: Path, prefix: str, values: dict[Any, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{prefix}{key}'"
                            f"{nearest(str(key), known) or '.'} Known: "
                            f"{', '.join(prefix + name for name in known)}.")


def shown(value: Any) -> str:
    """A value of the wrong kind, for a sentence."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return "nothing" if value is None else short.repr(value)
