"""A run's checkpoints: what is in them, saving between two steps, going on from one."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import torch

from data.config import Config
from utils import checkpoint
from utils.amp import Precision
from utils.checkpoint import CheckpointName, list_checkpoints, rng_state, set_rng_state, state_path
from utils.engine.records import BestScore, StepRecords
from utils.engine.setup import Run
from utils.errors import UserError
from utils.optimizer import FlatOptimizer
from utils.weights.files import read_weights
from utils.weights.loading import load_network


def find_restart(environ: Mapping[str, str], folder: str, config_name: str) -> Optional[str]:
    """Newest weights file of this very launch in `folder`, if this is a restart.

    None in the first attempt, and where nothing was saved since LAUNCH_TIME (seconds): files of an
    earlier training must not be mistaken for this one's.
    """
    if int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) == 0:
        return None
    since = float(environ.get("LAUNCH_TIME") or "inf")
    found = [path for path in list_checkpoints(folder, config_name)
             if os.path.getmtime(path) >= since]
    return found[-1] if found else None


_BEFORE_IT_WAS_STORED = {"precision": "O0", "sync_bn": False}
"""What runs were whose state does not say it."""


def pack_state(identity: Dict[str, Any], iteration: int, epoch_size: int,
               optimizer: FlatOptimizer, records: StepRecords,
               best: BestScore, precision: Precision) -> Dict[str, Any]:
    """Everything but the weights that the run needs to go on after `iteration` steps.

    Args:
        identity: what makes this run the same training: configuration, class names, seed, batch,
            schedule; plain types. Stored at the top level, so that evaluation finds the
            configuration and the class names without knowing about training.
        iteration: steps done.
        epoch_size: steps in an epoch.
        optimizer: its buffers are stored.
        records: the losses of the last steps are stored.
        best: the best validation so far.
        precision: its loss scale is stored.
    """
    return dict(identity, iteration=iteration, epoch=iteration // epoch_size,
                position=iteration % epoch_size, optimizer=optimizer.state_dict(),
                records=records.state_dict(), best=best.state_dict(),
                loss_scale=precision.state_dict(), rng=rng_state())


def check_same_run(identity: Dict[str, Any], state: Dict[str, Any], weights_path: str) -> None:
    """Refuse to resume a training that would not be the same one.

    Raises:
        UserError: names the first part that differs, with both values.
    """
    for key, value in identity.items():
        stored = state.get(key, _BEFORE_IT_WAS_STORED.get(key))
        if stored != value:
            found, expected = _difference(stored, value)
            raise UserError(
                f"cannot resume '{weights_path}': its {key} is {found}, this run's is {expected}; "
                f"use the flags and the data of that run, or remove '{state_path(weights_path)}' "
                "to start a new training from its weights")


def unpack_state(state: Dict[str, Any], optimizer: FlatOptimizer, records: StepRecords,
                 best: BestScore, precision: Precision, device: torch.device) -> int:
    """Put back what `pack_state` packed; returns the number of steps done.

    A state written before there was a best validation or a loss scale leaves them as they are.
    """
    optimizer.load_state_dict(state["optimizer"])
    records.load_state_dict(state["records"], device)
    if "best" in state:
        best.load_state_dict(state["best"])
    precision.load_state_dict(state.get("loss_scale", {}))
    set_rng_state(state["rng"])
    return int(state["iteration"])


def _difference(found: Any, expected: Any) -> Tuple[Any, Any]:
    """Reduce two dicts to the keys that differ, for a readable message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in expected if found.get(key) != expected[key]]
        return {key: found.get(key) for key in keys}, {key: expected[key] for key in keys}
    return found, expected


def identity_of(run: Run) -> Dict[str, Any]:
    """What makes two runs the same training; a resumed run has to agree with all of it."""
    return {
        "config": run.config.to_dict(),
        "class_names": run.dataset.class_names,
        "category_ids": [category.id for category in run.dataset.categories],
        "num_images": len(run.dataset),
        "global_batch": run.loader.batch_size * run.sharing.shares,
        "learning_rate": run.learning_rate.state_dict(),
        "seed": run.args.seed,
        "bn_frozen": run.model.bn_frozen,
        "sync_bn": run.args.sync_bn,
        "precision": run.precision.name,
    }


