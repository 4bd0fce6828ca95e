"""Train YOLACT: `python train.py --data=/data/coco --config=yolact_base_config`.

The step and the loop around it. The loop asks the device for nothing between log lines: batches are
static, losses and the verdict "was this step finite" stay on the device until a log line is due.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until run_main takes over

from utils.cli import before_torch, print_lines, run_main
from utils.engine.train_flags import parse_train_flags, train_parser

before_torch(train_parser if __name__ == "__main__" else None)

import argparse
import contextlib
import functools
import itertools
import math
import operator
import os
import sys
import time
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from data.batch import Batch, bit_values
from data.loader import prefetch
from utils.amp import Precision
from utils.device import NpuModes, cards_of_host, seed_everything, select_device
from utils.distributed.failures import StopRequest, record_failure
from utils.distributed.processes import Processes, is_restart, launch_id
from utils.distributed.sharing import Sharing, broadcast_from_main, share_buffers
from utils.engine.observer import Observer
from utils.engine.record import RunRecord, open_record
from utils.engine.saving import choose_start
from utils.engine.setup import Training, build_training
from utils.engine.summary import announce, end_lines, next_lines
from utils.errors import TrainingError, UserError, counted
from utils.inference.evaluation_record import ScoredEvaluation
from utils.memory import explain_out_of_memory, keep_freed_memory
from utils.optimizer import FlatOptimizer, propagate_nonfinite
from utils.weights.files import Origin

LOG_INTERVAL = 10
MAX_SKIPPED_IN_A_ROW = 10


def train_step(network: nn.Module, criterion: nn.Module, optimizer: FlatOptimizer,
               micro_batches: Sequence[Batch], lr: float | None, sharing: Sharing,
               precision: Precision, void: bool = False) -> dict[str, Tensor]:
    """One update: forward, loss, backward, optimiser.

    The batch of a step is divided among the cards, and on each card into micro-batches that run one
    after the other; the update is that of the undivided batch. It is skipped on all cards where a
    loss or gradient is not finite on any. Nothing here waits for the device.

    Args:
        network: the model, wrapped for several processes.
        criterion: called with predictions, batch and the number of positives to divide by.
        optimizer: of the network's parameters.
        micro_batches: this card's part of the step's batch.
        lr: learning rate; None for that which the optimiser was told before.
        sharing: how the batch is divided.
        precision: of the network's forward and backward pass.
        void: this card has nothing to learn from: the update is skipped on all cards.

    Returns:
        this card's losses by name, 0-d, on the device.
    """
    sharing.begin(micro_batches, void)
    optimizer.zero_grad()
    shown: dict[str, Tensor] = {}
    for batch in micro_batches:
        with sharing.local_gradients(network, last=batch is micro_batches[-1]):
            with precision.forward():
                predictions = network(batch.images)
            losses = criterion(precision.widen(predictions), batch, sharing.positives_per_share())
            if len(micro_batches) > 1:
                losses = {name: loss / len(micro_batches) for name, loss in losses.items()}
            total = functools.reduce(operator.add, losses.values())
            precision.backward(propagate_nonfinite(total * math.nan if void else total))
        for name, loss in losses.items():
            shown[name] = shown[name] + loss.detach() if name in shown else loss.detach()
    overflow = precision.take_overflow()
    if overflow is not None:
        # On a card whose register tells, NaN is 0: it would not void the step.
        overflow = sharing.on_any_card(overflow + 1 if void else overflow)
    precision.step(optimizer, lr, overflow)
    return shown


def whole_step(training: Training, bits: Tensor, micro_batches: Sequence[Batch],
               void: bool = False) -> None:
    """What the device does in an iteration; `bits` are `bit_values`, for batches still packed."""
    learner = training.learner
    losses = train_step(learner.network, learner.criterion, learner.optimizer,
                        [batch.unpack(bits) for batch in micro_batches], None, training.sharing,
                        learner.precision, void)
    if learner.average is not None:
        learner.average.update()
    training.records.add(losses, learner.optimizer.applied, learner.precision.used_scale)


class Outcome(NamedTuple):
    """How far a training came."""

    done: int
    """Iterations, counted from the start of the whole training."""
    stopped_early: bool
    """Validations no longer found anything better (--early_stopping)."""
    problem: UserError | None
    """What ended it: an image that cannot be read, a loader process that was killed."""

    def finished(self, training: Training) -> bool:
        """Whether it came to its end, or to a good one before."""
        return self.done >= training.schedule.max_iter or self.stopped_early


def training_loop(training: Training, start: int, stop: StopRequest, observer: Observer,
                  record: RunRecord) -> Outcome:
    """Train from iteration `start` until the schedule ends or something ends it."""
    learner, sharing, schedule = training.learner, training.sharing, training.schedule
    step, places = training.recorded(functools.partial(
        whole_step, training, bit_values(learner.device)))
    batches = prefetch(observer.watched, learner.device, places)
    learner.network.train()
    done, stopping, early, problem = start, False, training.nothing_improves(), None
    while done < schedule.max_iter and not early:
        try:
            if problem is None:
                micro_batches = [next(batches) for _ in range(sharing.micro_batches)]
        except UserError as error:
            problem = error
            if done == start or training.processes.world_size == 1:
                break
            stop.requested = True  # the others hear of it with the next step
        with observer.step_limit(done + 1):
            learner.optimizer.set_rate(schedule(done))
            if stop.requested:
                sharing.request_stop()
            step(micro_batches, problem is not None)
            done += 1
            observer.step(done, micro_batches)
            if done % LOG_INTERVAL == 0 or done in (start + 1, schedule.max_iter):
                stopping = sharing.stop_agreed()
                in_vain = log_progress(training, observer, done, record, stopping)
                if in_vain:  # nothing was learned of these images: they come again
                    training.records.take_back(in_vain)
                    done -= in_vain
                    break
        try:
            early = between_steps(training, done, observer, record, stop)
        except UserError as error:  # in all processes
            problem = error
            break
        # Processes may stop only together: they agree with each step and look at each log line.
        if stopping or (stop.requested and training.processes.world_size == 1):
            break
    print(observer.finish())
    batches.close()  # now, and not when the garbage collector comes by: workers end here
    return Outcome(done, early, problem)


def between_steps(training: Training, done: int, observer: Observer, record: RunRecord,
                  stop: StopRequest) -> bool:
    """Save and validate where it is time to; returns whether to stop early, agreed by all."""
    early, epoch_size, saver = False, training.loader.epoch_size, training.saver
    at_end, validation = done == training.schedule.max_iter, training.validation
    validates = validation is not None and (
        done % validation.interval == 0 or (validation.at_end and at_end))
    if done % epoch_size == 0:
        record.write("epoch", iteration=done, epoch=done // epoch_size)
    if validates or (not at_end and saver.is_due(done)):
        save_on_the_way(training, done, record, quiet=at_end or saver.is_passing(done))
    if validates:
        with observer.stopped():
            try:
                validate(training, done, record, stop)
            except (RuntimeError, MemoryError):  # of the card's memory, or another process is lost
                finish(training, Outcome(done, False, None), record)
                raise
        if not at_end:
            save_on_the_way(training, done, record, quiet=True)
        if training.config.early_stopping:
            early = broadcast_from_main(training.nothing_improves(), training.processes,
                                        training.learner.device)
    return early


def save_on_the_way(training: Training, done: int, record: RunRecord, quiet: bool) -> None:
    """Save where the training goes on: before a validation, which may not come to its end, and
    `quiet` after it, with its scores. Not where a stop is agreed, which saves by itself.
    """
    if training.processes.world_size > 1 and training.sharing.stop_agreed():
        return
    try:
        save(training, done, record, quiet=quiet)
    except UserError as error:  # the next time, or the end, may find more space
        print(f"Warning: {error}; the training goes on", flush=True)


def log_progress(training: Training, observer: Observer, done: int, record: RunRecord,
                 stopping: bool) -> int:
    """Print the log line and the steps skipped since the last one; stop a run that only skips,
    unless it is `stopping` anyway: steps that one card has voided are no failure of the training.

    Returns:
        how many of the last steps were skipped where it is stopping; else 0.

    Raises:
        TrainingError: ten steps in a row were not finite.
    """
    progress = observer.progress(done, training.schedule(done - 1))
    skipped, lines = {step.iteration for step in progress.report.skipped}, progress.lines
    in_vain = next(count for count in itertools.count() if done - 1 - count not in skipped)
    if in_vain and training.sharing.is_void():
        lines = lines[:-in_vain] + [
            f"The last {counted(in_vain, 'step')} up to iteration {done} changed no parameter: a "
            "process of this run has no images, and all stop"]
    print_lines(lines)
    record.write("train", **progress.values)
    if progress.report.in_a_row >= MAX_SKIPPED_IN_A_ROW and not stopping:
        raise TrainingError(
            f"{progress.report.in_a_row} steps in a row up to iteration {done} had a loss or "
            "gradient that is not finite; the parameters are those of the last finite step. Lower "
            "--lr, or look at the images named above.")
    return in_vain if stopping else 0


def validate(training: Training, done: int, record: RunRecord, stop: StopRequest) -> None:
    """Score the network on validation images, all processes together; the main one prints. Ends
    early where a process has a stop request: the time it has may be just enough to save.
    """
    validation, learner, processes = training.validation, training.learner, training.processes
    assert validation is not None
    evaluator = validation.evaluation.evaluator()
    share_buffers(learner.model, processes)
    # Of the weights that are saved; a loader draws numbers, which must not be the training's.
    with learner.scored_weights(processes), torch.random.fork_rng(devices=[]):
        complete = validation.evaluation.run(validation.detector, evaluator,
                                             stopped=lambda: stop.requested)
    if not processes.is_main:
        return
    if not complete:
        print_lines([f"The validation of iteration {done} was stopped"])
        return
    results, recorded = evaluator.evaluate(), record.recorded_best()
    if recorded is not None:
        training.best.consider(recorded)
    is_best = training.best.update(done, results.mask.ap, results.box.ap)
    print_lines([*results.notes, *results.table().split("\n")])
    record.write("val", iteration=done, epoch=done // training.loader.epoch_size,
                 **results.summary())
    if is_best:
        record.keep_best(learner, training.saver, done)
    print_lines(record.add_validation(ScoredEvaluation(
        evaluator, results, validation.evaluation.dataset, "best.pth", Origin(done),
        {}), is_best))


def save(training: Training, done: int, record: RunRecord, interrupt: bool = False,
         finished: bool = False, quiet: bool = False) -> str | None:
    """Write the checkpoint of iteration `done` and say so, unless `quiet`; returns the path of the
    weights.
    """
    path = training.saver.save(done, interrupt, finished)
    if path is not None:
        if not quiet:
            print(f"Saved weights : {path}", flush=True)
        record.keep_weights(path)
    return path


def finish(training: Training, outcome: Outcome, record: RunRecord) -> str | None:
    """Save what was trained and draw the report; returns the weights' path, if any were saved.

    Raises:
        UserError: what ended the training.
    """
    path, finished = None, outcome.finished(training)
    if finished or training.saver.plan.on_interrupt:
        path = save(training, outcome.done, record, interrupt=not finished, finished=finished)
    if finished:
        record.write("epoch", iteration=outcome.done,
                     epoch=outcome.done // training.loader.epoch_size)
    print_lines(record.finish())
    if outcome.problem is not None:
        then = (f"the training is at its end: {path}" if finished else
                f"then --resume=interrupt goes on from iteration {outcome.done}")
        raise UserError(str(outcome.problem) + ("" if path is None else f"; {then}"))
    return path


def train(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Run a whole training; returns the exit code."""
    seed_everything(args.seed)
    launch = launch_id(os.environ)
    resumed = choose_start(args.resume, args.save_folder, args.recipe.name, launch,
                           is_restart(os.environ), processes, device)
    training = build_training(args, processes, device, train_step, launch, resumed)
    start = 0 if resumed is None else training.saver.resume(resumed, args.start_iter)
    if start > training.schedule.max_iter:
        raise UserError(f"'{resumed}' is at iteration {start}, beyond the end of this training, "
                        f"{training.schedule.max_iter}; give a larger --max_iter, or start a new "
                        f"training from its weights with --weights={resumed}")
    training.loader.start_at(start)
    with contextlib.closing(training.saver):
        announce(training, start, resumed, args.strict)
        return run(args, training, start)


