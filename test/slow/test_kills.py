"""kill -9 at every file operation of a training and at random moments; it goes on to the same end.

Killed are the training, a process of its loader, or all of them; on two ranks torch's launcher, a
rank, or a process group. What is not killed ends by itself.

A process that has imported everything forks the trainings of one rank, so that each costs its steps
alone. The figures that the tests print are those of docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.shapes import write_dataset
from helpers.faulty_place import STEPS, Place
from helpers.ranks import clean_environ, largest_difference
from utils.weights_folder import list_checkpoints

pytestmark = pytest.mark.slow

CAMPAIGN = '''
import contextlib, os, random, shutil, signal, sys, time, traceback
import torch
import train
from utils.engine import record
from utils.weights_folder import list_checkpoints

record.build_report = lambda folder: []  # a page takes longer than the training does
data, folder, kind, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
workers = 2 if kind in ("worker", "group") else 0
FLAGS = [f"--data={data}", "--config=yolact_shapes", "--max_size=96", "--batch_size=2",
         "--max_iter=4", "--no_autoscale", f"--num_workers={workers}", "--save_interval=2",
         "--validation_epoch=1", "--node_device=cpu", "--seed=3"]
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "os.truncate")


def start(place, flags, kill_at=0):
    """Fork a training in `place` that is killed before its `kill_at`-th file operation."""
    child = os.fork()
    if child:
        return child
    count = [0]

    def watch(event, arguments):
        if event in OPERATIONS or (event == "open" and isinstance(arguments[2], int)
                                   and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.setsid()
    os.makedirs(place, exist_ok=True)
    os.chdir(place)
    out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.addaudithook(watch)
    try:
        code = train.main(flags)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def end(child):
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def loaders_of(child):
    """Its processes; those of a loader, once there are any."""
    with open(f"/proc/{child}/task/{child}/children") as stream:
        return [int(pid) for pid in stream.read().split()]


def strike(child):
    """Kill what is to be killed at a random moment; returns when."""
    time.sleep(moments.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):
        if kind == "group":
            os.killpg(child, signal.SIGKILL)
        elif kind == "worker":
            for pid in loaders_of(child)[-1:]:
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGKILL)
    return time.time()


def others(session):
    """How many processes of a session there are."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += os.getsid(int(pid)) == session
        except OSError:
            pass
    return count


def final(place):
    return torch.load(list_checkpoints(os.path.join(place, "weights"))[-1])


