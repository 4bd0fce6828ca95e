"""Find and open a dataset: a COCO layout, a data.yaml, or images and annotations by name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from data.coco import CocoDataset
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
        expected, there = (f"'{names[where]}'" if where < len(names) else "nothing"
                           for names in (self.names, list(found)))
        raise UserError(f"{self.path}: class {where + 1} of names is {expected}, but category "
                        f"{where + 1} of {annotation_file} is {there} ({len(self.names)} names, "
                        f"{len(found)} categories in the order of their ids); correct names or "
                        "leave it out"
                        )


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
        raise UserError(f"{path}: holds {_kind(content)}, {_EXAMPLE}")
    if isinstance(content.get("images"), list):
        raise UserError(f"{path} is an annotation file, --data takes a folder or a description of "
                        "the dataset; give --train_images and --train_info (--valid_images and "
                        "--valid_info) instead")
    if any(isinstance(content.get(split), (str, list)) for split in SPLITS):
        yolo = any(key in content for key in _YOLO_KEYS) or "names" in content
        raise UserError("{}: a split is given as a path, {}{}".format(
            path, _EXAMPLE, "; if this is a YOLO dataset, convert it: python -m data.convert yolo "
            f"{path} --out=FOLDER" if yolo else ""))
    _refuse_unknown(path, "", content, SPLITS + ("names",))
    splits = {split: _split(path, split, content[split]) for split in SPLITS if split in content}
    if not splits:
        raise UserError(f"{path}: has neither train nor val; {_EXAMPLE}")
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
            raise UserError(f"{path}: the {what} of '{split}' was not found: looked for "
                            f"{part.absolute()} (paths are relative to the file they stand "
                            f"in){_similar(part)}")
    return images, annotations


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
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as problem:
            raise UserError(f"{path}: not JSON: {problem}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> Any:
    """Plain values of a YAML text; nothing in it is executed.

    Raises:
        UserError: it is not YAML (says line and column), repeats a key, or PyYAML is not installed.
    """
    try:
        import yaml  # the only reader of YAML here; all else works without
    except ImportError:
        raise UserError(f"{path}: reading YAML needs PyYAML: pip install pyyaml (or write the same "
                        "as .json)") from None
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
                raise UserError(f"{path}: '{key.value}' is given in line {seen[str(key.value)]} "
                                f"and again in line {line}")
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
        raise UserError(f"{path}: names is the text '{value}', expected a list; did you mean "
                        f"['{value}']?")
    if isinstance(value, dict):
        if not all(type(key) is int for key in value):
            raise UserError(f"{path}: the keys of names have to be whole numbers, or names a list"
                            )
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: names is {_kind(value)}, expected a list of class names")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            hint = " (YAML reads no, yes, on, off as truth values: put names in quotes)" \
                if isinstance(name, bool) else " (put it in quotes)" if name is not None else ""
            raise UserError(f"{path}: names holds {name!r}, expected texts{hint}")
        if value.count(name) > 1:
            raise UserError(f"{path}: names holds '{name}' {value.count(name)} times; class names "
                            "have to be unique")
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
    shown = f" ({value!r})" if isinstance(value, (str, bool, int, float)) else ""
    return kinds.get(type(value), type(value).__name__) + shown


_LAYOUTS: Dict[str, Dict[str, Tuple[str, str]]] = {
    "coco2017": {
        "train": ("train2017", "annotations/instances_train2017.json"),
        "val": ("val2017", "annotations/instances_val2017.json"),
        "test": ("test2017", "annotations/image_info_test-dev2017.json"),
    },
    "pascal_sbd": {
        "train": ("img", "pascal_sbd_train.json"),
        "val": ("img", "pascal_sbd_val.json"),
    },
}


def dataset_paths(dataset: str, root: Union[str, Path], split: str) -> Tuple[Path, Path]:
    """Return the image folder and the annotation file of one split.

    Args:
        dataset: `coco2017` or `pascal_sbd` (a `Config.dataset`).
        root: the data root, as given with --data.
        split: `train`, `val`, or `test` (COCO's test-dev, without ground truth).

    Raises:
        UserError: an unknown dataset or split, or something of the layout is missing; says what was
            looked for and what layout is expected.
    """
    if dataset not in _LAYOUTS:
        raise UserError("unknown dataset layout '{}'{} Known: {}.".format(
            dataset, nearest(dataset, _LAYOUTS) or ".", ", ".join(_LAYOUTS)))
    splits = _LAYOUTS[dataset]
    if split not in splits:
        raise UserError("dataset layout '{}' has no split '{}'{} Known: {}.".format(
            dataset, split, nearest(split, splits) or ".", ", ".join(splits)))
    root = Path(root).expanduser()
    images, annotations = (root / part for part in splits[split])
    expected = "the {} layout expects {}/ and {} in the data folder".format(dataset, *splits[split])
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "not found"
        raise UserError(f"data folder {found}: looked for {root.absolute()}; {expected}")
    for path, what, there in ((images, "image folder", images.is_dir()),
                              (annotations, "annotation file", annotations.is_file())):
        if not there:
            raise UserError(f"{what} not found: looked for {path.absolute()}; "
                            f"{expected}{_elsewhere(root, splits[split])}")
    return images, annotations


def find_dataset(dataset: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str) -> Tuple[Path, Path]:
    """Image folder and annotation file from what the command line gave.

    Args:
        dataset: layout below `root`, see `dataset_paths`.
        root: --data, or None; a folder, or a file as in `data.datasets`.
        images: --train_images or --valid_images; wins over `root`.
        info: --train_info or --valid_info; belongs to `images`.
        split: `train` or `val`.

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
        raise UserError("no dataset: give --data=FOLDER (layout {}: {}), --data=FILE.yaml (see "
                        "docs/data.md), or --{prefix}_images and --{prefix}_info".format(
                            dataset, ", ".join(_LAYOUTS.get(dataset, {}).get(split, ())),
                            prefix=prefix))
    described = find_dataset_file(root)
    if described is not None:
        return split_of_file(described, split)
    return dataset_paths(dataset, root, split)


def _elsewhere(root: Path, parts: Tuple[str, str]) -> str:
    """A hint where the layout is one folder up or down."""
    root = root.absolute()
    try:
        below = sorted(path for path in root.iterdir() if path.is_dir())[:50]
    except OSError:
        below = []
    for candidate in [root.parent] + below:
        if all((candidate / part).exists() for part in parts):
            return f"; did you mean {candidate}?"
    return ""


def open_dataset(layout: str, root: Optional[str], images: Optional[str], info: Optional[str],
                 split: str, strict: bool = False, require_annotations: bool = True,
                 allow_empty: bool = False) -> CocoDataset:
    """Load one split; images are not opened.

    Args:
        layout: below `root`, where that is a folder without a `data.yaml`.
        root: --data: a folder, or a file as in `data.datasets`.
        images: --train_images or --valid_images; wins over `root`.
        info: --train_info or --valid_info; belongs to `images`.
        split: `train` or `val`.
        strict: see `CocoDataset`.
        require_annotations: see `CocoDataset`.
        allow_empty: a dataset without a single object is none of the errors.

    Raises:
        UserError: something is missing or inconsistent, class names differ from those of the
            description, or there is no object to learn or score.
    """
    dataset = CocoDataset(*find_dataset(layout, root, images, info, split), strict=strict,
                          require_annotations=require_annotations)
    described = find_dataset_file(root)
    if described is not None and images is None:
        read_dataset_file(described).check_names(dataset.class_names, dataset.annotation_file)
    report = dataset.report
    if report.objects == 0 and require_annotations and not allow_empty:
        lost = "".join(f"; {text}" for text in report.sentences()[1:])
        raise UserError(f"{report.file}: of {report.annotations} annotations none is an object to "
                        f"learn or score ({report.crowds} are crowds, {report.dropped} were "
                        f"dropped{lost}); python -m data.check shows what the file holds")
    return dataset
