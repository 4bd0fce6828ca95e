"""Train YOLACT: `python train.py --data=/data/coco --config=yolact_base_config`.

The loop asks the device for nothing between log lines: batches are static, losses and the verdict
"was this step finite" stay on the device in `StepRecords`, and a log line fetches them at once.
"""

from __future__ import annotations

import os

# Before torch: utils.device imports the NPU's plugin where one is wanted, and says what is wrong
# with it. Left to PyTorch, a plugin that finds no CANN ends `import torch`, on the CPU too.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import contextlib
import sys
import time
from typing import Iterator, List, NamedTuple, Optional, Sequence

import torch

from data.coco import CocoDataset
from data.loader import DevicePrefetcher
from eval import detect_dataset
from utils import checkpoint
from utils.cli import run_main
from utils.device import (
    cards_of_host,
    describe,
    memory_reserved,
    seed_everything,
    select_device,
    synchronize,
)
from utils.distributed.failures import StopRequest, WatchedLoader, recorded
from utils.distributed.processes import Processes
from utils.distributed.sharing import share_buffers, shared_step, told_by_main
from utils.engine.folder import add_validation, begin_session, finish_folder, recorded_best
from utils.engine.log import RunLog, StepTimer, Throughput, format_line
from utils.engine.saving import (
    find_restart,
    resume,
    save,
    scored_weights,
    state_of,
    weights_of,
)
from utils.engine.setup import Run, build_run, demand_of, resolve_config
from utils.engine.summary import end_lines, folder_facts, start_lines
from utils.engine.train_flags import parse_train_flags
from utils.errors import UserError
from utils.files import refuse_unwritable
from utils.inference.evaluation_record import ScoredEvaluation
from utils.memory import explained
from utils.progress import ProgressBar, StepPace
from utils.run_folder import RunFolder, describe_session, folder_of_run

LOG_INTERVAL = 10
MAX_SKIPPED_IN_A_ROW = 10
NOT_RERUN = ("command_line", "stored_config", "rerun", "resume", "start_iter", "local_rank")
"""Flags that do not belong to a training but to one start of it."""


class TrainingError(Exception):
    """The run cannot go on; the message says why. Not the user's input: exit code 1."""


class Outcome(NamedTuple):
    """How far a training came."""

    done: int
    """Iterations, counted from the start of the whole training."""
    stopped_early: bool
    """Validations no longer found anything better (--early_stopping)."""
    images_per_second: float
    """Mean; 0 where too few iterations were run to measure it."""
    problem: Optional[UserError]
    """What ended it: an image that cannot be read."""


class Clocks:
    """What measures the loop: mean and recent speed, waits for data, the progress bar."""

    def __init__(self, run: Run, start: int) -> None:
        self._run = run
        self._max_iter = run.learning_rate.max_iter
        self.throughput = Throughput(run.loader.batch_size * run.sharing.shares,
                                     _fps_start(run.args, self._max_iter - start))
        self.timer = StepTimer()
        self.watched = WatchedLoader(run.loader, run.args.loader_timeout, run.processes.rank)
        self.bar = ProgressBar(self._max_iter, sys.stderr, beside=sys.stdout,
                               enabled=run.processes.is_main)
        self._pace = StepPace(start)
        if self.throughput.start_iter == 0:
            self.throughput.start()

    def step(self, done: int) -> None:
        """Count a finished step; the bar is drawn from what the host knows."""
        self.throughput.step()
        self.timer.step()
        if self.bar.is_due:
            self.bar.show(done, self._pace.parts(done, self._max_iter, self.watched.seconds,
                                                 memory_reserved(self._run.device)))
        if self.throughput.at_edge:
            synchronize(self._run.device)
            self.throughput.start()

    def first_step_ended(self, done: int) -> None:
        """Forget it: it compiles and allocates, and says nothing of the others."""
        self.timer.restart()
        self._pace = StepPace(done, self.watched.seconds)

    @contextlib.contextmanager
    def stopped(self, done: int) -> Iterator[None]:
        """Leave out the time spent inside."""
        self.bar.clear()
        synchronize(self._run.device)
        self.throughput.pause()
        yield
        self.throughput.resume()
        self.timer.skip()
        self._pace.restart(done, self.watched.seconds)


