"""What a training says before its first step and after its last one, with commands to paste.

Launchers and CI systems search a run's output, so no line made here contains `avg_fps:`, ` T: ` or
the names that COCO's two metrics have in the table of results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from data.check import quick_check
from data.coco import CocoDataset
from data.config import NOT_FROZEN
from data.datasets import find_dataset
from layers.ohem import cross_entropy
from layers.sync_batch_norm import SyncBatchNorm2d
from utils.device import describe
from utils.engine.setup import Training
from utils.errors import UserError
from utils.progress import duration

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCORE_THRESHOLD = 0.3
"""Of the command that draws an image: what a person wants to see."""


class Plan(NamedTuple):
    """The schedule of a training, in iterations."""

    epoch_size: int
    max_iter: int
    base_lr: float
    schedule: str
    lr_steps: Sequence[int]
    gamma: float
    warmup_init: float
    warmup_until: int
    final_lr: float
    save_interval: int
    save_folder: str
    validation_interval: int
    """0 without validations."""
    validation_images: int
    unscaled_iter: Optional[int] = None
    """Iterations that were asked for, where the batch size makes others of them."""
    left_out: int = 0
    """Images that do not fill an iteration at the end of an epoch; others in each."""

    def epochs(self, iterations: int) -> str:
        """`2.5 epochs`."""
        count = f"{iterations / self.epoch_size:.1f}"
        return f"{count} epoch{'' if count == '1.0' else 's'}"


def named_line(label: str, text: str) -> str:
    """`label : text` in the layout of the start and the end."""
    return f"{label:<13}: {text}"


def data_table(splits: Sequence[Tuple[str, Dict[str, int]]]) -> List[str]:
    """A row for each split under the names of its counts."""
    rows = [named_line("Data", "  ".join(splits[0][1]))]
    return rows + [named_line(f"  {name}", "  ".join(
        str(value).rjust(len(head)) for head, value in counts.items())) for name, counts in splits]


def schedule_lines(plan: Plan) -> List[str]:
    """Learning rate, validations and files, each in iterations and in epochs."""
    validation, interval = "none (--validation_epoch=1 for every epoch)", plan.validation_interval
    if interval > plan.max_iter:
        validation = f"none: the first would be at iteration {interval}"
    elif interval > 0:
        validation = (f"{plan.validation_images} images every {_count(interval, 'iteration')} "
                      f"({plan.epochs(interval)})")
    scaled = "" if plan.unscaled_iter is None else (
        "; {0} scaled to this batch size, --no_autoscale keeps {0}".format(plan.unscaled_iter))
    rest = "" if not plan.left_out else f", {_count(plan.left_out, 'image')} left over for another"
    return [
        named_line("Schedule", f"{_count(plan.max_iter, 'iteration')} "
                               f"({plan.epochs(plan.max_iter)}), {plan.epoch_size} to an epoch"
                               f"{rest}{scaled}"),
        named_line("Learning rate", _rate(plan)),
        named_line("Validation", validation),
        named_line("Weights", f"every {_count(plan.save_interval, 'iteration')} "
                              f"({plan.epochs(plan.save_interval)}) and at the end, in "
                              f"{plan.save_folder}")]


def _rate(plan: Plan) -> str:
    text, until = f"{plan.base_lr:g}", plan.warmup_until
    if until >= plan.max_iter:
        return f"{plan.warmup_init:g} rising towards {text}, which iteration {until} would reach"
    if until:
        text = f"{plan.warmup_init:g} rising to {text} by iteration {until} ({plan.epochs(until)})"
    if plan.schedule == "cosine":
        return f"{text}, then half a cosine to {plan.final_lr:g}"
    steps = [f"{step} ({plan.epochs(step)})" for step in plan.lr_steps if step < plan.max_iter]
    return text if not steps else (
        f"{text}, x {plan.gamma:g} at iteration{_s(len(steps))} {', '.join(steps)}")


def end_card(done: int, epochs: float, seconds: float, images_per_second: float, best: str = "",
             why: str = "", commands: Sequence[Tuple[str, Sequence[str]]] = (),
             skipped: int = 0) -> List[str]:
    """What came out, and what to type next.

    Args:
        done: iterations, counted from the start of the training.
        epochs: the same in epochs.
        seconds: of this session.
        images_per_second: mean; 0 where it was not measured.
        best: the best validation in words; empty where nothing was validated.
        why: the training ended before its schedule did; empty otherwise.
        commands: what each is for, and its words.
        skipped: steps whose update was left out, since the start of the training.
    """
    speed = (f"{images_per_second:.1f} images/s on average" if images_per_second
             else "speed not measured (too few iterations)")
    lines = [named_line("Done", f"{done} iterations ({epochs:.1f} epochs); this session took "
                                f"{duration(seconds)}, {speed}")]
    if why:
        lines.append(named_line("Ended early", why))
    if skipped:
        lines.append(named_line("Skipped", f"{_count(skipped, 'update')} of {done}: the loss or a "
                                           "gradient was not finite"))
    lines.append(named_line("Best mAP", best or "not known: no validation (--validation_epoch)"))
    if commands:
        lines.append(named_line("Next", ", ".join(title for title, _ in commands)))
        lines += ["  " + " ".join(map(shlex.quote, words)) for _, words in commands]
    return lines


def without_flag(argv: Sequence[str], names: Sequence[str]) -> List[str]:
    """`argv` without the flags `names`, written as `--name=value` or `--name value`."""
    kept: List[str] = []
    skip_value = False
    for word in argv:
        if skip_value and not word.startswith("--"):
            skip_value = False
            continue
        skip_value = word in names
        if not skip_value and word.split("=", 1)[0] not in names:
            kept.append(word)
    return kept


def _count(number: int, what: str) -> str:
    return f"{number} {what}{_s(number)}"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def start_lines(training: Training, start: int, strict: bool) -> List[str]:
    """What is about to happen. The lines up to `learning rate` are also read by programs.

    Args:
        training: built.
        start: iteration that it goes on from.
        strict: findings of the data check are errors.
    """
    config, loader, dataset = training.config, training.loader, training.dataset
    validated = None if training.validation is None else training.validation.evaluation.dataset
    size, max_iter = loader.epoch_size, training.schedule.max_iter
    cards, parts = training.processes.world_size, training.sharing.micro_batches
    model = training.learner.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [describe(training.learner.device)] + dataset.report.sentences()
    lines += quick_check(dataset, validated, config, strict)
    lines += data_table([("train", _counts(dataset))]
                        + ([] if validated is None else [("val", _counts(validated))]))
    lines.append(f"{config.name}: {config.num_classes - 1} classes, {parameters} parameters, "
                 f"input {config.max_size} x {config.max_size}")
    lines.append(f"{len(dataset)} images, batch {loader.batch_size} x {cards} card{_s(cards)}"
                 f"{f' x {parts} parts' if parts > 1 else ''}, {size} iterations an epoch; "
                 f"iterations {start} to {max_iter} ({max_iter / size:.1f} epochs), learning rate "
                 f"{training.schedule.base_lr:g}, precision {training.learner.precision.name}")
    batch_norm = "frozen" if model.bn_frozen else "over all cards" if any(
        isinstance(module, SyncBatchNorm2d) for module in model.modules()) else "trained"
    lines.append(named_line("Parameters", f"{trained} trained, {parameters - trained} frozen; "
                                          f"batch norm {batch_norm}"))
    lines.append(named_line("Iteration", f"{loader.batch_size} images x {_count(cards, 'card')} x "
                                         f"{_count(parts, 'part')} = {training.images_per_step} "
                                         "images"))
    options = ", ".join(f"{name} {value}".strip() for name, value in _options(training).items())
    return lines + schedule_lines(_plan(training)) + (
        [named_line("Turned on", options)] if options else [])


def _counts(dataset: CocoDataset) -> Dict[str, int]:
    report = dataset.report
    return {"images": len(dataset), "objects": report.objects, "classes": len(dataset.categories),
            "empty": report.empty_images, "crowds": report.crowds, "dropped": report.dropped}


def _plan(training: Training) -> Plan:
    rate, config, saving = training.schedule, training.config, training.saver.plan
    interval, images = 0, 0
    if training.validation is not None:
        interval = training.validation.interval
        images = len(training.validation.evaluation.indices)
    return Plan(training.loader.epoch_size, rate.max_iter, rate.base_lr, rate.schedule,
                rate.lr_steps, rate.gamma, rate.warmup_init, rate.warmup_until,
                rate.base_lr * rate.final_factor, saving.interval, saving.folder, interval, images,
                None if rate.max_iter == config.max_iter else config.max_iter,
                training.loader.left_out)


def _options(training: Training) -> Dict[str, str]:
    """Training options that are turned on, with what they are set to."""
    config, found = training.config, {}
    if config.ema_decay:
        found["moving average of the weights"] = f"(decay {config.ema_decay:g})"
    if config.clip_grad_norm:
        found["gradient norm up to"] = f"{config.clip_grad_norm:g}"
    if config.early_stopping:
        found["early stopping after"] = f"{config.early_stopping} validations"
    if config.freeze != NOT_FROZEN:
        found["frozen"] = config.freeze if not config.freeze.isdigit() else (
            f"stem and {config.freeze} stages")
    if config.multi_scale:
        found["input sides"] = (f"{' '.join(map(str, config.multi_scale))} px, a new one every "
                                f"{config.multi_scale_interval} iterations")
    if config.class_weights:
        weights = config.class_weights
        found["class weights"] = weights if isinstance(weights, str) else " ".join(
            f"{name}={factor:g}" for name, factor in weights)
    if training.learner.criterion.row_losses is not cross_entropy:
        found["fused loss"] = ""
    return found


class Commands(NamedTuple):
    """Words of the commands that go on from a training."""

    evaluate: List[str]
    """eval.py and its device."""
    validation_flags: List[str]
    """Where eval.py finds images to score."""
    image: str
    """An image to try the network on."""
    launch: List[str]
    """train.py in as many processes as this run has."""
    given: List[str]
    """The flags that were given."""


def build_commands(args: argparse.Namespace, training: Training) -> Commands:
    """What the end card's commands are made of, from the command line of the run."""
    device = [] if args.device_id is None else [f"--device_id={args.device_id}"]
    if not args.cuda:
        device.insert(0, "--cuda=False")
    elif args.node_device != "auto":
        device.insert(0, f"--eval_device={args.node_device}")
    dataset = training.dataset
    flags = [f"--valid_images={dataset.images_dir}", f"--valid_info={dataset.annotation_file}"]
    if args.valid_images is not None:
        flags = [f"--valid_images={args.valid_images}", f"--valid_info={args.valid_info}"]
    elif args.data is not None and _has_validation_images(training, args.data):
        flags = [f"--val_data={args.data}"]
    if training.validation is not None:
        dataset = training.validation.evaluation.dataset
    return Commands(_python("eval.py") + device, flags, dataset.image_path(0),
                    _launch(training), args.command_line[2:])


