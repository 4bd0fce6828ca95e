"""A folder of weights files: whose they are, who writes there, which one to take.

    weights/                              files of the first training of a recipe
    weights/yolact_base-2/                those of the second: none replaces another's files
    weights/.yolact_base.training         whose the files of this recipe are
    weights/.yolact_base.lock             held by that training while it runs

A recipe's name stands for all trainings with it: two of different recipes share a folder, as ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import json
import os
import platform
from typing import BinaryIO, Iterator, NamedTuple

from utils.checkpoint import CheckpointName, load_state, recipe_of, state_path
from utils.errors import UserError
from utils.files import remove_abandoned, write_whole
from utils.weights.files import read_weights


class TrainingNote(NamedTuple):
    """What a folder of weights files says of the training that writes there."""

    id: str
    config_name: str
    """Of its recipe."""
    saved: str | None = None
    """Name of its newest file."""
    launch: str | None = None
    """The launch that saved it; all attempts of a launcher are one."""
    finished: bool = False
    process: str = ""
    """That runs or ran it, in words."""


class WeightsFolder:
    """A folder that no other training writes to, until it is closed or the process ends."""

    def __init__(self, path: str, lock: BinaryIO, note: TrainingNote) -> None:
        self.path, self._lock = path, lock
        remove_abandoned(path)
        self._write(note._replace(process=f"{os.getpid()} on {platform.node()}"))

    def close(self) -> None:
        """Leave it to others."""
        self._lock.close()

    def saved(self, path: str, launch: str, finished: bool) -> None:
        """Note what was saved."""
        self._write(self.note._replace(saved=os.path.basename(path), launch=launch,
                                       finished=finished))

    def _write(self, note: TrainingNote) -> None:
        self.note = note
        write_whole(_note_path(self.path, note.config_name),
                    json.dumps(note._asdict()).encode("ascii"))


def claim_folder(folder: str, config_name: str, training_id: str,
                 resumed: str | None = None) -> WeightsFolder:
    """The place in `folder` for the files of one training: where it has been writing, or the first
    where no other training has files of the recipe, `folder` itself before a folder in it.

    A folder that does not say whose its files are, as those of earlier versions, belongs to who
    goes on from one of them, `resumed`.

    Raises:
        UserError: this very training runs in another process, or the folder cannot be written.
    """
    try:
        for place, note in _notes(folder, config_name):
            if note.id == training_id:
                lock = _lock(place, config_name)
                if lock is None:
                    raise UserError(f"the training that writes to '{place}' still runs, in process "
                                    f"{note.process}; stop it first, or start a new one from its "
                                    "weights (--weights=FILE)")
                return WeightsFolder(place, lock, note)
        for place in _candidates(folder, config_name, resumed):
            lock = _lock(place, config_name) if _is_free(place, config_name, resumed) else None
            # What another has saved until now is only seen with the lock.
            if lock is not None and _is_free(place, config_name, resumed):
                break
        assert lock is not None
        return WeightsFolder(place, lock, TrainingNote(training_id, config_name))
    except OSError as error:
        raise UserError(f"cannot write '{os.path.join(folder, '')}': {error.strerror or error}; "
                        "free some space or choose another folder with --save_folder") from error


def _candidates(folder: str, config_name: str, resumed: str | None) -> Iterator[str]:
    if resumed is not None and any(os.path.samefile(os.path.dirname(resumed) or ".", place)
                                   for place in _places(folder)[1:]):
        yield os.path.dirname(resumed)
    yield folder
    for number in itertools.count(2):
        yield os.path.join(folder, f"{config_name}-{number}")


def _is_free(place: str, config_name: str, resumed: str | None) -> bool:
    """Whether no training's files are in the way; those of `resumed` may be."""
    files = list_checkpoints(place, config_name)
    return not files or (resumed is not None and _read_note(_note_path(place, config_name)) is None
                         and any(os.path.samefile(path, resumed) for path in files))


def _places(folder: str) -> list[str]:
    """`folder` and the folders in it."""
    return [folder] + sorted(glob.glob(os.path.join(glob.escape(folder), "*", "")))


def _note_path(place: str, config_name: str) -> str:
    return os.path.join(place, f".{config_name}.training")


def _notes(folder: str, config_name: str | None = None) -> Iterator[tuple[str, TrainingNote]]:
    """The notes of trainings in `folder` and the folders in it, each with its place."""
    for place in _places(folder):
        pattern = _note_path(glob.escape(place), glob.escape(config_name or "") or "*")
        for path in sorted(glob.glob(pattern)):
            note = _read_note(path)
            if note is not None:
                yield place, note


def _read_note(path: str) -> TrainingNote | None:
    try:
        with open(path, "rb") as stream:
            values = json.loads(stream.read(1 << 16).decode("ascii"))
        note = TrainingNote(**{key: values[key] for key in TrainingNote._fields if key in values})
    except (OSError, ValueError, TypeError):
        return None  # nobody's
    words = (note.id, note.config_name, note.saved or "", note.launch or "")
    return note if all(isinstance(word, str) for word in words) else None


def _lock(place: str, config_name: str) -> BinaryIO | None:
    """Lock `place` for the trainings of a recipe; None where another process has done so.

    A lock of POSIX's older kind: the loader's processes do not inherit it, and file servers know
    it.
    """
    os.makedirs(place, exist_ok=True)
    stream = open(os.path.join(place, f".{config_name}.lock"), "wb")  # noqa: SIM115
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            stream.close()
            return None
        # A file system without locks: the note alone has to do.
    return stream