def equal(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


began = time.time()
assert end(start(os.path.join(folder, "whole"), FLAGS)) == 0
seconds, whole = time.time() - began, final(os.path.join(folder, "whole"))
tried = killed = went_on = began_anew = left_over = longest = 0
moments = random.Random(seed)
while kind == "operations" or tried < (40 if kind == "moments" else 20):
    tried += 1
    place = os.path.join(folder, str(tried))
    child = start(place, FLAGS, tried if kind == "operations" else 0)
    struck = time.time() if kind == "operations" else strike(child)
    code = end(child)
    while others(child):
        assert time.time() - struck < 15, (place, "processes are left")
        time.sleep(0.01)
    if kind != "operations":
        longest = max(longest, time.time() - struck)
    if code == 0:  # it came to its end
        if kind == "operations":
            break
        continue
    killed += 1
    if kind == "worker":
        with open(os.path.join(place, "out")) as stream:
            text = stream.read()
        assert code == 2 and "a process that loads images was lost" in text, (place, code, text)
    saved = os.path.isdir(os.path.join(place, "weights")) and list_checkpoints(
        os.path.join(place, "weights"))
    code = end(start(place, ["--resume"]))
    with open(os.path.join(place, "out")) as stream:
        text = stream.read()
    if code == 2 and "no unfinished training" in text and not (saved and "_4.pth" in saved[-1]):
        assert not saved, (place, saved)
        began_anew += 1
        code = end(start(place, FLAGS))
    else:
        went_on += 1
        code = 0 if "no unfinished training" in text else code
    with open(os.path.join(place, "out")) as stream:
        text = stream.read()
    assert code == 0 and "Traceback" not in text, (place, code, text[-2000:])
    assert equal(final(place), whole), place
    if saved and "no unfinished training" in text:  # killed after its end: another one clears up
        assert end(start(place, FLAGS)) == 0
    left_over += sum(".tmp" in name for _, _, names in os.walk(place) for name in names)
    os.chdir(folder)
    shutil.rmtree(place)  # 50 MB each
print(f"{kind}: {killed} kills, {went_on} went on, {began_anew} had saved nothing and began anew, "
      f"all ended bit-equal; {left_over} temporary files left"
      + (f"; no process was left after {longest:.1f} s" if longest else ""))
assert not left_over
'''


@pytest.mark.parametrize("kind", ["operations", "moments", "worker", "group"])
def test_what_a_kill_leaves_goes_on_to_the_same_end(tmp_path, kind, capsys):
    write_dataset(str(tmp_path / "data"), seed=3, train=8, val=2)
    done = subprocess.run([sys.executable, "-c", CAMPAIGN, str(tmp_path / "data"),
                           str(tmp_path / "runs"), kind, "7"], cwd=str(tmp_path),
                          env=clean_environ(YOLACT_RUNS="runs"), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout[-4000:]
    with capsys.disabled():
        print("\n" + done.stdout.splitlines()[-1])


def processes_of(place):
    """Torch's launcher, and the ranks."""
    launcher, ranks = None, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if place.mark in (folder / "environ").read_text(errors="replace"):
                words = (folder / "cmdline").read_text().split("\0")
                if words[1:3] == ["-m", "utils.distributed.torch_distributed_run"]:
                    launcher = int(folder.name)
                elif words[1:3] == ["-u", "train.py"] and (folder / "stat").read_text().rpartition(
                        ")")[2].split()[3] == folder.name:  # leads its session: no loader
                    ranks.append(int(folder.name))
        except OSError:
            continue
    return launcher, ranks


def strike(place, kind, moments):
    """Kill a part of a run on two ranks; returns what, and when."""
    step = moments.randrange(1, STEPS)
    deadline = time.time() + 600
    while place.steps(0) < step:
        assert time.time() < deadline, "the training does not begin"
        time.sleep(0.02)
    time.sleep(moments.uniform(0, 0.3))
    launcher, ranks = processes_of(place)
    if kind == "launcher" and launcher is not None:
        os.kill(launcher, signal.SIGKILL)
    elif kind == "group" and launcher is not None:
        os.killpg(launcher, signal.SIGKILL)  # and the supervisors
    elif kind == "rank" and ranks:
        os.kill(moments.choice(ranks), signal.SIGKILL)
    return step, time.time()


def test_kills_on_two_ranks(tmp_path, capsys):
    """A launch with MAX_RESTARTS goes on by itself where it has lost a rank."""
    write_dataset(str(tmp_path / "data"), seed=3, train=18, val=4)
    whole = Place(tmp_path / "whole", tmp_path / "data")
    code, _, err = whole.run()
    assert code == 0, err
    whole, moments = whole.final(), random.Random(7)
    for number, kind in enumerate(["launcher", "rank", "group"] * 3 + ["rank"]):
        place = Place(tmp_path / str(number), tmp_path / "data")
        launcher = place.start(MAX_RESTARTS="1" if kind == "rank" else "0")
        step, struck = strike(place, kind, moments)
        if kind != "rank":
            while place.processes():
                assert time.time() - struck < 15, place.processes()
                time.sleep(0.1)
        seconds = time.time() - struck
        _, err = launcher.communicate(timeout=900)
        assert "Traceback" not in err and not place.processes()
        if kind == "rank":
            assert launcher.returncode == 0, err
            outcome = "restarted by itself"
        else:
            saved = list_checkpoints(str(place.weights))
            code, _, err = place.run(*["--resume=latest"] * bool(saved))
            assert code == 0, err
            outcome = f"no process left after {seconds:.1f} s, " + (
                f"went on from {Path(saved[-1]).name}" if saved else "had saved nothing")
        assert largest_difference(place.final(), whole, skip=()) == 0
        with capsys.disabled():
            print(f"\n{kind} after step {step}: {outcome}, bit-equal")
        shutil.rmtree(str(place.root))
