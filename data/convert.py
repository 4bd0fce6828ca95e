"""Turn other annotation formats into COCO's: `python -m data.convert labelme raw --out=mydata`.

Writes `train.json`, `val.json` and `data.yaml` into the output folder. Images stay where they are.
What is given with --data as it is, is recognised and converted into the user's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

from data.coco import CocoDataset
from data.description import FOLDER_FILE
from data.tools.conversion import (
    Conversion,
    Found,
    Part,
    refuse_foreign_files,
    signed,
    write_dataset,
)
from data.tools.instance_masks import is_mask_folder, read_masks
from data.tools.labelme import is_labelme_folder, read_labelme
from data.tools.sbd import is_sbd_folder, read_sbd
from data.tools.source_files import list_files, split_folders, split_of
from data.tools.voc import is_voc_folder, read_voc
from data.tools.yolo import is_yolo_folder, places_of, read_yolo
from utils.cli import ArgumentParser, Bounded, add_switch, print_lines, run_main
from utils.errors import UserError, counted, nearest, some
from utils.files import alone, read_text, user_cache, write_whole

_BOXES = ("yolo", "voc")
"""Formats whose objects may have a box only."""
_COCO = "_annotations.coco.json"
"""As Roboflow exports COCO's format: `train/_annotations.coco.json` among the images."""
_NOTE = "origin.txt"
_MOST_FOLDERS = 50
"""Folders of a folder that are looked at where it is nothing itself."""


class Format(NamedTuple):
    """How another tool lays out a dataset."""

    title: str
    looked_for: str
    is_it: Callable[[Path, Sequence[Path]], bool]
    """Whether a folder, of which all files are given, is laid out so."""
    read: Callable[[Path, Conversion], Found] | None
    """None for what is in COCO's format already."""


def is_coco_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are laid out as Roboflow's export."""
    return any((place / _COCO).is_file() for place in [folder, *split_folders(folder).values()])


def read_coco(folder: Path, conversion: Conversion) -> dict[str, Part]:
    """The splits of an export, as their files say; its only one is divided.

    Raises:
        UserError: a file is not COCO's.
    """
    places = {split: place for split, place in split_folders(folder).items()
              if (place / _COCO).is_file()}
    if not places and (folder / _COCO).is_file():
        places = {"train": folder}
    if "train" not in places:
        raise UserError(f"{folder.absolute()}: no train/{_COCO}; for another layout write a "
                        "data.yaml (docs/data.md)")
    datasets = {split: CocoDataset(place, place / _COCO) for split, place in places.items()}
    if len(datasets) > 1 or not conversion.val_fraction:
        return {split: Part(Path(dataset.images_dir), Path(dataset.annotation_file), len(dataset),
                            dataset.report.objects, dataset.report.empty_images)
                for split, dataset in datasets.items()}
    content = json.loads(read_text(places["train"] / _COCO))
    parts = {}
    for split, images in conversion.divided(content["images"]).items():
        ids = {image["id"] for image in images}
        records = [record for record in content.get("annotations", [])
                   if record["image_id"] in ids]
        owners = {record["image_id"] for record in records}
        parts[split] = Part(places["train"], signed({**content, "images": images,
                                                     "annotations": records}),
                            len(images), len(records), len(ids - owners))
    return parts


def description_to_paste(folder: Path, files: Sequence[Path]) -> str | None:
    """A data.yaml, on one line, for COCO files in a layout that is not known; None for none."""
    found: dict[str, tuple[str, str]] = {}
    for path in [file for file in files if file.suffix.lower() == ".json"][:20]:
        name = _first_image(path)
        if name is not None:
            lower = path.name.lower()
            named = "val" if "val" in lower else "test" if "test" in lower else ""
            places = path.relative_to(folder).parts[:-1]
            split = named or next(filter(None, map(split_of, places)), "train")
            # Frames of all splits may have the same names: the folder says which they are of.
            words = {path.parent.name.lower(), *re.split("[_.-]", lower)}
            images = sorted((file for file in files if str(file).endswith("/" + name)),
                            key=lambda file: -sum(
                                part.lower() in words or split_of(part) == split
                                for part in file.relative_to(folder).parts))
            place = Path(str(images[0])[:-len(name) - 1]) if images else folder / "images"
            found.setdefault(split, (place.relative_to(folder).as_posix(),
                                     path.relative_to(folder).as_posix()))
    lines = [f"{split}: {{images: {json.dumps(images)}, annotations: {json.dumps(annotations)}}}"
             for split, (images, annotations) in found.items()]
    return "{" + ", ".join(lines) + "}" if lines else None


