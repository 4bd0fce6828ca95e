"""Supervised ranks with small programs in place of the training: ends, records, reports, cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from utils.distributed.failures import (
    is_lost_peer,
    new_record,
    read_records,
    record_cause,
    record_failure,
    write_record,
)
from utils.distributed.supervise import (
    FEWEST_CORES,
    bound_elsewhere,
    record_path,
    report,
    share_of_cores,
)

SLEEP = "import time; print('started', flush=True); time.sleep(1000)"
OBEDIENT = ("import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *a: sys.exit(130))\n"
            "print('started', flush=True)\ntime.sleep(1000)")


def start(folder, rank, program, world=2, **env):
    environ = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                   NPROC=str(world), PYTHONPATH=str(ROOT))
    environ.update(env)
    command = [sys.executable, "-S", "-m", "utils.distributed.supervise", str(folder), "train",
               sys.executable, "-S", "-c", program]
    return subprocess.Popen(command, cwd=str(ROOT), env=environ)


def wait_for(path):
    """Wait until a program's first line is in its log, whole."""
    deadline = time.time() + 30
    while not (path.exists() and "\n" in path.read_text()):
        assert time.time() < deadline
        time.sleep(0.05)


def log_of(folder, number):
    return folder / str(number) / f"train_{number}.log"


def test_success_leaves_a_log_and_no_record(tmp_path):
    program = "import os; print(os.environ['RANK_ID'], os.environ['RANK_SIZE'], " \
              "os.environ['ASCEND_DEVICE_ID'])"
    assert start(tmp_path, 1, program).wait(30) == 0
    assert log_of(tmp_path, 1).read_text() == "1 2 1\n"
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["train_1.log"]


def test_a_killed_rank_takes_the_other_with_it_and_is_named_first(tmp_path):
    healthy = start(tmp_path, 0, SLEEP)
    wait_for(log_of(tmp_path, 0))
    struck = start(tmp_path, 1, "import os; os.kill(os.getpid(), 9)")
    begin = time.time()
    assert struck.wait(30) == 137
    assert healthy.wait(30) == 137
    assert time.time() - begin < 20
    text, code = report(str(tmp_path), "train", [0, 1])
    lines = text.splitlines()
    assert code == 137
    assert lines[0] == ("[Error] rank 1: killed by SIGKILL (out of memory, or from outside); log: "
                        + str(log_of(tmp_path, 1)))
    assert lines[1].startswith("        rank 0: ended because another rank had failed")


def test_a_program_that_is_stopped_ends_the_run_and_is_named(tmp_path):
    impatient = ("import sys; from utils.distributed import supervise\n"
                 "supervise.SUSPENDED_SECONDS = 1.0; sys.exit(supervise.main(sys.argv[1:]))")
    environ = dict(os.environ, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", NPROC="2",
                   PYTHONPATH=str(ROOT))
    healthy = start(tmp_path, 0, SLEEP)
    struck = subprocess.Popen(
        [sys.executable, "-c", impatient, str(tmp_path), "train", sys.executable, "-S", "-c",
         "import os, signal; print('started', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"],
        cwd=str(ROOT), env=environ)
    assert struck.wait(60) == 137
    assert healthy.wait(30) == 137
    text, _ = report(str(tmp_path), "train", [0, 1])
    assert text.startswith("[Error] rank 1: was stopped (SIGSTOP) for 1 s; log: ")


def test_children_of_a_program_end_with_it(tmp_path):
    program = ("import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', "
               "'import time; time.sleep(1000)']); print('child', p.pid, flush=True); sys.exit(3)")
    assert start(tmp_path, 0, program, world=1).wait(30) == 3
    child = int(log_of(tmp_path, 0).read_text().split()[1])
    time.sleep(0.2)
    state = f"/proc/{child}/stat"
    assert not os.path.exists(state) or " Z " in Path(state).read_text()


def test_the_program_dies_with_its_supervisor(tmp_path):
    supervisor = start(tmp_path, 0, "import os; print('started', os.getpid(), flush=True)\n"
                       "import time; time.sleep(1000)", world=1)
    wait_for(log_of(tmp_path, 0))
    program = int(log_of(tmp_path, 0).read_text().split()[1])
    supervisor.kill()
    supervisor.wait(10)
    time.sleep(0.5)
    state = f"/proc/{program}/stat"
    assert not os.path.exists(state) or " Z " in Path(state).read_text()


def test_the_program_stops_when_the_launcher_s_shell_is_gone(tmp_path):
    shell = subprocess.Popen(["sleep", "1000"])
    supervisor = start(tmp_path, 0, OBEDIENT, world=1, LAUNCHER_PID=str(shell.pid))
    wait_for(log_of(tmp_path, 0))
    shell.kill()
    shell.wait()
    assert supervisor.wait(20) == 0


def test_the_program_stops_when_torch_s_launcher_is_gone(tmp_path):
    script = (f"import sys; sys.path[:0] = {sys.path[:1] + [str(ROOT / 'test')]!r}\n"
              "from pathlib import Path; from unit.utils.distributed.test_supervise import *\n"
              f"start(Path({str(tmp_path)!r}), 0, OBEDIENT, world=1).wait()")
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=str(ROOT),
                                env=dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'test'}"))
    wait_for(log_of(tmp_path, 0))
    supervisor = int((tmp_path / "0" / "supervisor.pid").read_text())
    launcher.kill()
    launcher.wait()
    deadline = time.time() + 20
    while os.path.exists(f"/proc/{supervisor}"):
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_stop_that_is_granted_counts_as_success(tmp_path, number):
    supervisor = start(tmp_path, 0, OBEDIENT, world=1)
    wait_for(log_of(tmp_path, 0))
    supervisor.send_signal(number)
    supervisor.send_signal(number)
    assert supervisor.wait(30) == 0


