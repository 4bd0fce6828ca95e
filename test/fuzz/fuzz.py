"""Seeded mutations of everything that people bring: the right result, or one sentence.

    python test/fuzz/fuzz.py --rounds=5000 [--kind=coco] [--seed=0]

A worker makes each input, in a folder of its own, and gives it to the command in its own process,
with 5 seconds of CPU time and 1 GiB of memory. Bad is a traceback, a hang, memory, a file outside
of out/ that was changed, code of the input that ran, or an error that is not one sentence. The same
kind, seed and number give the same input again: --only=NUMBER keeps its folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from fuzz.inputs import KINDS, write  # noqa: E402
from utils.cli import run_main  # noqa: E402

CPU_SECONDS = 5
MEMORY = 1 << 30
WALL_SECONDS = 60
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # folders are made by thousands


# The worker

class TooLong(BaseException):
    """The input took its seconds."""


def too_long(*_):
    raise TooLong


def state():
    """Names and times of everything that a command has to leave alone."""
    return {str(path): path.stat().st_mtime_ns for path in Path(".").rglob("*")
            if not str(path).startswith(("out", "cache")) and path.is_file()}


def used_memory():
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()


def attempt(kind, seed):
    """Outcome of one input, in the current folder: right, sentence, or BAD and why."""
    rng = random.Random(f"{kind} {seed}")
    for name in ("out", "cache", "in", "keep"):
        shutil.rmtree(name, ignore_errors=True)
        os.mkdir(name)
    write(Path("keep/user.txt"), b"mine")
    command, argv = KINDS[kind](rng)
    before = state()
    streams = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), io.TextIOWrapper(
        io.BytesIO(), "utf-8", "backslashreplace")
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = run_main(command, argv)
    except TooLong:
        return f"BAD hang: {traceback.format_exc().splitlines()[-3].strip()}"
    except BaseException:
        lines = traceback.format_exc().splitlines()
        return f"BAD traceback: {lines[-1][:200]} | {lines[-3].strip()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    streams[1].flush()
    said = streams[1].buffer.getvalue().decode("utf-8")
    if os.path.exists("executed"):
        return "BAD executed"
    if state() != before:
        return f"BAD files: {sorted(set(state().items()) ^ set(before.items()))[:3]}"
    if code == 0:
        return "right"
    errors = [line for line in said.splitlines() if line.strip()]
    if code == 2 and errors and errors[-1].startswith("error: ") and sum(
            line.startswith("error: ") for line in errors) == 1 and len(errors[-1]) < 3000:
        return "sentence"
    return f"BAD exit code {code}: {said[-300:]!r}"


def work(kind, seeds, folder, pipe, other_end):
    """Try seeds one after the other, as long as somebody listens."""
    other_end.close()
    os.chdir(folder)
    os.environ.update(XDG_CACHE_HOME=os.path.join(folder, "cache"), HOME=folder)
    signal.signal(signal.SIGPROF, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (used_memory() + MEMORY,) * 2)
    for seed in seeds:
        pipe.send((seed, None))
        pipe.send((seed, attempt(kind, seed)))
    pipe.close()


def fuzz(kind, seeds):
    """Yield number and outcome of each input; a worker that dies is replaced."""
    left = list(seeds)
    while left:
        folder = tempfile.mkdtemp(prefix="fuzz", dir=PLACE)
        mine, theirs = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=work, args=(kind, left, folder, theirs, mine))
        worker.start()
        theirs.close()
        current, why = left[0], "died"
        try:
            while left:
                if not mine.poll(WALL_SECONDS):
                    why = "hang, not in Python"
                    break
                current, outcome = mine.recv()
                if outcome is not None:
                    left.remove(current)
                    yield current, outcome
        except EOFError:
            pass
        worker.kill()
        worker.join()
        if left:
            left.remove(current)
            yield current, f"BAD {why} (exit code {worker.exitcode})"
        shutil.rmtree(folder, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="inputs of each kind")
    parser.add_argument("--kind", default=None, choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="number of one input")
    args = parser.parse_args(argv)
    if args.only is not None:
        place = tempfile.mkdtemp(prefix="fuzz")
        os.chdir(place)
        os.environ["XDG_CACHE_HOME"] = place + "/cache"
        signal.signal(signal.SIGPROF, too_long)
        print(attempt(args.kind, args.only), place)
        return 0
    bad = 0
    for kind in [args.kind] if args.kind else KINDS:
        counts = collections.Counter()
        for seed, outcome in fuzz(kind, range(args.seed, args.seed + args.rounds)):
            counts[outcome.split(":")[0]] += 1
            if outcome.startswith("BAD"):
                bad += 1
                print(f"{kind} {seed}: {outcome}", flush=True)
        print(f"{kind}: {dict(counts)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