def _first_image(path: Path) -> str | None:
    """Name of the first image of a COCO file; None for what is none."""
    try:
        text = read_text(path)
        if '"images"' not in text or '"categories"' not in text:
            return None
        images: list[Any] = json.loads(text)["images"]
        name = images[0]["file_name"]
    except (UserError, ValueError, RecursionError, KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) and name else None


FORMATS = {
    "labelme": Format("labelme JSON files (polygons, rectangles, circles, masks; a group is one "
                      "object)", "JSON files with 'shapes'", is_labelme_folder, read_labelme),
    "yolo": Format("YOLO segmentation text with data.yaml, or with images/, labels/ and "
                   "classes.txt", "data.yaml with YOLO's keys, or images/ with labels/*.txt",
                   is_yolo_folder, read_yolo),
    "voc": Format("Pascal VOC XML with SegmentationObject masks, or CVAT's and labelme2voc's masks",
                  "JPEGImages/ with Annotations/*.xml, or SegmentationObject/ with labelmap.txt or "
                  "class_names.txt", is_voc_folder, read_voc),
    "sbd": Format("SBD's MATLAB files", "img/ with inst/*.mat", is_sbd_folder, read_sbd),
    "coco": Format("COCO as Roboflow exports it", "train/_annotations.coco.json", is_coco_folder,
                   None),
    "masks": Format("masks as images, one for each object or with a number for each",
                    "images/*.png with masks/*.png, A.png with A_mask.png, or A_rgb.png with "
                    "A_label.png", is_mask_folder, read_masks),
}


def convert(kind: str, source: Path, conversion: Conversion) -> tuple[dict[str, Part], list[str]]:
    """The splits of a dataset, and its class names (none: its files say them).

    Raises:
        UserError: it cannot be read.
    """
    read = FORMATS[kind].read
    if read is None:
        return read_coco(source, conversion), []
    return conversion.parts(read(source, conversion), source)


def recognise(folder: Path) -> tuple[str | None, Path]:
    """The format of a folder, or of the only one in it that has one, and that folder.

    Raises:
        UserError: it may be of several formats.
    """
    files = list_files(folder, ())
    found = _formats(folder, files)
    if not found:
        depth = len(folder.parts)
        below: dict[str, list[Path]] = {}
        for path in files:
            if len(path.parts) > depth + 1:
                below.setdefault(path.parts[depth], []).append(path)
        found = [one for name in sorted(below)[:_MOST_FOLDERS]
                 for one in _formats(folder / name, below[name])]
    if len(found) > 1:
        known = " and ".join(f"{kind} ({place}: {FORMATS[kind].looked_for})"
                             for kind, place in found[:3])
        kind, place = found[0]
        raise UserError(f"{folder} may be taken for {known}; say which: python -m data.convert "
                        f"{kind} {shlex.quote(str(place))} --out=FOLDER, then --data=FOLDER")
    return found[0] if found else (None, folder)


def _formats(folder: Path, files: Sequence[Path]) -> list[tuple[str, Path]]:
    return [(kind, folder) for kind, form in FORMATS.items() if form.is_it(folder, files)]


def expected_layouts(folder: Path) -> str:
    """What was looked for in a folder that is of no known format; the end of a sentence."""
    paste = description_to_paste(folder, list_files(folder, ()))
    if paste is not None:
        return (f"it holds COCO annotations in a layout that is not known: write {FOLDER_FILE} "
                f"there with the line {paste}")
    looked = "; ".join(f"{kind}: {form.looked_for}" for kind, form in FORMATS.items())
    return f"nor is it another tool's folder ({looked}), nor is there a {FOLDER_FILE}"


