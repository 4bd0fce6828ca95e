"""Memory, descriptors and threads stay as they are over a long training and many predictions.

The figures that the tests print are those of docs/reliability.md.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from data.shapes import write_dataset
from helpers.prediction_weights import save_weights
from helpers.ranks import clean_environ

pytestmark = pytest.mark.slow

MEASURE = '''
import json, os, sys
from pathlib import Path


def family():
    """This process and those that it has started."""
    found = {os.getpid()}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = stat.parent.name, stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) in found:
            found.add(int(pid))
    return found


def measure(done):
    resident = descriptors = threads = 0
    for pid in family():
        folder = Path(f"/proc/{pid}")
        resident += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        descriptors += len(list((folder / "fd").iterdir()))
        threads += len(list((folder / "task").iterdir()))
    print("measured", json.dumps([done, resident / 2 ** 20, descriptors, threads]), flush=True)


'''
TRAIN = MEASURE + '''
import train
step, steps = train.train_step, []


def watched(*args, **kwargs):
    steps.append(1)
    if len(steps) % 40 == 20:
        measure(len(steps))
    return step(*args, **kwargs)


train.train_step = watched
sys.exit(train.main(sys.argv[1:]))
'''
PREDICT = MEASURE + '''
import numpy as np
from utils.inference import Predictor

predict, rng = Predictor(sys.argv[1], device="cpu"), np.random.default_rng(0)
for done in range(1, 3001):
    height, width = rng.integers(40, 640, 2).tolist()
    predict(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
    if done % 50 == 0:
        measure(done)
'''


def growth_of(program, arguments, folder, warm):
    """MiB, descriptors and threads that the second half after `warm` has more than the first.

    Of descriptors and threads the fewest: batches on their way take some for a moment.
    """
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=str(folder),
                          env=clean_environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout[-4000:]
    (folder / "measured").write_text(done.stdout)
    rows = np.array([json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines()
                     if line.startswith("measured ")])
    rows = rows[rows[:, 0] > warm]
    first, second = np.array_split(rows[:, 1:], 2)
    growth = [second[:, 0].mean() - first[:, 0].mean(), *(second.min(0) - first.min(0))[1:]]
    return growth, first.min(0), done.stdout


def report(capsys, name, growth, began):
    with capsys.disabled():
        print(f"\n{name}: {began[0]:.0f} MiB, {began[1]:.0f} descriptors, {began[2]:.0f} threads; "
              f"second half against the first: {growth[0]:+.1f} MiB, {growth[1]:+.0f} descriptors, "
              f"{growth[2]:+.0f} threads")


def test_two_thousand_iterations_with_five_validations(tmp_path, capsys):
    write_dataset(str(tmp_path / "data"), seed=3, train=16, val=4)
    growth, began, text = growth_of(TRAIN, [
        "--data=data", "--config=yolact_shapes", "--max_size=64", "--batch_size=2",
        "--max_iter=2000", "--no_autoscale", "--num_workers=2", "--validation_epoch=50",
        "--save_interval=400", "--node_device=cpu", "--seed=3"], tmp_path, 400)
    assert text.count("  mask |") == 5
    report(capsys, "2,000 iterations, 5 validations", growth, began)
    assert growth[0] < 8 and max(growth[1:]) <= 0


def test_three_thousand_predictions_of_changing_size(tmp_path, capsys):
    growth, began, _ = growth_of(PREDICT, [save_weights(tmp_path)], tmp_path, 500)
    report(capsys, "3,000 predictions", growth, began)
    assert growth[0] < 8 and max(growth[1:]) <= 0