def weights_of(run: Run) -> Dict[str, torch.Tensor]:
    """The weights that are saved, scored and handed on, under their names in the network.

    They are the moving averages where the run keeps them.
    """
    raw = _raw_weights_of(run)
    return raw if run.average is None else run.average.apply_to(raw)


@contextlib.contextmanager
def scored_weights(run: Run) -> Iterator[None]:
    """Inside the block the network has the weights that `weights_of` returns."""
    with run.precision.float32_weights(run.model):
        if run.average is None:
            yield
            return
        run.average.share(run.processes)
        with run.average.in_place_of_weights():
            yield


def _raw_weights_of(run: Run) -> Dict[str, torch.Tensor]:
    with run.precision.float32_weights(run.model):
        return run.model.state_dict()


def state_of(run: Run, done: int) -> Dict[str, Any]:
    """Everything beside the weights that iteration `done` of this training is made of."""
    state = pack_state(identity_of(run), done, run.loader.epoch_size, run.optimizer, run.records,
                       run.best, run.precision)
    if run.average is not None:
        state["raw_weights"] = checkpoint.on_cpu(_raw_weights_of(run))
    if run.folder is not None:
        state["run_folder"] = run.folder.origin
    return state


def save(run: Run, done: int, interrupt: bool = False) -> Optional[str]:
    """Write the checkpoint of iteration `done`; only the main process does. Returns its path."""
    if not run.processes.is_main or run.args.train_performance:
        return None
    folder = run.args.save_folder
    older = checkpoint.list_checkpoints(folder, run.config.name)
    name = CheckpointName(run.config.name, done // run.loader.epoch_size, done, interrupt)
    path = checkpoint.save_checkpoint(name, folder, weights_of(run), state_of(run, done))
    print(f"Saved weights : {path}", flush=True)
    if run.folder is not None:
        run.folder.keep_weights(path, "last")
    for old in older:
        parsed = CheckpointName.parse(old)
        assert parsed is not None
        # What is further on belongs to another training in the same folder.
        replaced = parsed.interrupt if interrupt else (
            run.args.keep_latest and parsed.iteration < done
            and parsed.iteration % run.args.keep_latest_interval != 0)
        if replaced and old != path:
            checkpoint.remove_checkpoint(old)
    return path


def resume(run: Run, weights_path: str) -> int:
    """Load a checkpoint into `run`; returns the iteration to go on from.

    With the full state beside the weights the run goes on exactly; where it keeps averages, the
    weights file has them and the state the raw weights. Weights alone (the original's
    files, for one) start a fresh optimiser at --start_iter or at the iteration in the name.
    """
    with run.precision.float32_weights(run.model):
        print(f"Weights : {load_network(run.model, read_weights(weights_path))}")
    state = checkpoint.load_state(weights_path)
    if state is None:
        if run.average is not None:
            run.average.restart()
        named = CheckpointName.parse(weights_path)
        start = run.args.start_iter if run.args.start_iter >= 0 else (
            named.iteration if named else 0)
        print(f"Resumed weights only : {weights_path} (no {checkpoint.state_path(weights_path)}); "
              f"the optimiser starts afresh at iteration {start}"
              )
        return start
    if isinstance(state.get("config"), dict):
        # As this version writes it; a run may go on with another patience.
        state["config"] = Config.from_dict(state["config"]).replace(
            early_stopping=run.config.early_stopping).to_dict()
    check_same_run(identity_of(run), state, weights_path)
    if run.average is not None:
        with run.precision.float32_weights(run.model):
            run.average.load(run.model.state_dict())
            run.model.load_state_dict(state["raw_weights"])
    start = unpack_state(state, run.optimizer, run.records, run.best, run.precision, run.device)
    run.folder_before = state.get("run_folder")
    print(f"Resumed : {weights_path} at iteration {start}")
    return start