def training_loop(run: Run, start: int, stop: StopRequest, log: Optional[RunLog]) -> Outcome:
    """Train from iteration `start` until the schedule ends or something ends it; see `Outcome`."""
    sharing, max_iter, clocks = run.sharing, run.learning_rate.max_iter, Clocks(run, start)
    batches = iter(DevicePrefetcher(clocks.watched, run.device))
    run.network.train()

    done, stopping, early, problem = start, False, run.nothing_improves(), None
    while done < max_iter and not early:
        try:
            parts = [next(batches) for _ in range(sharing.parts)]
        except UserError as error:
            problem = error
            break
        losses = shared_step(run.network, run.criterion, run.optimizer, parts,
                             run.learning_rate(done), sharing, stop.requested, run.precision)
        if run.average is not None:
            run.average.update()
        run.records.add(done, losses, run.optimizer.step_finite,
                        torch.cat([part.image_ids for part in parts]), run.precision.used_scale)
        done += 1
        clocks.step(done)
        if done % LOG_INTERVAL == 0 or done in (start + 1, max_iter):
            log_progress(run, done, clocks, log)
            if done == start + 1:
                clocks.first_step_ended(done)
            stopping = sharing.stop_agreed()
        early = between_steps(run, done, clocks, log)
        # Processes may stop only together: they agree with each step and look at each log line.
        if stopping or (stop.requested and run.processes.world_size == 1):
            break
    clocks.bar.clear()
    print(clocks.watched.sentence())
    batches.close()  # now, and not when the garbage collector comes by: workers end here
    return Outcome(done, early, clocks.throughput.average(), problem)


def between_steps(run: Run, done: int, clocks: Clocks, log: Optional[RunLog]) -> bool:
    """Validate and save where it is time to; returns whether to stop early, agreed by all."""
    args, epoch_size, early = run.args, run.loader.epoch_size, False
    if log is not None and done % epoch_size == 0:
        log.write("epoch", iteration=done, epoch=done // epoch_size)
    if run.validation_set is not None and done % (epoch_size * args.validation_epoch) == 0:
        with clocks.stopped(done):
            validate(run, run.validation_set, done, log)
        if run.config.early_stopping:
            early = told_by_main(run.nothing_improves(), run.processes, run.device)
    if done % args.save_interval == 0 and done != run.learning_rate.max_iter:
        save(run, done)  # after a validation, so that its scores are in the state
    return early


def log_progress(run: Run, done: int, clocks: Clocks, log: Optional[RunLog]) -> None:
    """Print the log line and the steps skipped since the last one; stop a run that only skips.

    Raises:
        TrainingError: ten steps in a row were not finite.
    """
    clocks.bar.clear()
    report, throughput, timer = run.records.report(), clocks.throughput, clocks.timer
    timer.update()
    epoch = (done - 1) // run.loader.epoch_size
    fps = throughput.images_per_step / timer.recent if timer.recent else 0.0
    average = throughput.average()
    print(format_line(epoch, done, report.losses, report.total,
                      timer.eta(run.learning_rate.max_iter - done), timer.recent, fps, average,
                      run.processes.rank), flush=True)
    for step in report.skipped:
        print(step.sentence(), flush=True)
    if log is not None:
        log.write("train", epoch=epoch, iteration=done, lr=run.learning_rate(done - 1),
                  losses=report.losses, total=report.total, skipped=run.records.total_skipped,
                  seconds=timer.recent, data_seconds=clocks.watched.mean_since_last(), fps=fps,
                  avg_fps=average, memory=memory_reserved(run.device), loss_scale=report.scale)
    if report.in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"{report.in_a_row} steps in a row up to iteration {done} had a loss or gradient that "
            "is not finite; the parameters are those of the last finite step. Lower --lr, or look "
            "at the images named above.")


def validate(run: Run, dataset: CocoDataset, done: int, log: Optional[RunLog]) -> None:
    """Score the network on validation images, all processes together; the main one prints."""
    share_buffers(run.model, run.processes)
    with scored_weights(run):  # those that are saved
        found = detect_dataset(run.model, run.config, dataset, run.device,
                               max_images=run.args.validation_size,
                               num_workers=run.args.num_workers,
                               class_names=run.dataset.class_names, processes=run.processes,
                               show_progress=run.processes.is_main and sys.stdout.isatty())
    if not run.processes.is_main:
        return
    results = found.evaluate()
    recorded = None if run.folder is None else recorded_best(run.folder)
    if recorded is not None:
        run.best.consider(*recorded)
    is_best = run.best.update(done, results.mask.ap, results.box.ap)
    print("\n".join(results.notes + [results.table()]), flush=True)
    if log is not None:
        log.write("val", iteration=done, epoch=done // run.loader.epoch_size,
                  **results.summary())
    if run.folder is not None:
        trouble = add_validation(
            run.folder, ScoredEvaluation(found, results, dataset, "best.pth",
                                         checkpoint.Origin(done), {}),
            (lambda: (weights_of(run), state_of(run, done))) if is_best else None)
        if trouble is not None:
            print(trouble, flush=True)