def end_lines(training: Training, done: int, stopped_early: bool, finished: bool, seconds: float,
              images_per_second: float, path: Optional[str], commands: Commands,
              run_folder: Optional[str]) -> List[str]:
    """What came out of a training, and commands to paste.

    Args:
        training: after its last step.
        done: iterations, counted from its start.
        stopped_early: by --early_stopping.
        finished: False where a signal ended it.
        seconds: since the first step of this session.
        images_per_second: mean; 0 where it was not measured.
        path: weights that were saved at the end; None where none were.
        commands: from `build_commands`.
        run_folder: of the run; None without one.
    """
    best, kept, why = "", None, ""
    if training.best.iteration:
        places = [training.saver.path(training.best.iteration)]
        if run_folder is not None:
            places.insert(0, os.path.join(run_folder, "weights", "best.pth"))
        kept = next((place for place in places if os.path.exists(place)), None)
        best = best_words(training.best.mask_ap, training.best.iteration, kept)
    if stopped_early:
        why = (f"{training.best.since} validation{_s(training.best.since)} in a row found nothing "
               f"better (--early_stopping={training.config.early_stopping})")
    elif not finished:
        why = "by a signal"
    weights = kept or path
    following: List[Tuple[str, Sequence[str]]] = []
    if weights is not None:
        given = commands.evaluate[:2] + [f"--trained_model={weights}"]
        device = commands.evaluate[2:]
        drawn = os.path.join(run_folder or "results", "prediction.png")
        following = [("score", given + commands.validation_flags + device),
                     ("draw an image", given + [f"--image={commands.image}:{drawn}",
                                                f"--score_threshold={SCORE_THRESHOLD}"] + device)]
    if path is not None:
        following.append(_after_the_end(path, finished, stopped_early, commands, run_folder,
                                        training.saver.plan.folder))
    if weights is not None and finished:
        following.append(("export", _module("utils.export") + [
            weights, f"--out={os.path.join(run_folder or 'results', 'export')}"]))
    return end_card(done, done / training.loader.epoch_size, seconds, images_per_second, best, why,
                    following, training.records.total_skipped)


