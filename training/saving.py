"""A run's checkpoints: what is in them, saving between two steps, going on from one."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, Optional

import torch

from data.config import Config
from training.run import Run
from training.state import check_same_run, pack_state, unpack_state
from utils import checkpoint
from utils.checkpoint import CheckpointName
from utils.weights.files import read_weights
from utils.weights.loading import load_network


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
    print("Saved weights : {}".format(path), flush=True)
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
        print("Weights : {}".format(load_network(run.model, read_weights(weights_path))))
    state = checkpoint.load_state(weights_path)
    if state is None:
        if run.average is not None:
            run.average.restart()
        named = CheckpointName.parse(weights_path)
        start = run.args.start_iter if run.args.start_iter >= 0 else (
            named.iteration if named else 0)
        print("Resumed weights only : {} (no {}); the optimiser starts afresh at iteration {}"
              .format(weights_path, checkpoint.state_path(weights_path), start))
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
    print("Resumed : {} at iteration {}".format(weights_path, start))
    return start
