"""O1 and O2 against O0: 200 steps of the quickstart's recipe, by loss and by average precision.

The same seed gives the same images in the same order, so that the curves differ by rounding alone.
Compared are means of the total loss over windows of 20 steps: single steps differ more, in two runs
at O0 with different orders of summation, too.

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
from training_run import build_run
from utils.device import has_autocast, seed_everything, select_device
from utils.parallel import shared_step
from utils.processes import Processes
from utils.train_flags import train_parser

STEPS, WINDOW = 200, 20
CURVES = 0.02
"""Largest relative difference of a window's mean."""
POINT = 0.01
"""One point of average precision."""
LEVELS = [("O1", "bfloat16"), ("O1", "float16"), ("O2", "bfloat16")]


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


@pytest.mark.slow
@pytest.mark.skipif(not has_autocast(), reason="this PyTorch casts on accelerators only")
def test_losses_and_scores_are_those_of_float32(tmp_path, device):
    data = tmp_path / "shapes"
    write_dataset(str(data))
    wanted = train_and_score(data, device, "O0", "float32")
    for level, kind in LEVELS:
        found = train_and_score(data, device, level, kind)
        differences = window_means(found["totals"]) / window_means(wanted["totals"]) - 1
        print("{} {}: windows differ by {} %, box {:.4f} ({:.4f}), mask {:.4f} ({:.4f}), {} steps "
              "skipped".format(level, kind, np.round(100 * differences, 2).tolist(), found["box"],
                               wanted["box"], found["mask"], wanted["mask"], found["skipped"]))
        assert np.abs(differences).max() < CURVES
        assert abs(found["box"] - wanted["box"]) < POINT
        assert abs(found["mask"] - wanted["mask"]) < POINT


if __name__ == "__main__":
    chosen_level, chosen_type, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    folder = sys.argv[4] if len(sys.argv) > 4 else "/tmp/yolact_shapes"
    write_dataset(folder)
    more = [int(value) if value.isdigit() else float(value) for value in sys.argv[5:]]
    print(json.dumps(train_and_score(folder, select_device("cpu"), chosen_level, chosen_type,
                                     count, *more)))
