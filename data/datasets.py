"""Find and open a dataset: a COCO layout, a data.yaml, or images and annotations by name."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from data.coco import CocoDataset
from utils.errors import UserError, nearest

SPLITS = ("train", "val", "test")
FOLDER_FILE = "data.yaml"
"""What a folder given with --data may hold in place of a known layout."""

Split = Tuple[Path, Path]
"""Image folder and annotation file."""

_SUFFIXES = (".yaml", ".yml", ".json")
_PARTS = ("images", "annotations")
_EXAMPLE = "expected for example 'train: {images: images/train, annotations: train.json}'"
_YOLO_KEYS = ("path", "nc", "download", "names")
_LAYOUTS: Dict[str, Dict[str, Tuple[str, str]]] = {
    "coco2017": {
        "train": ("train2017", "annotations/instances_train2017.json"),
        "val": ("val2017", "annotations/instances_val2017.json"),
    },
    "pascal_sbd": {
        "train": ("img", "pascal_sbd_train.json"),
        "val": ("img", "pascal_sbd_val.json"),
    },
}


def open_dataset(layout: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str, allow_empty: bool = False) -> CocoDataset:
    """Load one split; images are not opened.

    Args:
        layout: below `root`, where that is a folder without a `data.yaml`.
        root: --data: a folder, or a description.
        images: --train_images or --valid_images; wins over `root`.
        info: --train_info or --valid_info; belongs to `images`.
        split: `train` or `val`.
        allow_empty: a dataset without a single object is none of the errors.

    Raises:
        UserError: something is missing or inconsistent, class names differ from those of the
            description, or there is no object to learn or score.
    """
    dataset = CocoDataset(*find_dataset(layout, root, images, info, split))
    described = find_dataset_file(root) if images is None else None
    if described is not None:
        _check_names(read_dataset_file(described), dataset)
    report = dataset.report
    if report.objects == 0 and not allow_empty:
        lost = "".join(f"; {text}" for text in report.sentences()[1:])
        raise UserError(f"{report.file}: of {report.annotations} annotations none is an object to "
                        f"learn or score ({report.crowds} are crowds, {report.dropped} were "
                        f"dropped{lost}); python -m data.check shows what the file holds")
    return dataset


def find_dataset(layout: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str) -> Split:
    """Image folder and annotation file from what the command line gave, as for `open_dataset`.

    Raises:
        UserError: nothing was given, or half of a pair.
    """
    prefix = "train" if split == "train" else "valid"
    if (images is None) != (info is None):
        raise UserError(f"--{prefix}_images and --{prefix}_info belong together; give both or "
                        "neither")
    if images is not None and info is not None:
        return Path(images), Path(info)
    if root is None:
        parts = ", ".join(_LAYOUTS.get(layout, {}).get(split, ()))
        raise UserError(f"no dataset: give --data=FOLDER (layout {layout}: {parts}), "
                        f"--data=FILE.yaml (see docs/data.md), or --{prefix}_images and "
                        f"--{prefix}_info")
    described = find_dataset_file(root)
    if described is None:
        return dataset_paths(layout, root, split)
    splits = read_dataset_file(described).splits
    if split not in splits:
        raise UserError(f"{described}: has no '{split}', only {', '.join(splits)}; "
                        f"{_EXAMPLE.replace('train', split)}")
    for part in _missing(splits[split]):
        raise UserError(f"{described}: '{split}' names {part.absolute()}, which was not found "
                        f"(paths are relative to the file they stand in){_similar(part)}")
    return splits[split]


def _missing(split: Split) -> List[Path]:
    """Those of image folder and annotation file that are not there."""
    images, annotations = split
    return ([] if images.is_dir() else [images]) + ([] if annotations.is_file() else [annotations])


def dataset_paths(layout: str, root: Union[str, Path], split: str) -> Split:
    """Image folder and annotation file of one split of a known layout.

    Args:
        layout: `coco2017` or `pascal_sbd` (a `Config.dataset`).
        root: the data root, as given with --data.
        split: `train` or `val`.

    Raises:
        UserError: an unknown layout, or something of it is missing; says what was looked for and
            what layout is expected.
    """
    if layout not in _LAYOUTS:
        raise UserError(f"unknown dataset layout '{layout}'{nearest(layout, _LAYOUTS) or '.'} "
                        f"Known: {', '.join(_LAYOUTS)}.")
    root, parts = Path(root).expanduser(), _LAYOUTS[layout][split]
    expected = f"the {layout} layout expects {parts[0]}/ and {parts[1]} in the data folder"
    if not root.is_dir():
        raise UserError(f"data folder not found: looked for {root.absolute()}; {expected}")
    images, annotations = root / parts[0], root / parts[1]
    for path in _missing((images, annotations)):
        what = "image folder" if path == images else "annotation file"
        hint = "".join(f"; did you mean {folder}?" for folder in _around(root)
                       if all((folder / part).exists() for part in parts))
        raise UserError(f"{what} not found: looked for {path.absolute()}; {expected}{hint}")
    return images, annotations


def _around(root: Path) -> List[Path]:
    """The folder above `root`, and those in it."""
    root = root.absolute()
    return [root.parent] + sorted(path for path in root.iterdir() if path.is_dir())[:50]


@dataclass
class DatasetFile:
    """A description that has been read; nothing it names has been opened."""

    path: str
    splits: Dict[str, Split]
    """By `train`, `val` and `test`, made absolute by the file's own folder."""
    names: Optional[List[str]]
    """Class names the annotation files have to have, in the order of their ids."""


