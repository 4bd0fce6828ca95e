"""The tables of a run folder, filled from the records of the training."""

from __future__ import annotations

from typing import Any, Dict

from utils.run_environment import timestamp
from utils.run_folder import RunFolder, loss_cells, score_cells

_MIB = 1024 * 1024


class RunRecords:
    """Writes `training.csv` and `results.csv`; see `RunFolder` for where they are.

    The losses of an epoch's or validation's row are those of the last log line: nothing is asked
    of the device for it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._latest: Dict[str, Any] = {}

    def write(self, kind: str, values: Dict[str, Any]) -> None:
        """Take a record; `kind` is train, epoch or val, any other is left out."""
        if kind == "train":
            self._write_step(values)
        elif kind in ("epoch", "val"):
            scores = score_cells(values) if kind == "val" else {}
            self._folder.results.add(dict(
                self._latest, iteration=values["iteration"], epoch=values["epoch"],
                time=timestamp(), **scores))

    def close(self) -> None:
        """Nothing is open between two rows."""

    def _write_step(self, values: Dict[str, Any]) -> None:
        common = dict(loss_cells(values["losses"], values["total"]), lr=values["lr"],
                      skipped_steps=values["skipped"])
        self._latest = dict(common, images_per_second=values["avg_fps"] or values["fps"])
        self._folder.training.add(dict(
            common, iteration=values["iteration"], epoch=values["epoch"],
            images_per_second=values["fps"], seconds_per_step=values["seconds"],
            data_seconds=values["data_seconds"], memory_MiB=round(values["memory"] / _MIB, 1)))
