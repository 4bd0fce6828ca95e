"""What train.py says of a run before its first step and after its last one."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, Dict, List, Mapping, Optional, Tuple

from data.checks.quick import quick_check
from data.coco import CocoDataset
from data.config import NOT_FROZEN
from data.layouts import find_dataset
from training.memory import estimate
from training.run import Run
from training.summary_text import (
    Best,
    Plan,
    SplitCounts,
    data_table,
    end_card,
    named_line,
    network_line,
    options_line,
    schedule_lines,
    step_line,
    without_flag,
)
from utils.checkpoint import CheckpointName, rng_state, set_rng_state
from utils.device import describe
from utils.errors import UserError

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCORE_THRESHOLD = 0.3
"""Of the command that draws a picture: what a person wants to see."""


def start_lines(run: Run, start: int) -> List[str]:
    """What is about to happen. The lines up to `learning rate` are also read by programs."""
    config, args = run.config, run.args
    size, max_iter = run.loader.epoch_size, run.learning_rate.max_iter
    cards, parts = run.processes.world_size, run.sharing.parts
    parameters = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = [describe(run.device)] + run.dataset.report.sentences() + quick_check(
        run.dataset, run.validation_set, config, args.strict)
    lines += data_table([_counts("train", run.dataset)] + (
        [_counts("val", run.validation_set)] if run.validation_set is not None else []))
    lines.append("{}: {} classes, {} parameters, input {} x {}".format(
        config.name, config.num_classes - 1, parameters, config.max_size, config.max_size))
    lines.append("{} images, batch {} x {} card{}{}, {} iterations an epoch; iterations {} to {} "
                 "({:.1f} epochs), learning rate {:g}, precision {}".format(
                     len(run.dataset), run.loader.batch_size, cards, "" if cards == 1 else "s",
                     " x {} parts".format(parts) if parts > 1 else "", size, start, max_iter,
                     max_iter / size, run.learning_rate.base_lr, run.precision.name))
    lines.append(network_line(trained, parameters - trained, _batch_norm(run)))
    lines.append(step_line(run.loader.batch_size, cards, parts))
    lines += schedule_lines(_plan(run)) + options_line(_options(run))
    return lines + [named_line("Memory", "about {}".format(_memory(run)))]


def end_lines(run: Run, outcome: Any, seconds: float, path: Optional[str],
              finished: bool) -> List[str]:
    """What came out of it, and commands to paste.

    Args:
        run: the training.
        outcome: `train.Outcome`.
        seconds: since the first step of this session.
        path: weights that were saved at the end; None where none were.
        finished: False where a signal ended it.
    """
    best, kept = None, None
    if run.best.iteration:
        kept = _best_weights(run)
        score = run.best.mask_ap
        best = Best(None if score is None else 100 * score, run.best.iteration, kept)
    why = ""
    if outcome.stopped_early:
        why = "{} validation{} in a row found nothing better (--early_stopping={})".format(
            run.best.since, "" if run.best.since == 1 else "s", run.config.early_stopping)
    elif not finished:
        why = "by a signal"
    weights = kept or path
    following = [] if weights is None else [
        ("score", _python("eval.py") + ["--trained_model=" + weights] + _validation_flags(run)
         + _device(run)),
        ("draw a picture", _python("eval.py") + ["--trained_model=" + weights]
         + _picture_flags(run) + _device(run))]
    if path is not None:
        following.append(_after_the_end(run, path, finished, outcome.stopped_early))
    return end_card(outcome.done, outcome.done / run.loader.epoch_size, seconds,
                    outcome.images_per_second, best, why, [words for _, words in following],
                    ", ".join(title for title, _ in following), run.records.total_skipped)


def _counts(name: str, dataset: CocoDataset) -> SplitCounts:
    report = dataset.report
    return SplitCounts(name, len(dataset), report.objects, len(dataset.categories),
                       report.empty_images, report.crowds, report.dropped)


def _batch_norm(run: Run) -> str:
    if run.model.bn_frozen:
        return "frozen"
    return "over all cards" if run.args.sync_bn else "trained"


def _plan(run: Run) -> Plan:
    rate, args = run.learning_rate, run.args
    validated = 0
    if run.validation_set is not None:
        validated = min(len(run.validation_set), args.validation_size)
    return Plan(run.loader.epoch_size, rate.max_iter, rate.base_lr, rate.schedule, rate.lr_steps,
                rate.gamma, rate.warmup_init, rate.warmup_until, rate.base_lr * rate.final_factor,
                args.save_interval, args.save_folder,
                args.validation_epoch if run.validation_set is not None else 0, validated,
                None if rate.max_iter == run.config.max_iter else run.config.max_iter,
                run.loader.left_out)


def _options(run: Run) -> Dict[str, str]:
    """Training options that are turned on, with what they are set to."""
    config, found = run.config, {}
    if config.ema_decay:
        found["moving average of the weights"] = "(decay {:g})".format(config.ema_decay)
    if config.clip_grad_norm:
        found["gradient norm up to"] = "{:g}".format(config.clip_grad_norm)
    if config.early_stopping:
        found["early stopping after"] = "{} validations".format(config.early_stopping)
    if config.freeze != NOT_FROZEN:
        found["frozen"] = config.freeze if not config.freeze.isdigit() else (
            "stem and {} stages".format(config.freeze))
    if config.multi_scale:
        found["input sides"] = "{} px, a new one every {} iterations".format(
            " ".join(str(side) for side in config.multi_scale), config.multi_scale_interval)
    if isinstance(config.class_weights, str):
        found["class weights"] = config.class_weights
    elif config.class_weights:
        found["class weights"] = " ".join("{}={:g}".format(*pair) for pair in config.class_weights)
    for name, chosen in (("fused optimiser", run.args.fused_optimizer),
                         ("fused loss", run.args.fused_loss)):
        if chosen:
            found[name] = ""
    return found


def _memory(run: Run) -> str:
    state = rng_state()  # the estimate builds a network, whose weights are drawn
    try:
        need = estimate(run.config.at_largest_side(), run.model, run.optimizer, run.precision.level)
    finally:
        set_rng_state(state)
    return need.sentence(run.loader.batch_size)


def _best_weights(run: Run) -> Optional[str]:
    """File of the best validation's weights, if there still is one."""
    done = run.best.iteration
    places = [CheckpointName(run.config.name, done // run.loader.epoch_size, done).path(
        run.args.save_folder)]
    if run.folder is not None:
        places.insert(0, run.folder.weights("best"))
    return next((place for place in places if os.path.exists(place)), None)