def find_dataset_file(root: Union[str, Path, None]) -> Optional[Path]:
    """The description that `--data` means: itself, or the one in its folder; None if neither."""
    if root is None:
        return None
    path = Path(root).expanduser()
    if path.suffix.lower() in _SUFFIXES and not path.is_dir():
        return path
    inside = path / FOLDER_FILE
    return inside if inside.is_file() else None


def read_dataset_file(path: Path) -> DatasetFile:
    """Read a description.

    Raises:
        UserError: it is missing, not YAML, or has other keys than those above.
    """
    content = _parse(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {_shown(content)}, {_EXAMPLE}")
    if isinstance(content.get("images"), list):
        raise UserError(f"{path} is an annotation file, --data takes a folder or a description of "
                        "the dataset; give --train_images and --train_info (--valid_images and "
                        "--valid_info) instead")
    if any(isinstance(content.get(split), (str, list)) for split in SPLITS):
        hint = f"; if this is a YOLO dataset, convert it: python -m data.convert yolo {path} " \
            "--out=FOLDER" if any(key in content for key in _YOLO_KEYS) else ""
        raise UserError(f"{path}: a split is given as a path, {_EXAMPLE}{hint}")
    _refuse_unknown(path, "", content, SPLITS + ("names",))
    splits = {split: _split(path, split, content[split]) for split in SPLITS if split in content}
    if not splits:
        raise UserError(f"{path}: has neither train nor val; {_EXAMPLE}")
    return DatasetFile(str(path), splits, _names(path, content.get("names")))


def format_dataset_file(splits: Dict[str, Tuple[str, str]], names: Sequence[str]) -> str:
    """Text of a description; a JSON string is a YAML string, so any path and name is safe."""
    lines = []
    for split, parts in splits.items():
        lines.append(f"{split}:")
        lines += [f"  {key}: {_quoted(part)}" for key, part in zip(_PARTS, parts)]
    lines.append("names:")
    lines += [f"  - {_quoted(name)}" for name in names]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As YAML; what is not text in a path (file names in GBK on Linux) is escaped."""
    is_text = text.encode("utf-8", "ignore") == text.encode("utf-8", "surrogatepass")
    return json.dumps(text, ensure_ascii=not is_text)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("dataset file not found: looked for "
                        f"{path.absolute()}{_similar(path)}") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from None
    if path.suffix.lower() != ".json":
        return parse_yaml(text, str(path))
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
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as problem:
        # Dates and characters that do not exist are ValueErrors.
        raise UserError(f"{path}: not YAML: {' '.join(str(problem).split())}") from None


def _split(path: Path, split: str, value: Any) -> Split:
    if not isinstance(value, dict):
        raise UserError(f"{path}: '{split}' is {_shown(value)}, "
                        f"{_EXAMPLE.replace('train', split)}")
    _refuse_unknown(path, split + ".", value, _PARTS)
    found = []
    for part, expected in zip(_PARTS, ("a folder with images", "a COCO instances file")):
        text = value.get(part)
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise UserError(f"{path}: '{split}.{part}' is {_shown(text)}, expected the path of "
                            f"{expected}")
        expanded = os.path.expanduser(text)  # leaves the home of an unknown user as it is
        found.append(Path(os.path.normpath(os.path.join(str(path.parent), expanded))))
    return found[0], found[1]


def _names(path: Path, value: Any) -> Optional[List[str]]:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: names is {_shown(value)}, expected a list of class names such as "
                        "[cat, dog]")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: names holds {_shown(name)}, expected texts; put it in quotes "
                            "(YAML reads no, yes, on, off as truth values)")
        if value.count(name) > 1:
            raise UserError(f"{path}: names holds '{name}' {value.count(name)} times; class names "
                            "have to be unique")
    return value


def _check_names(described: DatasetFile, dataset: CocoDataset) -> None:
    """Raise a `UserError` with the first difference between the names given and those found."""
    names, found = described.names, dataset.class_names
    if names is None or names == found:
        return
    where = next((n for n, (a, b) in enumerate(zip(names, found)) if a != b),
                 min(len(names), len(found)))
    expected, there = (f"'{some[where]}'" if where < len(some) else "nothing"
                       for some in (names, found))
    raise UserError(f"{described.path}: class {where + 1} of names is {expected}, but category "
                    f"{where + 1} of {dataset.annotation_file} is {there} ({len(names)} names, "
                    f"{len(found)} categories in the order of their ids); correct names or leave "
                    "it out")


def _refuse_unknown(path: Path, prefix: str, values: Dict[Any, Any],
                    known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{prefix}{key}'"
                            f"{nearest(str(key), known) or '.'} Known: "
                            f"{', '.join(prefix + name for name in known)}.")


def _similar(path: Path) -> str:
    """A hint with the nearest name in the folder where `path` should be."""
    try:
        return nearest(path.name, sorted(os.listdir(str(path.parent))))
    except OSError:
        return ""


def _shown(value: Any) -> str:
    """A value of the wrong kind, for a sentence."""
    return "nothing" if value is None else reprlib.repr(value)
