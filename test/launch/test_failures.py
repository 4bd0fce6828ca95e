"""What happens when something breaks in a run on several cards: real launchers, real processes.

Each fault strikes rank 1 of 2 (or what the test says) in the middle of a training. All processes
have to end within a minute, the launcher has to fail and to name the rank, the cause and the log in
the first line of its report, and resuming has to end with the result of an undisturbed run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from data.shapes import write_dataset
from helpers.faulty_place import SAVE, Place
from helpers.ranks import largest_difference
from utils import checkpoint
from utils.weights_folder import find_checkpoint

pytestmark = [pytest.mark.launch, pytest.mark.slow]
FAULT_AT = 6
SECONDS = 60


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(str(folder), seed=3, train=18, val=4)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("undisturbed") / "place", shapes)
    code, _, err = place.run()
    assert code == 0, err
    return place.final()


@pytest.fixture
def place(tmp_path, shapes):
    return Place(tmp_path / "place", shapes)


def run_into(place, fault, *flags, **env):
    """Run into a fault; returns the report. Times the end from the struck rank's last step."""
    code, _, err = place.run(*flags, FAULT=fault, **env)
    seconds = time.time() - max((place.root / f"steps{n}").stat().st_mtime for n in (0, 1))
    assert code != 0
    assert seconds < SECONDS
    assert place.processes() == []
    print(f"\n{fault}: ended after {seconds:.1f} s: {err.splitlines()[0]}")
    return code, err


def check_resumes(place, undisturbed, expected=SAVE, skip=()):
    """The last checkpoint is whole; the same command goes on from it to the same result."""
    latest = find_checkpoint("latest", str(place.weights))
    assert checkpoint.CheckpointName.parse(latest).iteration == expected
    assert checkpoint.load_state(latest)["iteration"] == expected
    code, _, err = place.run("--resume=latest")
    assert code == 0, err
    assert largest_difference(place.final(), undisturbed, skip=skip) == 0


def first_line(err, pattern, number=1):
    line = err.splitlines()[0]
    log = rf".*/test/output/{number}/train_{number}\.log$"
    assert re.match(rf"\[Error\] rank {number}: {pattern}; log: {log}", line), err


def test_killed_rank(place, undisturbed):
    code, err = run_into(place, f"kill:1:{FAULT_AT}")
    first_line(err, r"killed by SIGKILL \(out of memory, or from outside\)")
    assert code == 137
    check_resumes(place, undisturbed)


def test_killed_main_rank(place, undisturbed):
    code, err = run_into(place, f"kill:0:{FAULT_AT}")
    first_line(err, r"killed by SIGKILL .*", number=0)
    check_resumes(place, undisturbed)


def test_raising_rank(place, undisturbed):
    code, err = run_into(place, f"raise:1:{FAULT_AT}")
    first_line(err, "ArithmeticError: the kernel is broken")
    assert code == 1
    check_resumes(place, undisturbed)


def test_hanging_loader(place, undisturbed):
    code, err = run_into(place, f"hang:1:{FAULT_AT}", "--loader_timeout=5")
    first_line(err, r"the data loader delivered no batch for 5 s \(--loader_timeout\).*")
    assert code == 2 and list(place.weights.glob(f"*_{FAULT_AT}_interrupt.pth"))
    # Batch norm has seen images of the steps that did not count.
    check_resumes(place, undisturbed, FAULT_AT, ("running_mean", "running_var", "batches_tracked"))


def test_hanging_step(place, undisturbed):
    """Both ranks wait in it; where each stands is in its log."""
    code, err = run_into(place, f"stuck:1:{FAULT_AT}", "--step_timeout=2")
    assert re.match(rf"\[Error\] rank [01]: iteration {FAULT_AT} was not done after 20 s "
                    r"\(--step_timeout\)", err), err
    assert code == 1
    log = (place.root / "test" / "output" / "1" / "train_1.log").read_text()
    assert re.search(r"File .*, line \d+ in strike", log), log
    check_resumes(place, undisturbed)


def test_hanging_loader_with_the_default_limit_ends_within_a_minute(place):
    _, err = run_into(place, f"hang:1:{FAULT_AT}")
    first_line(err, r"the data loader delivered no batch for 45 s .*")


def test_restart_by_itself_ends_with_the_undisturbed_result(place, undisturbed):
    if not torch_has_elastic():
        pytest.skip("torch.distributed.run came with PyTorch 1.9")
    place.weights.mkdir()
    stale = place.weights / "yolact_shapes_2_9.pth"  # of some earlier training; must not be used
    torch.save({}, str(stale))
    os.utime(str(stale), (1, 1))
    code, _, err = place.run(FAULT=f"kill:1:{FAULT_AT}", MAX_RESTARTS="3")
    assert code == 0, err
    assert place.processes() == []
    log = (place.root / "test" / "output" / "0" / "train_0.log").read_text()
    assert "Restart 1" in log and f"at iteration {SAVE}" in log
    assert largest_difference(place.final(), undisturbed, skip=()) == 0


def torch_has_elastic():
    return (Path(torch.__file__).parent / "distributed" / "run.py").exists()