def test_the_program_s_own_record_is_completed(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
               "from utils.distributed.failures import record_failure\n"
               "with record_failure(0):\n    raise ValueError('no such thing')")
    assert start(tmp_path, 0, program, world=1).wait(30) == 1
    record = json.loads(Path(record_path(str(tmp_path), "train", 0, 0)).read_text())
    assert record["cause"] == "ValueError: no such thing" and record["status"] == 1
    assert record["log"] == str(log_of(tmp_path, 0)) and not record["lost_peer"]


def test_errors_of_those_left_behind_come_last(tmp_path):
    for number, (cause, when) in enumerate([("RuntimeError: Connection closed by peer", 1.0),
                                            ("ZeroDivisionError: division by zero", 2.0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_record(record_path(str(tmp_path), "train", number, 0),
                     dict(new_record(number, cause), log="x.log", time=when))
    text, _ = report(str(tmp_path), "train", [0, 1])
    assert text.startswith("[Error] rank 1: ZeroDivisionError")


@pytest.mark.parametrize("cause", [
    "RuntimeError: HCCL function error: HcclCommInitRootInfo, error code is 7",
    "DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled cuda error"])
def test_a_card_whose_collectives_do_not_start_is_the_cause(tmp_path, cause):
    """The name of the library does not make it a consequence of what came later."""
    for number, (text, when) in enumerate([("ValueError: later", 2.0), (cause, 1.0)]):
        (tmp_path / str(number)).mkdir()
        write_record(record_path(str(tmp_path), "train", number, 0),
                     dict(new_record(number, text), log="x.log", time=when))
    text, _ = report(str(tmp_path), "train", [0, 1])
    assert text.startswith(f"[Error] rank 1: {cause}")


@pytest.mark.parametrize("text", [
    "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1",
    "DistBackendError: NCCL error: remote process exited or there was a network error",
    "RuntimeError: HCCL error: EI0002: The wait execution of the Notify register times out."])
def test_who_lost_a_peer_says_so(text):
    assert is_lost_peer(text)


def test_the_report_is_about_the_last_attempt(tmp_path):
    (tmp_path / "0").mkdir()
    for attempt in (0, 1):
        write_record(record_path(str(tmp_path), "train", 0, attempt),
                     dict(new_record(0, f"attempt {attempt}"), log="x.log", status=5))
    text, code = report(str(tmp_path), "train", [0])
    assert "attempt 1" in text and code == 5


def test_report_without_records(tmp_path):
    text, code = report(str(tmp_path), "train", [0, 1])
    assert code == 1 and text.startswith("[Error] no rank could be started")


def test_a_restart_goes_on_in_the_log(tmp_path):
    start(tmp_path, 0, "print('first')", world=1).wait(30)
    start(tmp_path, 0, "print('second')", world=1, TORCHELASTIC_RESTART_COUNT="1").wait(30)
    assert log_of(tmp_path, 0).read_text() == "first\nRestart 1\nsecond\n"


def test_first_device_moves_folders_and_cards(tmp_path):
    program = "import sys, os; print(sys.argv[1:], os.environ['ASCEND_DEVICE_ID'])"
    assert start(tmp_path, 1, program, FIRST_DEVICE="4").wait(30) == 0
    assert log_of(tmp_path, 5).read_text() == "['--device_id=5'] 5\n"


def test_records_outside_of_a_launcher_are_not_written(tmp_path, monkeypatch):
    monkeypatch.delenv("FAILURE_FILE", raising=False)
    record_cause(0, "nothing")
    with pytest.raises(KeyError):
        with record_failure(0):
            raise KeyError("x")
    assert read_records([str(tmp_path / "absent.json")]) == []


# Cores of each rank: equal stretches, in the order of the cards, never too few.

def test_ranks_get_stretches_in_the_order_of_their_cards():
    cores = set(range(192))
    shares = [share_of_cores(cores, part, 8) for part in range(8)]
    assert shares[0] == set(range(24)) and shares[7] == set(range(168, 192))
    assert set.union(*shares) == cores


def test_what_the_process_may_not_use_is_not_shared_out():
    assert share_of_cores(set(range(100, 108)), 1, 2) == {104, 105, 106, 107}


@pytest.mark.parametrize("cores, parts", [(2, 2), (8, 8), (4 * FEWEST_CORES - 1, 4)])
def test_few_cores_stay_with_all(cores, parts):
    assert share_of_cores(set(range(cores)), 1, parts) == set(range(cores))


@pytest.mark.parametrize("environ, elsewhere", [
    ({}, False), ({"CPU_AFFINITY_CONF": ""}, False), ({"CPU_AFFINITY_CONF": "0"}, False),
    ({"CPU_AFFINITY_CONF": "1"}, True), ({"CPU_AFFINITY_CONF": "2,npu0:0-3"}, True),
    ({"CPU_AFFINITY": "off"}, True), ({"CPU_AFFINITY": "on"}, False)])
def test_one_mechanism_at_a_time(environ, elsewhere):
    assert bound_elsewhere(environ) is elsewhere


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
@pytest.mark.parametrize("environ", [{}, {"CPU_AFFINITY": "off"}])
def test_a_bound_process_hands_it_on(environ):
    code = ("import os, subprocess, sys\nfrom utils.distributed import supervise\n"
            "supervise.FEWEST_CORES = 1\n"
            f"supervise.bind(1, 2, dict({environ}))\n"
            "subprocess.run([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'])"
            )
    shown = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), stdout=subprocess.PIPE,
                           universal_newlines=True).stdout
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // 2
    expected = set(cores[each:2 * each]) if each and not environ else set(cores)
    assert eval(shown) == expected  # noqa: S307
