"""What a training says before it starts and after it ended: text from plain values.

Launchers and CI systems search a run's output, so no line made here contains `avg_fps:`, ` T: ` or
the names that COCO's two metrics have in the table of results.
"""

from __future__ import annotations

import shlex
from typing import Dict, List, NamedTuple, Optional, Sequence

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
        count = "{:.1f}".format(iterations / self.epoch_size)
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
    return named_line("Parameters", "{} trained, {} frozen; batch norm {}".format(
        trainable, frozen, batch_norm))


def step_line(batch: int, cards: int, parts: int) -> str:
    """What makes up one iteration."""
    return named_line("Iteration", "{} images x {} card{} x {} part{} = {} images".format(
        batch, cards, _s(cards), parts, _s(parts), batch * cards * parts))


def schedule_lines(plan: Plan) -> List[str]:
    """Learning rate, validations and files, each in iterations and in epochs."""
    validation = "none (--validation_epoch=1 for every epoch)"
    interval = plan.validation_epochs * plan.epoch_size
    if interval > plan.max_iter:
        validation = "none: the first would be at iteration {}".format(interval)
    elif interval > 0:
        validation = "{} images every {} ({})".format(
            plan.validation_images, _iterations(interval), plan.epochs(interval))
    scaled = "" if plan.unscaled_iter is None else (
        "; {0} scaled to this batch size, --no_autoscale keeps {0}".format(plan.unscaled_iter))
    rest = "" if not plan.left_out else ", {} image{} left over for another".format(
        plan.left_out, _s(plan.left_out))
    return [
        named_line("Schedule", "{} ({}), {} to an epoch{}{}".format(
            _iterations(plan.max_iter), plan.epochs(plan.max_iter), plan.epoch_size, rest,
            scaled)),
        named_line("Learning rate", _rate(plan)),
        named_line("Validation", validation),
        named_line("Weights", "every {} ({}) and at the end, in {}".format(
            _iterations(plan.save_interval), plan.epochs(plan.save_interval), plan.save_folder))]


def _rate(plan: Plan) -> str:
    text = "{:g}".format(plan.base_lr)
    if plan.warmup_until >= plan.max_iter:
        return "{:g} rising towards {}, which iteration {} would reach".format(
            plan.warmup_init, text, plan.warmup_until)
    if plan.warmup_until:
        text = "{:g} rising to {} by iteration {} ({})".format(
            plan.warmup_init, text, plan.warmup_until, plan.epochs(plan.warmup_until))
    if plan.schedule == "cosine":
        return text + ", then half a cosine to {:g}".format(plan.final_lr)
    steps = ["{} ({})".format(step, plan.epochs(step)) for step in plan.lr_steps
             if step < plan.max_iter]
    return text if not steps else text + ", x {:g} at iteration{} {}".format(
        plan.gamma, _s(len(steps)), ", ".join(steps))


def _iterations(count: int) -> str:
    return "{} iteration{}".format(count, _s(count))


def named_line(label: str, text: str) -> str:
    """`label : text` in the card's layout."""
    return _LABEL.format(label, text)


def options_line(options: Dict[str, str]) -> List[str]:
    """One line for the training options that are turned on; none where none is."""
    if not options:
        return []
    return [named_line("Turned on", ", ".join(
        "{} {}".format(name, value).strip() for name, value in options.items()))]


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
    speed = ("{:.1f} images/s on average".format(images_per_second) if images_per_second
             else "speed not measured (too few iterations)")
    lines = [named_line("Done", "{} iterations ({:.1f} epochs); this session took {}, {}".format(
        done, epochs, duration(seconds), speed))]
    if why:
        lines.append(named_line("Ended early", why))
    if skipped:
        lines.append(named_line(
            "Skipped", "{} update{} of {}: the loss or a gradient was not finite".format(
                skipped, _s(skipped), done)))
    if best is None:
        lines.append(named_line("Best mAP", "not known: no validation (--validation_epoch)"))
    else:
        lines.append(named_line("Best mAP", "{} (segmentation) at iteration {}, {}".format(
            "nothing to score" if best.score is None else "{:.2f}".format(best.score),
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
