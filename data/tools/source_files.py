"""The files of a dataset of another tool: found, divided and read."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Callable, Sequence, TypeVar

from data.description import SPLITS
from data.image import SUFFIXES, load_pil
from utils.errors import UserError, counted, some
from utils.files import read_text, read_whole

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

MOST_FILES = 1000000
"""In a folder that is looked through; whoever names a whole disk hears of it in seconds."""

_SPLIT_FOLDER = re.compile(
    r"(?:stage1_)?(train|val|test)(?:ing|id|idation)?(?:_?set)?(?:_?20\d\d)?", re.IGNORECASE)
"""Names that tools give to the folders of splits."""


def list_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Files in a folder and below by their endings, or all if none are given, sorted by name.

    Links to folders are followed. Hidden folders (`.git`, `.ipynb_checkpoints`) and what macOS
    leaves in archives (`__MACOSX`, `._*`) are not there.

    Raises:
        UserError: there are more than `MOST_FILES`.
    """
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(str(folder), followlinks=True):
        try:
            status = os.stat(place)
        except OSError:  # gone in the meantime
            continue
        identity = status.st_dev, status.st_ino
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = [name for name in folders if name != "__MACOSX" and not name.startswith(".")]
        found += [os.path.join(place, name) for name in names if not name.startswith("._") and (
            not suffixes or os.path.splitext(name)[1].lower() in suffixes)]
        if len(found) > MOST_FILES:
            raise UserError(f"{folder} holds more than {MOST_FILES} files, too many for a dataset "
                            "of another tool; name the dataset's own folder")
    found.sort(key=lambda path: path.replace(os.sep, "\0"))  # as paths compare: name by name
    return [Path(path) for path in found]


def read_pixels(path: Path) -> Image.Image:
    """An image file whose values mean something, decoded as they are.

    Raises:
        UserError: it is missing, or not an image.
    """
    try:
        return load_pil(read_whole(path), alone=True)
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: {problem}") from None


def split_of(name: str) -> str:
    """`train`, `val` or `test` for a folder of that split (Train, valid, test2017); else empty."""
    match = _SPLIT_FOLDER.fullmatch(name)
    return match.group(1).lower() if match else ""


def split_folders(folder: Path) -> dict[str, Path]:
    """Folders of splits in `folder`, by the names that tools give them."""
    places = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
    found = {split_of(path.name): path for path in places if path.is_dir()}
    return {split: found[split] for split in SPLITS if split in found}


def outside(folder: Path, files: Sequence[Path]) -> list[str]:
    """A note about files of a dataset that no split has, if there are any."""
    return [f"left out: {counted(len(files), 'file')} outside of the folders of splits "
            f"({some(path.relative_to(folder) for path in files)})"] if files else []


def by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their names without endings.

    Raises:
        UserError: two of them have the same.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if found.setdefault(path.stem, path) != path:
            raise UserError(f"{found[path.stem]} and {path} have the same name, which says to what "
                            "they belong; rename one of them or move it away")
    return found


def listed_stems(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Names in train.txt (else trainval.txt) and val.txt of the first folder that has such a list;
    empty where none has.
    """
    for folder in folders:
        train = [folder / name for name in ("train.txt", "trainval.txt")
                 if (folder / name).is_file()]
        if train:
            lists = {"train": train[0], "val": folder / "val.txt"}
            # 'cat 1' is in the list of a class, '"my cat"' in that of a tool, 'b/cat' in a folder.
            found = {split: [PurePath(re.sub(r"\s+-?[01]$", "", line.strip()).strip('"')).name
                             for line in read_text(path).splitlines() if line.strip()]
                     for split, path in lists.items() if path.is_file()}
            return {split: names for split, names in found.items() if names}
    return {}


def by_split(folder: Path, endings: Sequence[str], notes: list[str],
             read: Callable[[Path, Sequence[Path]], T]) -> dict[str, T]:
    """What `read` finds among the files of training and of validation, or among all as one.

    Folders of splits are in `folder` (train/images) or in its folders (images/train). A folder
    `train` alone may be one of trains, and beside a folder `test` it is not. Files with one of the
    `endings` that are outside of them are noted.
    """
    files = list_files(folder, ())
    within: dict[str, list[Path]] = {split: [] for split in split_folders(folder)}
    for depth in (len(folder.parts), len(folder.parts) + 1):
        for path in files:
            within.setdefault(split_of("".join(path.parts[depth:-1][:1])), []).append(path)
        others = [path for path in within.pop("", []) if path.suffix.lower() in endings]
        if "train" in within and len(within) > 1:
            notes += outside(folder, others)
            return {split: read(folder, within[split]) for split in ("train", "val")
                    if split in within}
        within = {}
    return {"train": read(folder, files)}
