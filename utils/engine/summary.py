"""What train.py says of a run before its first step and after its last one."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from data.check import quick_check
from data.coco import CocoDataset
from data.config import NOT_FROZEN
from data.datasets import find_dataset
from utils.checkpoint import CheckpointName, rng_state, set_rng_state
from utils.device import describe
from utils.engine.batch_size import estimate
from utils.engine.setup import Run
from utils.errors import UserError
from utils.progress import duration

_LABEL = "{:<13}: {}"


class SplitCounts(NamedTuple):
    """What one split of the data holds."""

    name: str
    images: int
    objects: int
    classes: int
    empty: int
    crowds: int
    dropped: int


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
    validation_epochs: int
    """Epochs between validations; below 1 there is none."""
    validation_images: int
    unscaled_iter: Optional[int] = None
    """Iterations that were asked for, where the batch size makes others of them."""
    left_out: int = 0
    """Images that do not fill an iteration at the end of an epoch; others in each."""

    def epochs(self, iterations: int) -> str:
        """`2.5 epochs`."""
        count = f"{iterations / self.epoch_size:.1f}"
        return "{} epoch{}".format(count, "" if count == "1.0" else "s")


def data_table(splits: Sequence[SplitCounts]) -> List[str]:
    """A row for each split under the names of the counts."""
    heads = SplitCounts._fields[1:]
    rows = [named_line("Data", "  ".join(heads))]
    for split in splits:
        rows.append(named_line("  " + split.name, "  ".join(
            str(value).rjust(len(head)) for head, value in zip(heads, split[1:]))))
    return rows


def network_line(trainable: int, frozen: int, batch_norm: str) -> str:
    """How many parameters learn."""
    return named_line("Parameters", f"{trainable} trained, {frozen} frozen; batch norm "
                                    f"{batch_norm}")


def step_line(batch: int, cards: int, parts: int) -> str:
    """What makes up one iteration."""
    return named_line("Iteration", f"{batch} images x {cards} card{_s(cards)} x {parts} "
                                   f"part{_s(parts)} = {batch * cards * parts} images")


def schedule_lines(plan: Plan) -> List[str]:
    """Learning rate, validations and files, each in iterations and in epochs."""
    validation = "none (--validation_epoch=1 for every epoch)"
    interval = plan.validation_epochs * plan.epoch_size
    if interval > plan.max_iter:
        validation = f"none: the first would be at iteration {interval}"
    elif interval > 0:
        validation = (f"{plan.validation_images} images every {_iterations(interval)} "
                      f"({plan.epochs(interval)})")
    scaled = "" if plan.unscaled_iter is None else (
        f"; {plan.unscaled_iter} scaled to this batch size, --no_autoscale keeps "
        f"{plan.unscaled_iter}")
    rest = "" if not plan.left_out else (
        f", {plan.left_out} image{_s(plan.left_out)} left over for another")
    return [
        named_line("Schedule", f"{_iterations(plan.max_iter)} ({plan.epochs(plan.max_iter)}), "
                               f"{plan.epoch_size} to an epoch{rest}{scaled}"),
        named_line("Learning rate", _rate(plan)),
        named_line("Validation", validation),
        named_line("Weights", f"every {_iterations(plan.save_interval)} "
                              f"({plan.epochs(plan.save_interval)}) and at the end, in "
                              f"{plan.save_folder}")]


def _rate(plan: Plan) -> str:
    text = f"{plan.base_lr:g}"
    if plan.warmup_until >= plan.max_iter:
        return (f"{plan.warmup_init:g} rising towards {text}, which iteration {plan.warmup_until} "
                "would reach")
    if plan.warmup_until:
        text = (f"{plan.warmup_init:g} rising to {text} by iteration {plan.warmup_until} "
                f"({plan.epochs(plan.warmup_until)})")
    if plan.schedule == "cosine":
        return text + f", then half a cosine to {plan.final_lr:g}"
    steps = [f"{step} ({plan.epochs(step)})" for step in plan.lr_steps
             if step < plan.max_iter]
    return text if not steps else text + ", x {:g} at iteration{} {}".format(
        plan.gamma, _s(len(steps)), ", ".join(steps))


def _iterations(count: int) -> str:
    return f"{count} iteration{_s(count)}"


def named_line(label: str, text: str) -> str:
    """`label : text` in the card's layout."""
    return _LABEL.format(label, text)


def options_line(options: Dict[str, str]) -> List[str]:
    """One line for the training options that are turned on; none where none is."""
    if not options:
        return []
    return [named_line("Turned on", ", ".join(
        f"{name} {value}".strip() for name, value in options.items()))]


class Best(NamedTuple):
    """The best validation; `score` in percent, None where there was nothing to score."""

    score: Optional[float]
    iteration: int
    weights: Optional[str]
    """File of that iteration; None where it was not kept."""