def run(args: argparse.Namespace, training: Training, start: int) -> int:
    """Train from iteration `start` and say what came of it; returns the exit code."""
    record = open_record(args, training, start)
    processes, device = training.processes, training.learner.device
    max_iter, fps_start = training.schedule.max_iter, args.fps_start_iter
    if fps_start is None:
        fps_start = min(100, (max_iter - start) // 10)
    observer = Observer(training.loader, training.records, device, processes.rank, start, max_iter,
                        training.loader.epoch_size, training.images_per_step, fps_start,
                        args.loader_timeout, args.step_timeout if processes.world_size > 1 else 0,
                        args.quiet)
    began = time.monotonic()
    with StopRequest() as stop, explain_out_of_memory(
            device, training.loader.batch_size, training.sharing.micro_batches):
        try:
            outcome = training_loop(training, start, stop, observer, record)
        except TrainingError:
            print_lines(record.finish())
            raise
        if outcome.problem is not None and outcome.done == start:
            raise outcome.problem
        path = finish(training, outcome, record)
        if processes.is_main:
            print_lines(end_lines(training, outcome.done, time.monotonic() - began,
                                  observer.images_per_second, record.path)
                        + next_lines(args, training, outcome.done, path, record.path))
        if outcome.finished(training):
            print_lines([] if path is None else [f"Final weights : {path}"])
            return 0
        saved = training.saver.plan.enabled and training.saver.plan.on_interrupt
        print_lines([f"Stopped by {stop.signal_name or 'another process'} at iteration "
                     f"{outcome.done}"
                     + ("; --resume=interrupt goes on from there" if saved else "")])
        return 130


def _run(argv: list[str]) -> int:
    args = parse_train_flags(argv)
    name = args.node_device if args.cuda else "cpu"
    environ = dict(os.environ)
    if args.local_rank is not None:
        environ.setdefault("LOCAL_RANK", str(args.local_rank))
    processes = Processes.from_env(environ, devices_per_host=cards_of_host(name))
    if processes.world_size > 1 and not args.use_ddp:
        raise UserError(f"--useDDP=False with {processes.world_size} processes: several cards "
                        "train together or not at all; leave the flag out")
    device = select_device(name, processes.local_rank if args.device_id is None
                           else args.device_id,
                           NpuModes(args.jit_compile, args.internal_format))
    keep_freed_memory(device)
    try:
        with record_failure(processes.rank), explain_out_of_memory(device):
            processes.init(device)
            return train(args, processes, device)
    except TrainingError as failure:
        print(f"training stopped: {failure}", file=sys.stderr)
        return 1
    finally:
        processes.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code (2 for a mistake in flags or data)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