def print_folder(run: Run, log: RunLog) -> None:
    """Say where everything about this run is going to be, and what of it is not."""
    if run.folder is not None:
        print("\n".join([f"Run folder : {run.folder.path}"] + log.notes), flush=True)


def print_report(run: Run) -> None:
    """Draw the report and say where it is."""
    if run.folder is not None:
        print("\n".join(finish_folder(run.folder)), flush=True)


def open_folder(run: Run, start: int) -> Optional[RunFolder]:
    """The run folder with what this session is going to do; None where there is to be none."""
    args = run.args
    if args.no_run_folder or args.train_performance or not run.processes.is_main:
        return None
    folder = folder_of_run(args.project, args.name or run.config.name, run.folder_before,
                           os.environ)
    flags = {key: value for key, value in vars(args).items() if key not in NOT_RERUN}
    begin_session(folder, run.config, flags, folder_facts(run),
                  {"train": run.dataset, "val": run.validation_set}, start, describe_session(
                      describe(run.device), args.command_line, seed=args.seed,
                      processes=run.processes.world_size))
    return folder


def announce(run: Run, start: int) -> Optional[RunLog]:
    """Say what is about to happen and open what is written; the main process's log."""
    args = run.args
    if run.processes.is_main:
        print("\n".join(start_lines(run, start)), flush=True)
        if not args.train_performance:
            refuse_unwritable(args.save_folder)
    run.folder = open_folder(run, start)
    if not run.processes.is_main:
        return None
    log = RunLog(run.config.name, None if args.no_log else args.log_folder,
                 None if args.no_log else args.tensorboard, run.folder, start)
    print_folder(run, log)
    log.write("session", config=run.config.to_dict(), args=vars(args),
              device=describe(run.device))
    return log


def keep(run: Run, outcome: Outcome, finished: bool, log: Optional[RunLog]) -> Optional[str]:
    """Save what was trained and draw the report; returns the path of the weights."""
    path = None
    if finished or not run.args.no_interrupt:
        path = save(run, outcome.done, interrupt=not finished)
    if finished and log is not None:
        log.write("epoch", iteration=outcome.done, epoch=outcome.done // run.loader.epoch_size)
    print_report(run)
    return path


def train(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """Run a whole training; returns the exit code."""
    seed_everything(args.seed)
    resumed = _find_resumed(args)
    run = build_run(args, processes, device, resumed)
    start = 0
    if resumed is not None:
        start = resume(run, resumed)
    run.loader.start_at(start)
    log = announce(run, start)

    began = time.monotonic()
    with StopRequest() as stop, explained(device, demand_of(run)):
        try:
            outcome = training_loop(run, start, stop, log)
        except TrainingError:
            print_report(run)
            raise
        finished = outcome.done >= run.learning_rate.max_iter or outcome.stopped_early
        if outcome.problem is not None and outcome.done == start:
            raise outcome.problem
        path = keep(run, outcome, finished, log)
    if outcome.problem is not None:
        raise UserError("{}{}".format(outcome.problem, "" if path is None else (
            f"; then --resume=interrupt goes on from iteration {outcome.done}")))
    if processes.is_main:
        print("\n".join(end_lines(run, outcome, time.monotonic() - began, path, finished)),
              flush=True)
    if not finished:
        saved = not (args.no_interrupt or args.train_performance)
        print("Stopped by {} at iteration {}{}".format(
            stop.signal_name or "another process", outcome.done,
            "; --resume=interrupt goes on from there" if saved else ""), flush=True)
        return 130
    if path is not None:
        print(f"Final weights : {path}", flush=True)
    return 0


def _find_resumed(args: argparse.Namespace) -> Optional[str]:
    """Checkpoint to go on from: that of a restart after a failure, else that of --resume."""
    name = resolve_config(args).name
    restart = find_restart(os.environ, args.save_folder, name)
    if restart is None and args.resume is not None:
        return checkpoint.find_checkpoint(args.resume, args.save_folder, name)
    return restart


def _fps_start(args: argparse.Namespace, steps: int) -> int:
    return args.fps_start_iter if args.fps_start_iter is not None else min(100, steps // 10)


def _run(argv: List[str]) -> int:
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
                           else args.device_id)
    try:
        with recorded(processes.rank), explained(device):
            processes.init(device)
            return train(args, processes, device)
    except TrainingError as failure:
        print(f"training stopped: {failure}", file=sys.stderr)
        return 1
    finally:
        processes.shutdown()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line entry; returns the exit code (2 for a mistake in flags or data)."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
