"""What a training says before its first step and after its last one, with commands to paste.

Launchers and CI systems search a run's output, so no line made here contains `avg_fps:`, ` T: ` or
the names that COCO's two metrics have in the table of results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from typing import Sequence

from backbone import SyncBatchNorm2d
from data.check import quick_check
from data.coco import CocoDataset
from data.config import NOT_FROZEN
from layers.multibox_loss import cross_entropy
from utils.amp import cpu_computes_bfloat16
from utils.cli import print_lines
from utils.device import describe, has_autocast
from utils.distributed.processes import Processes
from utils.distributed.sharing import failing_together
from utils.engine.setup import Training, absent_validation
from utils.errors import counted
from utils.progress import duration

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCORE_THRESHOLD = 0.3
"""Of the command that draws an image: what a person wants to see."""


def announce(training: Training, start: int, resumed: str | None, strict: bool) -> None:
    """Say what is about to happen, and take the folder for the weights.

    Raises:
        UserError: in all processes: the folder cannot be had; with `strict`, the data check finds
            something.
    """
    with failing_together(training.processes, training.learner.device):
        if training.processes.is_main:
            print_lines(start_lines(training, start, strict))
            print_lines(training.saver.open_folder(resumed))


def start_lines(training: Training, start: int, strict: bool) -> list[str]:
    """What is about to happen, from iteration `start`; the lines up to `learning rate` are also
    read by programs. With `strict` findings of the data check are errors.
    """
    config, loader, dataset = training.config, training.loader, training.dataset
    validated = None if training.validation is None else training.validation.evaluation.dataset
    size, max_iter = loader.epoch_size, training.schedule.max_iter
    cards, parts = training.processes.world_size, training.sharing.micro_batches
    model = training.learner.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [describe(training.learner.device)] + [dataset.origin] * bool(dataset.origin)
    lines += dataset.report.sentences()
    lines += quick_check(dataset, validated, config, strict)
    lines += data_table([("train", _counts(dataset))]
                        + ([] if validated is None else [("val", _counts(validated))]))
    lines.append(f"{config.name}: {config.num_classes - 1} classes, {parameters} parameters, "
                 f"input {config.max_size} x {config.max_size}")
    lines.append(f"{len(dataset)} images, batch {loader.batch_size} x {counted(cards, 'card')}"
                 f"{f' x {parts} parts' if parts > 1 else ''}, {size} iterations an epoch; "
                 f"iterations {start} to {max_iter} ({max_iter / size:.1f} epochs), learning rate "
                 f"{training.schedule.base_lr:g}, precision {training.learner.precision.name}")
    batch_norm = "frozen" if model.bn_frozen else "over all cards" if any(
        isinstance(module, SyncBatchNorm2d) for module in model.modules()) else "trained"
    lines.append(_line("Parameters", f"{trained} trained, {parameters - trained} frozen; "
                                     f"batch norm {batch_norm}"))
    lines.append(_line("Iteration", f"{loader.batch_size} images x {counted(cards, 'card')} x "
                                    f"{counted(parts, 'part')} = "
                                    f"{training.images_per_step} images"))
    lines += schedule_lines(training)
    options = ", ".join(_options(training))
    if options:
        lines.append(_line("Turned on", options))
    if (training.learner.device.type == "cpu" and training.learner.precision.level == "O0"
            and has_autocast() and cpu_computes_bfloat16()):
        lines.append(_line("Faster", "this processor computes bfloat16: --opt_level=O1 "
                                     "--amp_dtype=bfloat16"))
    return lines


def _counts(dataset: CocoDataset) -> dict[str, int]:
    report = dataset.report
    return {"images": len(dataset), "objects": report.objects, "classes": len(dataset.categories),
            "empty": report.empty_images, "crowds": report.crowds, "dropped": report.dropped}


def data_table(splits: Sequence[tuple[str, dict[str, int]]]) -> list[str]:
    """A row for each split under the names of its counts."""
    rows = [_line("Data", "  ".join(splits[0][1]))]
    return rows + [_line(f"  {name}", "  ".join(
        str(value).rjust(len(head)) for head, value in counts.items())) for name, counts in splits]


def schedule_lines(training: Training) -> list[str]:
    """Learning rate, validations and files, each in iterations and in epochs."""
    loader, saving, max_iter = training.loader, training.saver.plan, training.schedule.max_iter

    def iterations(count: int) -> str:
        return f"{counted(count, 'iteration')} ({_epochs(training, count)})"

    length = f"{iterations(max_iter)}, {loader.epoch_size} to an epoch"
    if loader.left_out:
        length += f", {counted(loader.left_out, 'image')} left over for another"
    asked = training.config.max_iter
    if max_iter != asked and not training.config.epochs:
        length += f"; {asked} scaled to this batch size, --no_autoscale keeps {asked}"
    validations = f"none ({training.not_validated})"
    if training.validation is not None:
        interval, images = training.validation.interval, training.validation.evaluation.indices
        validations = f"{len(images)} images every {iterations(interval)}"
        if training.validation.at_end:
            validations += " and at the end, at most about a tenth of the time"
            if interval >= max_iter:
                validations = f"{len(images)} images at the end"
        elif interval > max_iter:
            validations = f"none: the first would be at iteration {interval}"
    return [_line("Schedule", length), _line("Learning rate", _rate(training)),
            _line("Validation", validations),
            _line("Weights", f"every {iterations(saving.interval)} and at the end, in "
                             f"{saving.folder}")]


def _epochs(training: Training, iterations: int) -> str:
    """`2.5 epochs`."""
    count = f"{iterations / training.loader.epoch_size:.1f}"
    return f"{count} epoch{'' if count == '1.0' else 's'}"


def _rate(training: Training) -> str:
    rate = training.schedule
    text, until = f"{rate.base_lr:g}", rate.warmup_until
    if until >= rate.max_iter:
        return f"{rate.warmup_init:g} rising towards {text}, which iteration {until} would reach"
    if until:
        text = (f"{rate.warmup_init:g} rising to {text} by iteration {until} "
                f"({_epochs(training, until)})")
    if rate.schedule == "cosine":
        return f"{text}, then half a cosine to {rate.base_lr * rate.final_factor:g}"
    steps = [f"{step} ({_epochs(training, step)})" for step in rate.lr_steps
             if step < rate.max_iter]
    return text if not steps else (
        f"{text}, x {rate.gamma:g} at iteration{'s' * (len(steps) > 1)} {', '.join(steps)}")


def _options(training: Training) -> list[str]:
    """Training options that are turned on, with what they are set to."""
    config, weights = training.config, training.config.class_weights
    frozen = f"stem and {config.freeze} stages" if config.freeze.isdigit() else config.freeze
    if weights and not isinstance(weights, str):
        weights = " ".join(f"{name}={factor:g}" for name, factor in weights)
    options = (
        (config.ema_decay, f"moving average of the weights (decay {config.ema_decay:g})"),
        (config.clip_grad_norm, f"gradient norm up to {config.clip_grad_norm:g}"),
        (config.early_stopping, f"early stopping after {config.early_stopping} validations"),
        (config.freeze != NOT_FROZEN, f"frozen {frozen}"),
        (config.multi_scale, f"input sides {' '.join(map(str, config.multi_scale))} px, a new one "
                             f"every {config.multi_scale_interval} iterations"),
        (weights, f"class weights {weights}"),
        (training.learner.criterion.row_losses is not cross_entropy, "fused loss"),
        (training.device_graph, "device graph (a step is one launch)"))
    return [text for is_on, text in options if is_on]


def end_lines(training: Training, done: int, seconds: float, images_per_second: float,
              run_folder: str | None) -> list[str]:
    """What came out of a training after `done` iterations, counted from its start; `seconds` are
    those of this session, `images_per_second` 0 where it was not measured.
    """
    best, skipped = training.best, training.records.total_skipped
    speed = ("speed not measured (too few iterations)" if not images_per_second else
             f"{images_per_second:.1f} images/s on average")
    lines = [_line("Done", f"{done} iterations ({done / training.loader.epoch_size:.1f} epochs); "
                           f"this session took {duration(seconds)}, {speed}")]
    if training.nothing_improves():
        lines.append(_line("Ended early", f"{counted(best.since, 'validation')} in a row found "
                           f"nothing better (--early_stopping={training.config.early_stopping})"))
    elif done < training.schedule.max_iter:
        lines.append(_line("Ended early", "by a signal"))
    if skipped:
        lines.append(_line("Skipped", f"{counted(skipped, 'update')} of {done}: the loss or a "
                                      "gradient was not finite"))
    if not best.iteration:
        missing = ("no validation (--validation_epoch)" if training.validation is None else
                   "no validation came to its end")
        return lines + [_line("Best mAP", f"not known: {missing}")]
    score = "nothing to score" if best.mask_ap is None else f"{100 * best.mask_ap:.2f}"
    place = _best_weights(training, run_folder) or "whose weights were not kept (--save_interval)"
    return lines + [_line("Best mAP", f"{score} (segmentation) at iteration {best.iteration}, "
                                      f"{place}")]


def _best_weights(training: Training, run_folder: str | None) -> str | None:
    """Weights of the best validation; None where there was none, or they were not kept."""
    places = [training.saver.path(training.best.iteration)] if training.best.iteration else []
    if places and run_folder is not None:
        places.insert(0, os.path.join(run_folder, "weights", "best.pth"))
    return next((place for place in places if os.path.exists(place)), None)


def next_lines(args: argparse.Namespace, training: Training, done: int, path: str | None,
               run_folder: str | None) -> list[str]:
    """Commands to paste that go on from a training; none where no weights were kept. `path` are
    those that were saved at the end, if any.
    """
    commands: dict[str, Sequence[str]] = {}
    weights = _best_weights(training, run_folder) or path
    if weights is not None:
        device = {"--eval_device": args.node_device if args.cuda else "cpu",
                  "--device_id": args.device_id}
        words = _python("eval.py") + [f"--trained_model={weights}"] + [
            f"{flag}={value}" for flag, value in device.items() if value not in ("auto", None)]
        dataset = training.dataset if training.validation is None else (
            training.validation.evaluation.dataset)
        drawn = os.path.join(run_folder or "results", "prediction.png")
        commands["score"] = words + _images_to_score(args, training)
        commands["draw an image"] = words + [f"--image={dataset.image_path(0)}:{drawn}",
                                             f"--score_threshold={SCORE_THRESHOLD}"]
    if path is not None:
        again = _launch(training.processes) + ([f"--resume={run_folder}"] if run_folder else (
            without_flag(args.command_line[2:], "--resume") + [f"--resume={path}"]))
        if training.nothing_improves():
            commands["train on without early stopping"] = again + ["--early_stopping=0"]
        elif done < training.schedule.max_iter:
            commands["go on"] = again
        else:
            length = "epochs" if training.config.epochs else "max_iter"
            commands["train longer"] = again + [
                f"--{length}={2 * getattr(training.config, length)}"]
    if weights is not None and (training.nothing_improves() or done >= training.schedule.max_iter):
        # A module is looked for in the current folder.
        place = [] if os.path.samefile(os.curdir, PROJECT) else ["env", f"PYTHONPATH={PROJECT}"]
        commands["export"] = [
            *place, _python("train.py")[0], "-m", "utils.export", weights,
            f"--out={os.path.join(run_folder or 'results', 'export')}"]
    if not commands:
        return []
    return [_line("Next", ", ".join(commands))] + [
        "  " + " ".join(map(shlex.quote, words)) for words in commands.values()]


def _images_to_score(args: argparse.Namespace, training: Training) -> list[str]:
    """Where eval.py finds them: validation images if there are some, else those of training."""
    if args.valid_images is not None:
        return [f"--valid_images={args.valid_images}", f"--valid_info={args.valid_info}"]
    if args.data is not None and not absent_validation(args, training.config):
        return [f"--val_data={args.data}"]
    return [f"--valid_images={training.dataset.images_dir}",
            f"--valid_info={training.dataset.annotation_file}"]


def without_flag(argv: Sequence[str], flag: str) -> list[str]:
    """`argv` without `flag`, written as `--flag=value` or `--flag value`."""
    return [word for before, word in zip(["", *argv], argv) if word.split("=", 1)[0] != flag
            and (before != flag or word.startswith("--"))]


def _python(program: str) -> list[str]:
    """Words that start `program` with this interpreter from the current folder."""
    path = os.path.join(PROJECT, program)
    near = os.path.relpath(path)
    return ["python" if shutil.which("python") == sys.executable else sys.executable,
            path if near.startswith("..") else near]


def _launch(processes: Processes) -> list[str]:
    """Words that start train.py in as many processes as this run has, on this host of several."""
    words, count, environ = _python("train.py"), processes.world_size, os.environ
    if count == 1:
        return words
    here = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or count)
    hosts = [] if here == count else [
        f"--nnodes={count // here}",
        f"--node_rank={environ.get('GROUP_RANK', processes.rank // here)}",
        f"--master_addr={environ.get('MASTER_ADDR', '')}",
        f"--master_port={environ.get('MASTER_PORT', '')}"]
    launcher = (["torch.distributed.run"] if importlib.util.find_spec("torch.distributed.run")
                else ["torch.distributed.launch", "--use_env"])
    return [words[0], "-m", *launcher, f"--nproc_per_node={here}", *hosts, words[1]]


def _line(label: str, text: str) -> str:
    """`label : text` in the layout of the start and the end."""
    return f"{label:<13}: {text}"
