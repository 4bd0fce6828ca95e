"""What a prediction run leaves behind: drawn pictures, cut-outs, records in JSON, failures."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import IO, Any, Callable, Dict, List, Optional

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import write_whole
from utils.inference import StageTimes
from utils.prediction.result import Prediction

_SHOWN_FAILURES = 20
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class Failures:
    """Count what failed and say the first ones; the run goes on.

    Args:
        say: takes a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.count = 0

    def report(self, error: Exception, times: int = 1) -> None:
        """Count a failure `times` times."""
        self.count += times
        if self.count - times < _SHOWN_FAILURES:
            self._say("failed: {}".format(error))
        elif self.count - times == _SHOWN_FAILURES:
            self._say("failed: more than {}; the others are only counted".format(_SHOWN_FAILURES))


class JsonList:
    """A JSON file with a list that grows record by record and takes its name at the end.

    Raises:
        UserError: the file cannot be written; only the first time, then records are dropped.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.records = 0
        self._temporary = "{}.{}.tmp".format(path, os.getpid())
        self._file: Optional[IO[str]] = None
        self.is_broken = False

    def extend(self, records: List[Dict[str, Any]]) -> None:
        """Append records."""
        if self.is_broken:
            return
        try:
            file = self._open()
            for record in records:
                file.write((",\n" if self.records else "[") + json.dumps(
                    record, separators=(",", ":"), ensure_ascii=False))
                self.records += 1
            file.flush()
        except OSError as error:
            raise self._give_up(error) from None

    def close(self) -> None:
        """Finish the file; without records it is an empty list."""
        if self.is_broken:
            return
        try:
            file = self._open()
            file.write("]\n" if self.records else "[]\n")
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._give_up(error) from None

    def _open(self) -> IO[str]:
        if self._file is None:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            self._file = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115
        return self._file

    def _give_up(self, error: OSError) -> UserError:
        self.is_broken = True
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            pass  # what is buffered still finds no place
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)
        return UserError("cannot write '{}': {}; it is left out".format(
            self.path, error.strerror or error))


@dataclass(frozen=True)
class DrawingChoice:
    """Which objects are shown, and what of them."""

    top_k: Optional[int] = 5
    score_threshold: float = 0.0
    masks: bool = True
    boxes: bool = True
    text: bool = True
    scores: bool = True

    def select(self, prediction: Prediction) -> Prediction:
        """The objects that are drawn, cut out and recorded."""
        return prediction.best(self.top_k, self.score_threshold)

    def draw(self, prediction: Prediction) -> np.ndarray:
        """Draw all objects of `prediction`."""
        return prediction.draw(None, 0, self.masks, self.boxes, self.text, self.scores)


class PredictionOutput:
    """Draw and write the predictions of a run.

    Args:
        choice: what is shown.
        failures: gets what could not be written.
        times: of the stages "drawing" and "writing".
        json_path: file for records in COCO's result format, or None.
        polygons: outlines instead of run lengths in it.
        crops_folder: for cut-outs, or None.
    """

    def __init__(self, choice: DrawingChoice, failures: Failures, times: StageTimes,
                 json_path: Optional[str] = None, polygons: bool = False,
                 crops_folder: Optional[str] = None) -> None:
        self.choice = choice
        self.failures = failures
        self.times = times
        self.objects = 0
        self.pictures = 0
        self.json = None if json_path is None else JsonList(json_path)
        self._polygons = polygons
        self._crops_folder = crops_folder

    def picture(self, prediction: Prediction, image_id: int, target: str) -> None:
        """Write a drawn picture and whatever else was asked for."""
        shown = self.choice.select(prediction)
        with self.times.stage("drawing"):
            drawn = self.choice.draw(shown)
        with self.times.stage("writing"):
            self.pictures += self._try(lambda: write_picture(target, drawn))
        self.records(shown, image_id, os.path.splitext(os.path.basename(target))[0])

    def frame(self, prediction: Prediction, number: int) -> np.ndarray:
        """Draw a video's frame and return it; write whatever else was asked for."""
        shown = self.choice.select(prediction)
        with self.times.stage("drawing"):
            drawn = self.choice.draw(shown)
        self.records(shown, number, "{:06d}".format(number))
        return drawn

    def records(self, shown: Prediction, image_id: int, name: str) -> None:
        """Write the cut-outs and records of one picture."""
        self.objects += len(shown)
        with self.times.stage("writing"):
            if self._crops_folder is not None:
                folder = self._crops_folder
                self._try(lambda: write_cut_outs(shown, folder, name))
            if self.json is not None:
                found = shown.to_coco(image_id, self._polygons)
                file = {} if shown.path is None else {"file_name": os.path.basename(shown.path)}
                json_file = self.json
                self._try(lambda: json_file.extend([dict(record, **file) for record in found]))

    def close(self) -> None:
        """Finish the JSON file."""
        if self.json is not None:
            self._try(self.json.close)

    def _try(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except UserError as error:
            self.failures.report(error)
            return False
        return True


def write_picture(path: str, picture: np.ndarray) -> None:
    """Encode a picture as its name says (PNG without an ending) and write it whole.

    Raises:
        UserError: OpenCV does not know the ending, or the file cannot be written.
    """
    ending = os.path.splitext(path)[1] or ".png"
    try:
        written, data = cv2.imencode(ending, picture)
    except cv2.error:
        written = False
    if not written:
        raise UserError("cannot write '{}': OpenCV does not write {} files of {}x{} pixels; try "
                        ".png".format(path, ending, picture.shape[1], picture.shape[0]))
    write_whole(path, lambda stream: stream.write(data.data))


def write_cut_outs(shown: Prediction, folder: str, name: str) -> None:
    """Write each object as `<name>_<number>_<class>.png` with a transparent background."""
    for n, cut_out in shown.cut_outs():
        label = _NOT_IN_NAMES.sub("_", shown.class_names[n])
        write_picture(os.path.join(folder, "{}_{:02d}_{}.png".format(name, n + 1, label)), cut_out)
