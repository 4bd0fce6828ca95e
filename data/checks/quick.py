"""The part of the check that needs no image; training runs it before it starts."""

from __future__ import annotations

import json
from typing import List, Optional, Sequence

from data.checks.anchors import suggestions
from data.checks.memory import Memory, file_stamp, file_state
from data.checks.objects import object_findings
from data.checks.splits import class_findings, overlap_findings
from data.checks.statistics import measure
from data.checks.turned import turned_notes
from data.coco import CocoDataset
from data.config import Config
from utils.errors import UserError

FULL = "full check "
_SHOWN = 5
_HEADERS = 2000
"""Images of a split whose headers are read before each training."""


def annotation_findings(train: CocoDataset, val: Optional[CocoDataset]) -> List[str]:
    """Sentences about both splits' annotations and how they go together."""
    found = object_findings("train", train)
    if val is None:
        return found + class_findings(measure("train", train), None)
    found += object_findings("val", val)
    found += class_findings(measure("train", train), measure("val", val))
    return found + overlap_findings(train, val)


def quick_check(train: CocoDataset, val: Optional[CocoDataset], config: Config,
                strict: bool = False) -> List[str]:
    """Lines to print before training; the same files are looked at once.

    What the annotation file's own report says is not repeated. Unreadable images are known where
    `python -m data.check` was run before.

    Raises:
        UserError: `strict`, and something was found.
    """
    memory = Memory(train.annotation_file)
    stamp = quick_stamp(train, val)
    kept = memory.recall(stamp)
    if kept is None:
        kept = json.dumps(annotation_findings(train, val))
        memory.keep(stamp, kept)
        memory.save()
    found = json.loads(kept)
    full = _recall_full(memory, FULL + stamp)
    found += full or []
    if strict and found:
        raise UserError("the data check found: {}".format("; ".join(found)))
    said = set(train.report.sentences()) | set(val.report.sentences() if val else [])
    new = [text for text in found if text.split(": ", 1)[-1] not in said]
    lines = ["Data check : {}{}".format(
        "nothing found" if not found else "{} finding{}".format(
            len(found), "" if len(found) == 1 else "s"),
        "" if full is not None else " in the annotations; python -m data.check reads the images "
        "too")]
    lines += ["  " + text for text in new[:_SHOWN]]
    if len(new) > _SHOWN:
        lines.append("  ... and {} more; python -m data.check shows them".format(
            len(new) - _SHOWN))
    splits = {"train": train} if val is None else {"train": train, "val": val}
    for name, dataset in splits.items():
        lines += ["  " + note for note in turned_notes(name, dataset, _HEADERS)]
    return lines + ["  suggestion: " + text for text in suggestions(measure("train", train), config)
                    if "--pred_scales" in text]


def keep_full(memory: Memory, train: CocoDataset, val: Optional[CocoDataset],
              findings: Sequence[str], files: Sequence[str]) -> None:
    """Remember what a check of the images found in `files`, until one of these changes."""
    memory.keep(FULL + quick_stamp(train, val), json.dumps(
        {"findings": list(findings), "files": [[path, file_state(path)] for path in files]}))


def _recall_full(memory: Memory, stamp: str) -> Optional[List[str]]:
    """Findings that `keep_full` remembered; None for none, or where a file was seen to since."""
    kept = json.loads(memory.recall(stamp) or "null")
    if kept is None or any(file_state(path) != state for path, state in kept["files"]):
        return None
    return kept["findings"]


def quick_stamp(train: CocoDataset, val: Optional[CocoDataset]) -> str:
    """Changes with the annotation files and the image folders' names."""
    parts = [part for dataset in (train, val) if dataset is not None
             for part in (file_stamp(dataset.annotation_file), dataset.images_dir)]
    return " | ".join(parts)