def _python(program: str) -> List[str]:
    """Words that start `program` with this interpreter from the current folder."""
    folder = os.path.dirname(sys.executable)
    name = next((name for name in ("python", "python3") if os.path.dirname(
        shutil.which(name) or "") == folder), sys.executable)
    path = os.path.relpath(os.path.join(PROJECT, program))
    return [name, path if not path.startswith("..") else os.path.join(PROJECT, program)]


def _device(run: Run) -> List[str]:
    args = run.args
    flags = [] if args.device_id is None else ["--device_id={}".format(args.device_id)]
    if not args.cuda:
        return ["--cuda=False"] + flags
    return flags if args.node_device == "auto" else ["--eval_device=" + args.node_device] + flags


def _validation_flags(run: Run) -> List[str]:
    """The validation images of this run, or the training images where there are no others."""
    args = run.args
    if args.valid_images is not None:
        return ["--valid_images=" + args.valid_images, "--valid_info=" + args.valid_info]
    if args.data is not None and _validation_paths(run) is not None:
        return ["--val_data=" + args.data]
    return ["--valid_images=" + run.dataset.images_dir,
            "--valid_info=" + run.dataset.annotation_file]


def _validation_paths(run: Run) -> Any:
    try:
        return find_dataset(run.config.dataset, run.args.data, run.args.valid_images,
                            run.args.valid_info, "val")
    except UserError:
        return None


def _picture_flags(run: Run) -> List[str]:
    dataset = run.validation_set or run.dataset
    folder = run.folder.path if run.folder is not None else "results"
    return ["--image={}:{}".format(dataset.image_path(0), os.path.join(folder, "prediction.png")),
            "--score_threshold={}".format(SCORE_THRESHOLD)]


def _after_the_end(run: Run, path: str, finished: bool, early: bool) -> Tuple[str, List[str]]:
    """What to do with the last weights, and the words that do it."""
    given = without_flag(run.args.command_line[2:], ("--resume",))
    if not finished:
        return "go on", _launch(run) + given + ["--resume=" + path]
    given = without_flag(given, ("--early_stopping",))
    if early:
        return "train on without early stopping", _launch(run) + given + [
            "--resume=" + path, "--early_stopping=0"]
    if run.folder is not None:
        # A module is looked for in the current folder.
        place = [] if os.path.samefile(os.curdir, PROJECT) else ["env", "PYTHONPATH=" + PROJECT]
        return "draw the report again", place + _python("train.py")[:1] + [
            "-m", "utils.report", run.folder.path]
    given = without_flag(given, ("--weights", "--save_folder"))
    return "train on from these weights", _launch(run) + given + [
        "--weights=" + path, "--save_folder={}-2".format(run.args.save_folder.rstrip("/"))]


def _launch(run: Run, environ: Mapping[str, str] = os.environ) -> List[str]:
    """Words that start train.py in as many processes as this run has, on this host of several."""
    words, count = _python("train.py"), run.processes.world_size
    if count == 1:
        return words
    here = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or count)
    hosts = [] if here == count else [
        "--nnodes={}".format(count // here), "--node_rank={}".format(environ.get(
            "GROUP_RANK", run.processes.rank // here)),
        "--master_addr=" + environ.get("MASTER_ADDR", ""),
        "--master_port=" + environ.get("MASTER_PORT", "")]
    elastic = os.path.exists(os.path.join(os.path.dirname(sys.modules["torch"].__file__ or ""),
                                          "distributed", "run.py"))
    engine = ["torch.distributed.run"] if elastic else ["torch.distributed.launch", "--use_env"]
    return words[:1] + ["-m"] + engine + ["--nproc_per_node={}".format(here)] + hosts + words[1:]
