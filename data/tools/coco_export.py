"""COCO's format as Roboflow exports it: `train/_annotations.coco.json` among the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from data.coco import CocoDataset
from data.tools.conversion import Conversion, Part, signed
from data.tools.source_files import read_text, split_folders
from utils.errors import UserError

_FILE = "_annotations.coco.json"


def is_coco_folder(folder: Path, files: Sequence[Path]) -> bool:
    """Whether the files of a folder are laid out as Roboflow's export."""
    return any((place / _FILE).is_file() for place in [folder, *split_folders(folder).values()])


def read_coco(folder: Path, conversion: Conversion) -> Dict[str, Part]:
    """The splits of an export, as their files say; its only one is divided.

    Raises:
        UserError: a file is not COCO's.
    """
    places = {split: place for split, place in split_folders(folder).items()
              if (place / _FILE).is_file()}
    if not places and (folder / _FILE).is_file():
        places = {"train": folder}
    if "train" not in places:
        raise UserError(f"{folder.absolute()}: no train/{_FILE}; for another layout write a "
                        "data.yaml (docs/data.md)")
    datasets = {split: CocoDataset(place, place / _FILE) for split, place in places.items()}
    if len(datasets) > 1 or not conversion.val_fraction:
        return {split: _part(dataset, Path(dataset.annotation_file))
                for split, dataset in datasets.items()}
    content = json.loads(read_text(places["train"] / _FILE))
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


def _part(dataset: CocoDataset, file: Path) -> Part:
    report = dataset.report
    return Part(Path(dataset.images_dir), file, len(dataset), report.objects, report.empty_images)


def description_to_paste(folder: Path, files: Sequence[Path]) -> Optional[str]:
    """A data.yaml, on one line, for COCO files in a layout that is not known; None for none."""
    found: Dict[str, Tuple[str, str]] = {}
    for path in [file for file in files if file.suffix.lower() == ".json"][:20]:
        name = _first_image(path)
        if name is not None:
            lower = path.name.lower()
            split = "val" if "val" in lower else "test" if "test" in lower else "train"
            images = [file for file in files if str(file).endswith("/" + name)]
            place = Path(str(images[0])[:-len(name) - 1]) if images else folder / "images"
            found.setdefault(split, (_below(place, folder), _below(path, folder)))
    lines = [f"{split}: {{images: {json.dumps(images)}, annotations: {json.dumps(annotations)}}}"
             for split, (images, annotations) in found.items()]
    return "{" + ", ".join(lines) + "}" if lines else None


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _first_image(path: Path) -> Optional[str]:
    """Name of the first image of a COCO file; None for what is none."""
    try:
        text = read_text(path)
        if '"images"' not in text or '"categories"' not in text:
            return None
        images: List[Any] = json.loads(text)["images"]
        name = images[0]["file_name"]
    except (UserError, ValueError, RecursionError, KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) and name else None
