"""Where the numbers of a training go beside its log: TensorBoard, MLflow, Weights & Biases.

Each by its own package, imported only where it is asked for. Servers, projects and accounts are
told to the packages in their own way: MLFLOW_TRACKING_URI, WANDB_PROJECT and so on.
"""

from __future__ import annotations

import importlib
from typing import Any, Mapping

from utils.errors import UserError, first_line

TRACKERS = ("mlflow", "wandb")
"""What --track knows."""


class Tracker:
    """Takes numbers by name; an error of any kind may come out of a foreign package."""

    name = ""

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Keep `numbers` of an iteration."""

    def close(self) -> None:
        """Send what is still waiting."""


class TensorBoard(Tracker):
    """Events in a folder; what earlier ones say of iterations after `start` is void.

    Raises:
        ImportError: it is not installed.
        UserError: it cannot write to such a folder.
    """

    name = "TensorBoard's events"

    def __init__(self, folder: str, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except AttributeError as error:  # old PyTorch beside a new setuptools
            raise ImportError(str(error)) from error
        try:
            self._writer = SummaryWriter(folder, purge_step=start + 1 if start else None)
        except UnicodeError as error:
            raise UserError(f"TensorBoard cannot write to '{folder}', a name that is not in UTF-8; "
                            "choose another") from error

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Mlflow(Tracker):
    """A run of MLflow, with the training's id as a tag: a resumed training goes on in it."""

    name = "MLflow's run"

    def __init__(self, training_id: str, run_name: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        known = mlflow.search_runs(filter_string=f"tags.training = '{training_id}'", max_results=1,
                                   output_format="list")
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
        else:
            mlflow.start_run(run_name=run_name, tags={"training": training_id})
            mlflow.log_params(dict(settings))

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        # A server that is slow to answer must not hold the training up.
        self._mlflow.log_metrics(dict(numbers), step=iteration, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class _Wandb(Tracker):
    """A run of Weights & Biases under the training's id: a resumed training goes on in it."""

    name = "the run of Weights & Biases"

    def __init__(self, training_id: str, run_name: str, settings: Mapping[str, Any],
                 folder: str | None) -> None:
        import wandb

        self._run = wandb.init(id=training_id, name=run_name, config=dict(settings),
                               resume="allow", dir=folder)
        # Its own count of steps only grows; that of a resumed training goes back.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, numbers: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(numbers, iteration=iteration))

    def close(self) -> None:
        self._run.finish()


def require_tracker(name: str) -> None:
    """A `UserError` where the package of a tracker is not installed, or broken."""
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a foreign package stumbles over
        raise UserError(f"--track={name} needs the package {name} ({first_line(error)}); install "
                        "it or leave the flag out") from error


def open_tracker(name: str, training_id: str, run_name: str, settings: Mapping[str, Any],
                 folder: str | None = None) -> Tracker:
    """Begin, or go on with, the training's run at a tracker whose package is there.

    `settings` are the configuration; what the package writes on this host goes to `folder`, or
    where it likes.

    Raises:
        UserError: the package says no: no server, no account.
    """
    try:
        return (_Mlflow(training_id, run_name, settings) if name == "mlflow" else
                _Wandb(training_id, run_name, settings, folder))
    except Exception as error:
        raise UserError(f"--track={name}: {first_line(error)}") from error
