"""O1 and O2 against O0: 200 steps of the quickstart's recipe, by loss and by average precision.

The same seed gives the same images in the same order: the curves differ by rounding alone. But this
training, AdamW at a high rate, amplifies rounding: two float32 runs whose weights differ by one
part in a million at the start differ by up to 3.6 % in the mean loss of 20 steps and by 2 points of
AP after 200. So two such runs are made here, too. What has to be within 2 % is the mean over the
run; single windows and the scores have to be within 2 % and one point, or within what float32
differs from itself.

    python -m pytest --slow test/slow/test_precision.py -s     # prints the table
    python test/slow/test_precision.py O1 float16 200          # one run, by hand
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
import pytest
import torch

from data.datasets import open_dataset
from data.loader import DevicePrefetcher
from data.shapes import write_dataset
from eval import evaluate_dataset
from training.run import build_run
from utils.device import has_autocast, seed_everything, select_device
from utils.parallel import shared_step
from utils.processes import Processes
from utils.train_flags import train_parser

STEPS, WINDOW = 200, 20
CURVES = 0.02
"""Largest relative difference of the loss."""
POINT = 0.01
"""One point of average precision."""
JITTERS = (1e-6, -1e-6)
"""Relative changes of all start weights, for runs that show what rounding alone does."""


def levels(device):
    """What is compared; a CPU takes twenty times as long for float16."""
    half = [("O1", "bfloat16"), ("O2", "bfloat16")]
    return half if device.type == "cpu" else [("O1", "float16"), ("O2", "float16")] + half


def train_and_score(data, device, level, kind, steps=STEPS, seed=0, jitter=0.0):
    """Total loss of each step, skipped steps, and box and mask AP on the validation images."""
    flags = ["--data={}".format(data), "--config=yolact_shapes", "--max_iter={}".format(steps),
             "--no_autoscale", "--num_workers=0", "--opt_level=" + level, "--seed={}".format(seed),
             "--node_device=" + device.type]
    if level != "O0":
        flags.append("--amp_dtype=" + kind)
    args = train_parser().parse_args(flags)
    seed_everything(args.seed)
    run = build_run(args, Processes(), device)
    run.optimizer.flat.mul_(1 + jitter)
    run.optimizer.renew_half()
    run.network.train()
    totals, applied = [], []
    batches = iter(DevicePrefetcher(run.loader, device))
    for step, batch in zip(range(steps), batches):
        losses = shared_step(run.network, run.criterion, run.optimizer, [batch],
                             run.learning_rate(step), run.sharing, precision=run.precision)
        totals.append(sum(losses.values()))
        applied.append(run.optimizer.step_finite)
    batches.close()
    validation = open_dataset(run.config.dataset, str(data), None, None, "val")
    with run.precision.float32_weights(run.model):
        results = evaluate_dataset(run.model.eval(), run.config, validation, device, num_workers=0)
    return {"level": level, "type": kind, "totals": torch.stack(totals).tolist(),
            "skipped": steps - int(torch.stack(applied).sum()), "scale": run.precision.state_dict(),
            "box": results.box.ap, "mask": results.mask.ap}


def window_means(totals):
    """Means over consecutive windows of steps."""
    return np.asarray(totals).reshape(-1, WINDOW).mean(axis=1)


def differences(found, wanted):
    """Relative differences of the windows' means and of the whole mean, and the scores'."""
    windows = window_means(found["totals"]) / window_means(wanted["totals"]) - 1
    whole = np.mean(found["totals"]) / np.mean(wanted["totals"]) - 1
    scores = np.array([found[kind] - wanted[kind] for kind in ("box", "mask")])
    print("{} {}: mean loss {:+.2f} %, windows {} %, box and mask AP {} points, {} skipped".format(
        found["level"], found["type"], 100 * whole, np.round(100 * windows, 2).tolist(),
        np.round(100 * scores, 2).tolist(), found["skipped"]))
    return np.abs(windows).max(), abs(whole), np.abs(scores).max()


@pytest.mark.slow
@pytest.mark.skipif(not has_autocast(), reason="this PyTorch casts on accelerators only")
def test_losses_and_scores_are_those_of_float32(tmp_path, device):
    data = tmp_path / "shapes"
    write_dataset(str(data))
    wanted = train_and_score(data, device, "O0", "float32")
    own = [differences(train_and_score(data, device, "O0", "float32", jitter=jitter), wanted)
           for jitter in JITTERS]
    curves, _, points = np.max(own, axis=0)
    for level, kind in levels(device):
        found = train_and_score(data, device, level, kind)
        windows, whole, scores = differences(found, wanted)
        assert whole < CURVES
        assert windows < max(CURVES, curves)
        assert scores < max(POINT, points)
        assert found["skipped"] == 0 or kind == "float16"


if __name__ == "__main__":
    chosen_level, chosen_type, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    folder = sys.argv[4] if len(sys.argv) > 4 else "/tmp/yolact_shapes"
    write_dataset(folder)
    more = [int(value) if value.isdigit() else float(value) for value in sys.argv[5:]]
    print(json.dumps(train_and_score(folder, select_device("cpu"), chosen_level, chosen_type,
                                     count, *more)))
