"""kill -9 at every file operation of a training and at random moments; it goes on to the same end.

A process that has imported everything forks the trainings, so that each costs its steps alone. The
figures that the test prints are those of docs/reliability.md.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from data.shapes import write_dataset
from helpers.ranks import clean_environ

pytestmark = pytest.mark.slow

CAMPAIGN = '''
import os, random, shutil, signal, sys, time, traceback
import torch
import train
from utils.engine import record
from utils.weights_folder import list_checkpoints

record.build_report = lambda folder: []  # a page takes longer than the training does
data, folder, kind, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
FLAGS = [f"--data={data}", "--config=yolact_shapes", "--max_size=96", "--batch_size=2",
         "--max_iter=4", "--no_autoscale", "--num_workers=0", "--save_interval=2",
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


def final(place):
    return torch.load(list_checkpoints(os.path.join(place, "weights"))[-1])


def equal(left, right):
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


began = time.time()
assert end(start(os.path.join(folder, "whole"), FLAGS)) == 0
seconds, whole = time.time() - began, final(os.path.join(folder, "whole"))
tried = killed = went_on = began_anew = left_over = 0
moments = random.Random(seed)
while kind == "operations" or tried < 40:
    tried += 1
    place = os.path.join(folder, str(tried))
    child = start(place, FLAGS, tried if kind == "operations" else 0)
    if kind == "moments":
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    if end(child) == 0:  # it came to its end
        if kind == "operations":
            break
        continue
    killed += 1
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
    left_over += sum(name.endswith(".tmp") for _, _, names in os.walk(place) for name in names)
    os.chdir(folder)
    shutil.rmtree(place)  # 50 MB each
print(f"{kind}: {killed} kills, {went_on} went on, {began_anew} had saved nothing and began anew, "
      f"all ended bit-equal; {left_over} temporary files left")
'''


@pytest.mark.parametrize("kind", ["operations", "moments"])
def test_what_a_kill_leaves_goes_on_to_the_same_end(tmp_path, kind, capsys):
    write_dataset(str(tmp_path / "data"), seed=3, train=8, val=2)
    done = subprocess.run([sys.executable, "-c", CAMPAIGN, str(tmp_path / "data"),
                           str(tmp_path / "runs"), kind, "7"], cwd=str(tmp_path),
                          env=clean_environ(YOLACT_RUNS="runs"), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0, done.stdout[-4000:]
    with capsys.disabled():
        print("\n" + done.stdout.splitlines()[-1])