def best_words(score: Optional[float], iteration: int, weights: Optional[str]) -> str:
    """The best validation: its mask mAP in [0, 1], None where there was nothing to score."""
    return (f"{'nothing to score' if score is None else f'{100 * score:.2f}'} (segmentation) at "
            f"iteration {iteration}, "
            f"{weights or 'whose weights were not kept (--save_interval)'}")


def _after_the_end(path: str, finished: bool, early: bool, commands: Commands,
                   run_folder: Optional[str], save_folder: str) -> Tuple[str, List[str]]:
    """What to do with the last weights, and the words that do it."""
    given = without_flag(commands.given, ("--resume",))
    if not finished:
        return "go on", commands.launch + given + [f"--resume={path}"]
    given = without_flag(given, ("--early_stopping",))
    if early:
        return "train on without early stopping", commands.launch + given + [
            f"--resume={path}", "--early_stopping=0"]
    if run_folder is not None:
        return "draw the report again", _module("utils.report") + [run_folder]
    given = without_flag(given, ("--weights", "--save_folder"))
    return "train on from these weights", commands.launch + given + [
        f"--weights={path}", f"--save_folder={save_folder.rstrip('/')}-2"]


def _module(name: str) -> List[str]:
    """Words that start a module, which is looked for in the current folder."""
    place = [] if os.path.samefile(os.curdir, PROJECT) else ["env", f"PYTHONPATH={PROJECT}"]
    return place + _python("train.py")[:1] + ["-m", name]