def end_card(done: int, epochs: float, seconds: float, images_per_second: float,
             best: Optional[Best], why: str = "", commands: Sequence[Sequence[str]] = (),
             note: str = "", skipped: int = 0) -> List[str]:
    """What came out, and what to type next.

    Args:
        done: iterations, counted from the start of the training; `epochs` are the same.
        epochs: see `done`.
        seconds: of this session.
        images_per_second: mean; 0 where it was not measured.
        best: None where nothing was validated.
        why: the training ended before its schedule did; empty otherwise.
        commands: words of each command.
        note: what to know about them.
        skipped: steps whose update was left out, since the start of the training.
    """
    speed = (f"{images_per_second:.1f} images/s on average" if images_per_second
             else "speed not measured (too few iterations)")
    lines = [named_line("Done", f"{done} iterations ({epochs:.1f} epochs); this session took "
                                f"{duration(seconds)}, {speed}")]
    if why:
        lines.append(named_line("Ended early", why))
    if skipped:
        lines.append(named_line(
            "Skipped", f"{skipped} update{_s(skipped)} of {done}: the loss or a gradient was not "
                       "finite"))
    if best is None:
        lines.append(named_line("Best mAP", "not known: no validation (--validation_epoch)"))
    else:
        lines.append(named_line("Best mAP", "{} (segmentation) at iteration {}, {}".format(
            "nothing to score" if best.score is None else f"{best.score:.2f}",
            best.iteration, best.weights or "whose weights were not kept (--save_interval)")))
    if commands:
        lines.append(named_line("Next", note).rstrip())
        lines += ["  " + " ".join(shlex.quote(word) for word in words) for words in commands]
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


def _s(count: int) -> str:
    return "" if count == 1 else "s"


PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
    lines.append(f"{config.name}: {config.num_classes - 1} classes, {parameters} parameters, input "
                 f"{config.max_size} x {config.max_size}")
    lines.append("{} images, batch {} x {} card{}{}, {} iterations an epoch; iterations {} to {} "
                 "({:.1f} epochs), learning rate {:g}, precision {}".format(
                     len(run.dataset), run.loader.batch_size, cards, "" if cards == 1 else "s",
                     f" x {parts} parts" if parts > 1 else "", size, start, max_iter,
                     max_iter / size, run.learning_rate.base_lr, run.precision.name))
    lines.append(network_line(trained, parameters - trained, _batch_norm(run)))
    lines.append(step_line(run.loader.batch_size, cards, parts))
    lines += schedule_lines(_plan(run)) + options_line(_options(run))
    return lines + [named_line("Memory", f"about {_memory(run)}")]


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
        found["moving average of the weights"] = f"(decay {config.ema_decay:g})"
    if config.clip_grad_norm:
        found["gradient norm up to"] = f"{config.clip_grad_norm:g}"
    if config.early_stopping:
        found["early stopping after"] = f"{config.early_stopping} validations"
    if config.freeze != NOT_FROZEN:
        found["frozen"] = config.freeze if not config.freeze.isdigit() else (
            f"stem and {config.freeze} stages")
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
    flags = [] if args.device_id is None else [f"--device_id={args.device_id}"]
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
            f"--score_threshold={SCORE_THRESHOLD}"]


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
        f"--nnodes={count // here}", "--node_rank={}".format(environ.get(
            "GROUP_RANK", run.processes.rank // here)),
        "--master_addr=" + environ.get("MASTER_ADDR", ""),
        "--master_port=" + environ.get("MASTER_PORT", "")]
    elastic = os.path.exists(os.path.join(os.path.dirname(sys.modules["torch"].__file__ or ""),
                                          "distributed", "run.py"))
    engine = ["torch.distributed.run"] if elastic else ["torch.distributed.launch", "--use_env"]
    return words[:1] + ["-m"] + engine + [f"--nproc_per_node={here}"] + hosts + words[1:]


def folder_facts(run: Run) -> Dict[str, Any]:
    """What the run folder says of a training beside its flags and its configuration."""
    epoch_size, max_iter = run.loader.epoch_size, run.learning_rate.max_iter
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "images_per_card": run.loader.batch_size, "cards": run.processes.world_size,
        "batches_per_step": run.sharing.parts,
        "images_per_step": run.loader.batch_size * run.sharing.shares,
        "iterations_per_epoch": epoch_size, "max_iter": max_iter,
        "epochs": round(max_iter / epoch_size, 2), "base_lr": run.learning_rate.base_lr,
        "precision": run.precision.name, "seed": run.args.seed,
        "class_names": run.dataset.class_names,
        "category_ids": [category.id for category in run.dataset.categories]}
