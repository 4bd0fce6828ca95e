"""Start one process of a run and see it to its end.

    python -m utils.distributed.supervise OUTPUT NAME COMMAND...

Every launcher of processes (torch.distributed.run, torch.distributed.launch of any version, a batch
system) starts this in place of the program. It gives each rank its log, its share of the host's
cores and the variables that Ascend's scripts know; passes SIGTERM and SIGINT on; ends its program
when another rank of the host has failed, since some backends would wait for it for half an hour;
takes the program's own children down with it; ends it where it was stopped (SIGSTOP) for a minute,
since all ranks wait for it; stops it when what launched it is gone; and records how it ended, for
the launcher's report.

Environment read: RANK, WORLD_SIZE, LOCAL_RANK, TORCHELASTIC_RESTART_COUNT; NPROC (ranks on this
host), FIRST_DEVICE (index of the host's first card), LAUNCHER_PID (of the launcher's shell),
CPU_AFFINITY and CPU_AFFINITY_CONF.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Mapping, Sequence

from utils.distributed.failures import (
    FILE_VARIABLE,
    LAUNCHER_VARIABLE,
    die_with_parent,
    new_record,
    read_records,
    write_record,
)

POLL_SECONDS = 0.2
GRACE_AFTER_FAILURE = 5.0
"""Seconds that a program has to end by itself after a rank of this host has failed."""
GRACE_AFTER_SIGNAL = 25.0
"""Seconds for the checkpoint after SIGTERM; torch's launcher kills 30 s after its signal."""
GRACE_OF_ORPHANS = 10.0
"""Seconds for the checkpoint after the launcher's shell or torch's launcher was killed."""
SUSPENDED_SECONDS = 60.0
"""That a program may be stopped (SIGSTOP) before it counts as failed."""
EXIT_STOPPED = 130
"""Exit code of a program that stopped in order because it was asked to."""
SHOWN_LINES = 20
"""Of the log of the rank that failed first, in the report."""
_TAIL_BYTES = 8192
FEWEST_CORES = 4
"""Per rank: the training's thread, the plugin's queue, and two of the loader."""


def share_of_cores(cores: set[int], part: int, parts: int) -> set[int]:
    """The part-th of `parts` equal stretches of the cores in use; all where there are too few."""
    each = len(cores) // parts
    if each < FEWEST_CORES or part >= parts:
        return cores
    return set(sorted(cores)[part * each:(part + 1) * each])


def bound_elsewhere(environ: Mapping[str, str]) -> bool:
    """Whether the plugin is asked to bind (mode 1 or 2), or nobody is to."""
    mode = environ.get("CPU_AFFINITY_CONF", "").split(",")[0].strip()
    return mode not in ("", "0") or environ.get("CPU_AFFINITY", "").lower() == "off"


def bind(part: int, parts: int, environ: Mapping[str, str]) -> None:
    """Bind this process, and what it will start, to the share of card `part` of the cores."""
    if parts > 1 and not bound_elsewhere(environ) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share_of_cores(os.sched_getaffinity(0), part, parts))