def cached_conversion(kind: str, source: Path) -> tuple[Path, str]:
    """Convert a dataset of another tool into the user's cache, unless it is there.

    Returns:
        The description in the cache, and a sentence on what `source` was taken for.

    Raises:
        UserError: it cannot be read, or the cache not be written.
    """
    conversion = Conversion(way_out="leave all such shapes and files out: python -m data.convert "
                                    f"{kind} {shlex.quote(str(source))} --out=FOLDER --skip_bad")
    folder = user_cache("datasets") / _key(kind, source)
    made, note = folder / FOLDER_FILE, folder / _NOTE
    if not made.is_file():
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(alone(folder))
            except OSError as problem:
                raise UserError(f"cannot write {folder}: {problem.strerror or problem}; set "
                                "XDG_CACHE_HOME to a folder for converted datasets") from None
            if not made.is_file():
                parts, names = convert(kind, source, conversion)
                text = (f"Data : {source} is taken for {kind} ({FORMATS[kind].title}): "
                        f"{counted(sum(part.images for part in parts.values()), 'image')}, "
                        f"{counted(sum(part.objects for part in parts.values()), 'object')} ("
                        f"{', '.join(f'{name} {part.images}' for name, part in parts.items())}"
                        f"{''.join('; ' + said for said in conversion.notes)}), converted in "
                        f"{folder}")
                write_whole(str(note), text.encode("utf-8", "backslashreplace"))
                # The description comes last: where it is, everything is.
                write_dataset(parts, names, folder, portable=False)
    return made, note.read_text(encoding="utf-8")


def _key(kind: str, source: Path) -> str:
    """Digest of all that a conversion depends on: this program's readers, and names, sizes and
    times of the source's files.
    """
    found = hashlib.sha256(f"{kind} {source.resolve()}".encode("utf-8", "surrogateescape"))
    for path in [Path(__file__), *sorted((Path(__file__).parent / "tools").glob("*.py"))]:
        found.update(path.read_bytes())
    for place in places_of(source) if kind == "yolo" else [source]:
        for path in list_files(place, ()) if place.is_dir() else [place]:
            try:
                state = path.stat()
            except OSError:  # a link that leads nowhere; whether it matters is said later
                continue
            found.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode(
                "utf-8", "surrogateescape"))
    return found.hexdigest()[:32]


def parser_of(kind: str) -> ArgumentParser:
    """Parser of one format's command line."""
    parser = ArgumentParser(prog=f"python -m data.convert {kind}",
                            description=f"Convert {FORMATS[kind].title}.")
    parser.add_argument("source", help="folder (yolo: or data.yaml)")
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="where train.json, val.json and data.yaml go")
    parser.add_argument("--val_fraction", type=float, default=0.2,
                        help="of the images for validation, where the source has no split")
    parser.add_argument("--seed", type=Bounded(int, 0), default=0, help="of that split")
    if kind != "coco":
        parser.add_argument("--classes", type=_words, default=(), metavar="A,B,..",
                            help="class names in the order wanted; default: all that occur, sorted "
                                 "(yolo: those of data.yaml; masks: object)")
        add_switch(parser, "--skip_bad", help="leave out and count what cannot be converted")
    if kind in _BOXES:
        add_switch(parser, "--boxes_as_masks", help="objects without an outline get their box")
    return parser


def convert_into(kind: str, args: argparse.Namespace) -> list[str]:
    """Convert a dataset and write it; returns the lines to print."""
    if not args.out:
        raise UserError("--out is empty, expected a folder")
    out = Path(args.out)
    refuse_foreign_files(out)
    conversion = Conversion(**{key: value for key, value in vars(args).items()
                               if key not in ("source", "out")})
    parts, names = convert(kind, Path(args.source), conversion)
    lines = write_dataset(parts, names, out)
    described = f": {len(names)} classes ({some(names, 10)})" if names else ""
    path = out / FOLDER_FILE
    return conversion.lines() + lines + [f"{path}{described}",
                                         f"next: python -m data.check {shlex.quote(str(path))}"]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if words == [""]:
        return []
    if "" in words or len(set(words)) < len(words):
        raise UserError(f"--classes is '{text}', expected different names with a comma between "
                        "two; a number of YOLO's is the place of its name")
    return words


def main(argv: list[str]) -> int:
    """Command line entry."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m data.convert FORMAT SOURCE --out=FOLDER\n\n" + "\n".join(
            f"  {kind:8s} {form.title}" for kind, form in FORMATS.items())
            + "\n\npython -m data.convert FORMAT --help shows the flags of each")
        return 0 if argv else 2
    if argv[0] not in FORMATS:
        raise UserError(f"unknown format '{argv[0]}'{nearest(argv[0], FORMATS) or '.'} Known: "
                        f"{', '.join(FORMATS)}.")
    print_lines(convert_into(argv[0], parser_of(argv[0]).parse_args(argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