def _python(program: str) -> List[str]:
    """Words that start `program` with this interpreter from the current folder."""
    folder = os.path.dirname(sys.executable)
    name = next((name for name in ("python", "python3") if os.path.dirname(
        shutil.which(name) or "") == folder), sys.executable)
    path = os.path.relpath(os.path.join(PROJECT, program))
    return [name, path if not path.startswith("..") else os.path.join(PROJECT, program)]


def _has_validation_images(training: Training, root: str) -> bool:
    try:
        find_dataset(training.config.dataset, root, None, None, "val")
    except UserError:
        return False
    return True


def _launch(training: Training, environ: Mapping[str, str] = os.environ) -> List[str]:
    """Words that start train.py in as many processes as this run has, on this host of several."""
    words, count = _python("train.py"), training.processes.world_size
    if count == 1:
        return words
    here = int(environ.get("LOCAL_WORLD_SIZE") or environ.get("NPROC") or count)
    hosts = [] if here == count else [
        f"--nnodes={count // here}",
        f"--node_rank={environ.get('GROUP_RANK', training.processes.rank // here)}",
        f"--master_addr={environ.get('MASTER_ADDR', '')}",
        f"--master_port={environ.get('MASTER_PORT', '')}"]
    elastic = os.path.exists(os.path.join(os.path.dirname(sys.modules["torch"].__file__ or ""),
                                          "distributed", "run.py"))
    engine = ["torch.distributed.run"] if elastic else ["torch.distributed.launch", "--use_env"]
    return words[:1] + ["-m"] + engine + [f"--nproc_per_node={here}"] + hosts + words[1:]