def test_too_few_restarts_fail(place):
    if not torch_has_elastic():
        code, _, err = place.run(MAX_RESTARTS="1")
        assert code == 1 and "needs PyTorch 1.9" in err
        return
    # The data is gone in every attempt.
    code, _, err = place.run("--train_images=/nowhere", "--train_info=/nowhere.json",
                             MAX_RESTARTS="1")
    assert code == 2
    assert re.match(r"\[Error\] rank [01]: .*/nowhere", err.splitlines()[0])


@pytest.fixture
def small_disk(place):
    """A file system with room for one checkpoint and a half."""
    place.weights.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(place.weights)]
    if os.geteuid() != 0 or subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("mounting needs root")
    yield place.weights
    subprocess.run(["umount", str(place.weights)], check=True)


def test_full_disk(place, small_disk, undisturbed):
    code, err = run_into(place, "none:0:0")
    first_line(err, ".*cannot write '.*': No space left on device.*", number=0)
    assert code == 2
    assert not list(small_disk.glob(".*tmp"))
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    check_resumes(place, undisturbed)


def test_sigterm_saves_and_ends(place, shapes):
    """Both ranks stop at the same step, though only the launcher was told."""
    launcher = place.start("--max_iter=4000")
    try:
        deadline = time.time() + 120
        while place.steps(0) < 12:
            assert time.time() < deadline and launcher.poll() is None
            time.sleep(0.1)
        start = time.time()
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=SECONDS)
    finally:
        launcher.kill()
    print(f"\nSIGTERM: ended after {time.time() - start:.1f} s")
    assert launcher.returncode == 143
    assert place.processes() == []
    assert re.match(r"\[Error\] rank 0 was interrupted by SIGTERM; its log: .*/0/train_0\.log$",
                    err.splitlines()[0]), err
    latest = find_checkpoint("latest", str(place.weights))
    assert latest.endswith("_interrupt.pth")
    stopped = [re.search(r"Stopped by .* at iteration (\d+)", (
        place.root / "test" / "output" / n / f"train_{n}.log").read_text()) for n in "01"]
    assert stopped[0].group(1) == stopped[1].group(1)
    assert checkpoint.load_state(latest)["iteration"] == int(stopped[0].group(1))


def test_signal_to_one_rank_only_stops_all_at_the_same_step(place):
    launcher = place.start("--max_iter=4000", MAX_RESTARTS="0")
    try:
        deadline = time.time() + 120
        while place.steps(1) < 3:
            assert time.time() < deadline and launcher.poll() is None
            time.sleep(0.1)
        pid = (place.root / "test" / "output" / "1" / "supervisor.pid").read_text()
        os.kill(int(pid), signal.SIGTERM)
        launcher.communicate(timeout=SECONDS)
    finally:
        launcher.kill()
    assert place.processes() == []
    logs = [(place.root / "test" / "output" / n / f"train_{n}.log").read_text()
            for n in "01"]
    assert "Stopped by another process" in logs[0] and "Stopped by SIGTERM" in logs[1]


def start_hosts(folder, data, *flags, **env):
    """Two launchers, as on two hosts; they share the weights folder."""
    from helpers.ranks import free_port

    port, places = free_port(), []
    for number in (0, 1):
        place = Place(folder / f"host{number}", data)
        launcher = place.start(
            "--save_folder={}".format(folder / "weights"), *flags, NPROC="1", NNODES="2",
            NODE_RANK=number, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env)
        places.append((place, launcher))
    return places


def end_hosts(places):
    try:
        return [launcher.communicate(timeout=200)[1] for _, launcher in places]
    finally:
        for _, launcher in places:
            launcher.kill()


def test_two_hosts_end_with_the_result_of_one(tmp_path, shapes, undisturbed):
    places = start_hosts(tmp_path, shapes)
    errors = end_hosts(places)
    assert [launcher.returncode for _, launcher in places] == [0, 0], errors
    final = torch.load(find_checkpoint("latest", str(tmp_path / "weights")))
    assert largest_difference(final, undisturbed, skip=()) == 0
    assert (places[1][0].root / "test" / "output" / "1" / "train_1.log").exists()


def test_a_rank_killed_on_one_host_ends_the_other_host_too(tmp_path, shapes):
    places = start_hosts(tmp_path, shapes, FAULT=f"kill:1:{FAULT_AT}")
    errors = end_hosts(places)
    assert all(launcher.returncode for _, launcher in places)
    assert errors[1].startswith("[Error] rank 1: killed by SIGKILL")
    assert errors[0].startswith("[Error] rank 0: RuntimeError"), errors[0]
    assert all(place.processes() == [] for place, _ in places)


@pytest.mark.parametrize("env, sentence", [
    (dict(NPROC="0"), "NPROC is '0', expected a whole number from 1 upwards"),
    (dict(NPROC="two"), "NPROC is 'two'"),
    (dict(NNODES="2"), "MASTER_ADDR, the address of host 0, is not set"),
    (dict(NNODES="2", NODE_RANK="2", MASTER_ADDR="h"), "2 host(s) count from 0 to 1"),
    (dict(MAX_RESTARTS="-1"), "MAX_RESTARTS is '-1'"),
])
def test_mistakes_in_the_environment(place, env, sentence):
    code, out, _ = place.run(**env)
    assert code == 1 and sentence in out
    assert not (place.root / "test" / "output").exists()