def list_checkpoints(folder: str, config_name: str | None = None) -> list[str]:
    """Weights files in `folder` that follow the naming pattern, oldest iteration first; no links to
    files that are gone.
    """
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "*.pth")):
        name = CheckpointName.parse(path)
        if name is not None and config_name in (None, name.config):
            with contextlib.suppress(OSError):  # just removed by its training, too
                found.append((name.iteration, os.path.getmtime(path), path))
    return [path for _, _, path in sorted(found)]


def find_checkpoint(which: str, folder: str, config_name: str | None = None) -> str:
    """Resolve `latest`, `interrupt` or a path to a weights file.

    `latest` is the highest iteration of the training that saved last, in `folder` or a folder in
    it. A weights file without a state beside it, as people download them, comes from no training
    here and stands behind all that do; where there are only such files, the newest is taken.

    Raises:
        UserError: nothing suitable lies in `folder`, or the path does not exist.
    """
    if which not in ("latest", "interrupt"):
        if not os.path.isfile(which):
            raise UserError(f"no weights file '{which}' (looked for {os.path.abspath(which)}); "
                            "give the path of a .pth file, 'latest' or 'interrupt'")
        return which
    found = [path for place in _places(folder) for path in list_checkpoints(place, config_name)
             if which == "latest" or path.endswith("_interrupt.pth")]
    if not found:
        of_recipe = f" of '{config_name}'" if config_name else ""
        raise UserError(f"no {which} checkpoint{of_recipe} in '{os.path.abspath(folder)}'; train "
                        "first or give the path of a .pth file")
    trained = [path for path in found if os.path.isfile(state_path(path))]
    newest = max(trained or found, key=os.path.getmtime)
    return [path for path in trained or [newest] if recipe_of(path) == recipe_of(newest)
            and os.path.dirname(path) == os.path.dirname(newest)][-1]


def whole_checkpoint(path: str) -> str:
    """`path`, or if it or its state is damaged the last one before it in its folder that is not;
    what is left out is said.

    Raises:
        UserError: what is wrong with `path`, where there is no other.
    """
    before = itertools.takewhile(lambda other: not os.path.samefile(other, path), list_checkpoints(
        os.path.dirname(path) or ".", recipe_of(path)))
    older = [other for other in before if os.path.isfile(state_path(other))]
    problems: list[UserError] = []
    for candidate in [path] + older[::-1]:
        try:
            if "weights_sha256" not in (load_state(candidate) or {}):
                read_weights(candidate)
        except UserError as error:
            problems.append(error)
            continue
        if problems:
            print(f"Warning: {problems[0]}; '{candidate}', the last before it, is taken",
                  flush=True)
        return candidate
    raise problems[0]


def find_restart(launch: str, folder: str, config_name: str) -> str | None:
    """The file that this very launch saved last; None where it has saved none, or it is gone."""
    found = (os.path.join(place, note.saved) for place, note in _notes(folder, config_name)
             if note.launch == launch and note.saved is not None)
    return next(filter(os.path.isfile, found), None)


def unfinished_training(folder: str) -> str:
    """Newest file of a training in `folder` that is not at its end.

    Whatever its note names as saved: a kill may have come between the file and the note.

    Raises:
        UserError: there is none.
    """
    found = [path for place, note in _notes(folder) if not note.finished
             for path in list_checkpoints(place, note.config_name)
             if os.path.isfile(state_path(path))]
    if not found:
        raise UserError(f"--resume: no unfinished training in '{os.path.abspath(folder)}'; name "
                        "one with --resume=FILE, or --resume=latest --max_iter=N to train a "
                        "finished one longer")
    return max(found, key=os.path.getmtime)


def weights_of_run(path: str) -> str:
    """Where `path` is a run folder, its best weights, else its last; any other path as it is.

    Raises:
        UserError: the folder has neither.
    """
    if not os.path.isdir(path):
        return path
    for name in ("best.pth", "last.pth"):
        weights = os.path.join(path, "weights", name)
        if os.path.isfile(weights):
            return weights
    raise UserError(f"'{path}' is a folder without weights/best.pth and weights/last.pth; give a "
                    "run folder or the path of a .pth file")


def run_to_resume(run: str, save_folder: str) -> tuple[str, str]:
    """A run folder and its last checkpoint; those of the unfinished training where `run` is empty.

    Raises:
        UserError: there is none.
    """
    if run:
        path = os.path.join(run, "weights", "last.pth")
        if not os.path.isfile(path):
            raise UserError(f"--resume is '{run}', a folder without weights/last.pth; give a run "
                            "folder, the path of a .pth file, latest or interrupt")
        if not os.path.isfile(state_path(path)):  # a kill came between its weights and it, perhaps
            raise UserError(f"--resume is '{run}', which has no weights/last.state to go on from; "
                            "give a file of the training's --save_folder, or start a new one from "
                            f"the weights with --weights={path}")
        return run, path
    path = whole_checkpoint(unfinished_training(save_folder))
    run_folder = ((load_state(path) or {}).get("run_folder") or {}).get("path")
    if run_folder is None or not os.path.isdir(run_folder):
        where = "without one" if run_folder is None else f"in '{run_folder}', now gone"
        raise UserError(f"--resume: the flags of a training are in its run folder, and '{path}' "
                        f"was trained {where}; repeat its flags with --resume={path}")
    return run_folder, path
