"""A dataset described in one small file: `--data=my.yaml`.

    train:
      images: images/train
      annotations: train.json
    val:
      images: images/val
      annotations: val.json
    names: [cat, dog]      # optional: what the annotation files have to contain

Paths are relative to the file. The same structure in a `.json` file is read without PyYAML.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from utils.errors import UserError, nearest

SPLITS = ("train", "val", "test")
FOLDER_FILE = "data.yaml"
"""What a folder given with --data may hold in place of a known layout."""

_SUFFIXES = (".yaml", ".yml", ".json")
_PARTS = ("images", "annotations")
_EXAMPLE = "expected for example 'train: {images: images/train, annotations: train.json}'"
_YOLO_KEYS = ("path", "nc", "download")


@dataclass
class DatasetFile:
    """A description that has been read; nothing it names has been opened.

    Attributes:
        path: the file.
        splits: image folder and annotation file by `train`, `val` and `test`, as given there and
            made absolute by the file's own folder.
        names: class names the annotation files have to have, in the order of their ids, or None.
    """

    path: str
    splits: Dict[str, Tuple[Path, Path]]
    names: Optional[List[str]] = None

    def check_names(self, found: Sequence[str], annotation_file: str) -> None:
        """Compare the categories of an annotation file with `names`.

        Raises:
            UserError: they differ; names the first difference.
        """
        if self.names is None or list(found) == self.names:
            return
        where = next((n for n, (a, b) in enumerate(zip(self.names, found)) if a != b),
                     min(len(self.names), len(found)))
        expected, there = ("'{}'".format(names[where]) if where < len(names) else "nothing"
                           for names in (self.names, list(found)))
        raise UserError("{}: class {} of names is {}, but category {} of {} is {} ({} names, {} "
                        "categories in the order of their ids); correct names or leave it out"
                        .format(self.path, where + 1, expected, where + 1, annotation_file, there,
                                len(self.names), len(found)))


def find_dataset_file(root: Union[str, Path, None]) -> Optional[Path]:
    """The description that `--data` means: itself, or the one in its folder; None if neither."""
    if root is None:
        return None
    path = Path(root).expanduser()
    if path.suffix.lower() in _SUFFIXES and not path.is_dir():
        return path
    inside = path / FOLDER_FILE
    return inside if inside.is_file() else None


def read_dataset_file(path: Union[str, Path]) -> DatasetFile:
    """Read a description.

    Raises:
        UserError: it is missing, not YAML, or has other keys than those above.
    """
    path = Path(path).expanduser()
    content = _parse(path)
    if not isinstance(content, dict):
        raise UserError("{}: holds {}, {}".format(path, _kind(content), _EXAMPLE))
    if isinstance(content.get("images"), list):
        raise UserError("{} is an annotation file, --data takes a folder or a description of the "
                        "dataset; give --train_images and --train_info (--valid_images and "
                        "--valid_info) instead".format(path))
    if any(isinstance(content.get(split), (str, list)) for split in SPLITS):
        yolo = any(key in content for key in _YOLO_KEYS) or "names" in content
        raise UserError("{}: a split is given as a path, {}{}".format(
            path, _EXAMPLE, "; if this is a YOLO dataset, convert it: python -m data.convert yolo "
            "{} --out=FOLDER".format(path) if yolo else ""))
    _refuse_unknown(path, "", content, SPLITS + ("names",))
    splits = {split: _split(path, split, content[split]) for split in SPLITS if split in content}
    if not splits:
        raise UserError("{}: has neither train nor val; {}".format(path, _EXAMPLE))
    return DatasetFile(str(path), splits, _names(path, content.get("names")))


def split_of_file(path: Union[str, Path], split: str) -> Tuple[Path, Path]:
    """Image folder and annotation file of one split of a description.

    Raises:
        UserError: it cannot be read, lacks the split, or names what is not there.
    """
    described = read_dataset_file(path)
    if split not in described.splits:
        raise UserError("{}: has no '{}', only {}; {}".format(
            path, split, ", ".join(described.splits), _EXAMPLE.replace("train", split)))
    images, annotations = described.splits[split]
    for part, there in ((images, images.is_dir()), (annotations, annotations.is_file())):
        if not there:
            what = "image folder" if part is images else "annotation file"
            raise UserError("{}: the {} of '{}' was not found: looked for {} (paths are relative "
                            "to the file they stand in){}".format(
                                path, what, split, part.absolute(), _similar(part)))
    return images, annotations


def format_dataset_file(splits: Dict[str, Tuple[str, str]], names: Sequence[str]) -> str:
    """Text of a description; a JSON string is a YAML string, so any path and name is safe."""
    lines = []
    for split, parts in splits.items():
        lines.append("{}:".format(split))
        lines += ["  {}: {}".format(key, json.dumps(part, ensure_ascii=False))
                  for key, part in zip(_PARTS, parts)]
    lines.append("names:")
    lines += ["  - {}".format(json.dumps(name, ensure_ascii=False)) for name in names]
    return "\n".join(lines) + "\n"


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("dataset file not found: looked for {}{}".format(
            path.absolute(), _similar(path))) from None
    except (OSError, ValueError) as problem:
        raise UserError("cannot read {}: {}".format(path, problem)) from None
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as problem:
            raise UserError("{}: not JSON: {}".format(path, problem)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> Any:
    """Plain values of a YAML text; nothing in it is executed.

    Raises:
        UserError: it is not YAML (says line and column), repeats a key, or PyYAML is not installed.
    """
    try:
        import yaml  # the only reader of YAML here; all else works without
    except ImportError:
        raise UserError("{}: reading YAML needs PyYAML: pip install pyyaml (or write the same as "
                        ".json)".format(path)) from None
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), path, set())
        return yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise UserError("{}: not YAML: {}".format(path, " ".join(str(problem).split()))) from None


def _refuse_repeated_keys(node: Any, path: str, visited: Set[int]) -> None:
    """YAML's reader would take the last of them without a word; `node` is PyYAML's tree."""
    if node is None or isinstance(node.value, str) or id(node) in visited:
        return
    visited.add(id(node))  # an alias may lead back to where it stands
    seen: Dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None:
            line = key.start_mark.line + 1
            if str(key.value) in seen:
                raise UserError("{}: '{}' is given in line {} and again in line {}".format(
                    path, key.value, seen[str(key.value)], line))
            seen[str(key.value)] = line
        _refuse_repeated_keys(value, path, visited)


def _split(path: Path, split: str, value: Any) -> Tuple[Path, Path]:
    if not isinstance(value, dict):
        raise UserError("{}: '{}' is {}, {}".format(
            path, split, _kind(value), _EXAMPLE.replace("train", split)))
    _refuse_unknown(path, split + ".", value, _PARTS)
    found = []
    for part in _PARTS:
        text = value.get(part)
        if not isinstance(text, str) or not text.strip():
            raise UserError("{}: '{}.{}' is {}, expected the path of {}".format(
                path, split, part, "missing" if text is None else _kind(text),
                "a folder with images" if part == "images" else "a COCO instances file"))
        found.append(Path(os.path.normpath(str(path.parent / Path(text).expanduser()))))
    return found[0], found[1]


def _names(path: Path, value: Any) -> Optional[List[str]]:
    if value is None:
        return None
    if isinstance(value, str):
        raise UserError("{}: names is the text '{}', expected a list; did you mean ['{}']?".format(
            path, value, value))
    if isinstance(value, dict):
        if not all(type(key) is int for key in value):
            raise UserError("{}: the keys of names have to be whole numbers, or names a list"
                            .format(path))
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list) or not value:
        raise UserError("{}: names is {}, expected a list of class names".format(
            path, _kind(value)))
    for name in value:
        if not isinstance(name, str) or not name.strip():
            hint = " (YAML reads no, yes, on, off as truth values: put names in quotes)" \
                if isinstance(name, bool) else " (put it in quotes)" if name is not None else ""
            raise UserError("{}: names holds {!r}, expected texts{}".format(path, name, hint))
        if value.count(name) > 1:
            raise UserError("{}: names holds '{}' {} times; class names have to be unique".format(
                path, name, value.count(name)))
    return value


def _refuse_unknown(path: Path, prefix: str, values: Dict[Any, Any],
                    known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            hint = nearest(str(key), known)
            raise UserError("{}: unknown key '{}{}'{} Known: {}.".format(
                path, prefix, key, hint or ".", ", ".join(prefix + name for name in known)))


def _similar(path: Path) -> str:
    """A hint with the nearest name in the folder where `path` should be."""
    try:
        return nearest(path.name, sorted(os.listdir(str(path.parent))))
    except OSError:
        return ""


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing",
             bool: "a truth value", int: "a number", float: "a number"}
    shown = " ({!r})".format(value) if isinstance(value, (str, bool, int, float)) else ""
    return kinds.get(type(value), type(value).__name__) + shown