class Supervisor:
    """One program, from its start to the record of its end.

    The log of a rank is `<output>/<number>/<name>_<number>.log`.
    """

    def __init__(self, output: str, name: str, command: Sequence[str],
                 environ: Mapping[str, str]) -> None:
        self.rank = int(environ["RANK"])
        self.local_rank = int(environ["LOCAL_RANK"])
        self.attempt = int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
        first_device = int(environ.get("FIRST_DEVICE") or 0)
        number = self.rank + first_device
        self.folder = os.path.join(output, str(number))
        self.log = os.path.join(self.folder, f"{name}_{number}.log")
        self.record = record_path(output, name, number, self.attempt)
        first = number - self.local_rank
        self.all_records = [record_path(output, name, n, self.attempt)
                            for n in range(first, first + int(environ.get("NPROC") or 1))]
        self.pid_file = os.path.join(self.folder, "supervisor.pid")
        self.command = list(command)
        if first_device:
            self.command.append(f"--device_id={first_device + self.local_rank}")
        self.environ = dict(
            environ, RANK_ID=str(self.rank), RANK_SIZE=environ["WORLD_SIZE"],
            ASCEND_DEVICE_ID=str(number), **{FILE_VARIABLE: os.path.abspath(self.record)})
        bind(first_device + self.local_rank, first_device + int(environ.get("NPROC") or 1), environ)
        # The launcher's shell may die without a word, and torch's launcher below it.
        self._above = [int(environ[LAUNCHER_VARIABLE])] if LAUNCHER_VARIABLE in environ else []
        self._parent = os.getppid()
        self._signal: int | None = None
        self._deadline: float | None = None

    def run(self) -> int:
        """Start the program and wait for its end; returns the exit code for the launcher."""
        os.makedirs(self.folder, exist_ok=True)
        with open(self.pid_file, "w", encoding="ascii") as stream:
            stream.write(str(os.getpid()))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        with open(self.log, "ab" if self.attempt else "wb") as log:
            if self.attempt:
                log.write(f"Restart {self.attempt}\n".encode("ascii"))
                log.flush()
            program = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT, env=self.environ,
                                       start_new_session=True, preexec_fn=die_with_parent)
        status = self._watch(program)
        with contextlib.suppress(OSError):
            os.unlink(self.pid_file)
        return status

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:  # a batch system and torch's launcher may both send one
            self._signal = number

    def _watch(self, program: subprocess.Popen) -> int:
        forwarded = False
        failed: list[dict] = []
        running = time.monotonic()
        while program.poll() is None:
            failed = failed or read_records(self.all_records)
            if not _is_suspended(program.pid):
                running = time.monotonic()
            elif time.monotonic() - running > SUSPENDED_SECONDS:
                write_record(self.record, new_record(self.rank, "was stopped (SIGSTOP) for "
                                                     f"{SUSPENDED_SECONDS:g} s"))
                _kill_session(program)
            is_orphan = os.getppid() != self._parent or not all(map(_exists, self._above))
            if self._signal is None and is_orphan:
                self._signal = signal.SIGTERM
                self._end_within(GRACE_OF_ORPHANS)
            if failed:
                self._end_within(GRACE_AFTER_FAILURE)
            elif self._signal is not None and not forwarded:
                forwarded = True
                program.send_signal(self._signal)
                self._end_within(GRACE_AFTER_SIGNAL)
            if self._deadline is not None and time.monotonic() > self._deadline:
                _kill_session(program)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(POLL_SECONDS)
        _kill_session(program)  # loader processes that hang would outlive it
        return self._conclude(program.returncode, killed_for=failed)

    def _end_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = min(self._deadline or deadline, deadline)

    def _conclude(self, status: int, killed_for: list[dict]) -> int:
        if status == 0 or (status == EXIT_STOPPED and self._signal is not None):
            return 0  # in order; torch's launcher must not take it for a failure and restart
        code = 128 - status if status < 0 else status
        if status > 0:
            record = new_record(self.rank, f"exit code {status}: {self._last_line()}")
        elif status == -signal.SIGKILL and killed_for:
            record = dict(new_record(self.rank, "ended because another rank had failed"),
                          lost_peer=True)
        else:
            record = new_record(self.rank, f"killed by {signal.Signals(-status).name}")
            if status == -signal.SIGKILL:
                record["cause"] += " (out of memory, or from outside)"
        own = read_records([self.record])  # what the program itself said counts
        write_record(self.record, dict(own[0] if own else record, log=self.log, status=code))
        return code

    def _last_line(self) -> str:
        lines = _last_lines(self.log)
        shown = [line for line in lines if line.startswith(("error: ", "training stopped: "))]
        return (shown or lines or ["nothing was printed"])[-1]


def _last_lines(path: str) -> list[str]:
    with open(path, "rb") as stream:
        stream.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    return [line for line in text.split("\n") if line.strip()]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_suspended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _kill_session(program: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)


def record_path(output: str, name: str, number: int, attempt: int) -> str:
    """Where the record of one rank's failure lies; every attempt of a restarted run has its own."""
    return os.path.join(output, str(number), f"{name}_failure_{attempt}.json")


def report(output: str, name: str, numbers: Sequence[int]) -> tuple[str, int]:
    """What the launcher prints when ranks have failed, the decisive one first, and its exit code.

    `output` and `name` are those of `Supervisor`, `numbers` the folders of this host's ranks.
    """
    records: list[dict] = []
    for attempt in itertools.count():
        found = read_records(record_path(output, name, n, attempt) for n in numbers)
        if not found:
            break
        records = found
    if not records:
        return ("[Error] no rank could be started, or its supervisor was killed; see "
                f"{os.path.join(output, str(numbers[0]))}"), 1
    lines = [f"rank {record['rank']}: {record['cause']}; log: {record['log']}"
             for record in records]
    shown = ["[Error] " + lines[0]] + ["        " + line for line in lines[1:]]
    if os.path.exists(records[0]["log"]):
        shown += [f"The last lines of {records[0]['log']}:"]
        shown += _last_lines(records[0]["log"])[-SHOWN_LINES:]
    return "\n".join(shown), int(records[0]["status"])


def main(argv: list[str]) -> int:
    """Command line: `OUTPUT NAME PROGRAM ARGUMENT...`, or `--report OUTPUT NAME NUMBER...`."""
    if argv[:1] == ["--report"]:
        text, code = report(argv[1], argv[2], [int(number) for number in argv[3:]])
        print(text, file=sys.stderr)
        return code
    return Supervisor(argv[0], argv[1], argv[2:], os.environ).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
