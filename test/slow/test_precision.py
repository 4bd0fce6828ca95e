"""O1 and O2 against O0: 200 steps of the shapes training, by loss and by average precision.

All runs go on from the same trained weights, with the same seed and so the same images in the same
order: the curves differ by rounding alone. From random weights such a comparison tells nothing: the
recipe amplifies rounding, and two float32 runs whose start weights differ by one part in a million
end 2 % of the loss and 2 points of AP apart. So the weights are trained first, at the recipe's rate
without its decay; the 200 steps then lower the rate to 0, by which the loss falls and the scores
rise. How far two float32 runs are apart there is measured, too, and has to be below what is asked.

    python -m pytest --slow test/slow/test_precision.py -s     # prints the numbers
"""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.datasets import open_dataset
from data.loader import prefetch
from data.shapes import write_dataset
from helpers.evaluation import evaluate
from train import train_step
from utils.device import has_autocast, seed_everything
from utils.distributed.processes import Processes
from utils.engine.setup import build_training
from utils.engine.train_flags import parse_train_flags

FIRST_STEPS, STEPS, WINDOW = 600, 200, 20
RATE = 5e-4
"""At the start of the 200 steps; the recipe's is 2e-3."""
CURVES = 0.02
"""Largest relative difference of the loss."""
POINT = 0.01
"""One point of average precision."""
JITTER = 1e-6
"""Relative change of all start weights, for a run that shows what rounding alone does."""
LEVELS = (("O1", "bfloat16"), ("O1", "float16"), ("O2", "bfloat16"), ("O2", "float16"))


def rounded_conv2d(exact, image, weight, bias=None, *arguments, **named):
    """Convolution as an accelerator computes it in float16: operands, result and their gradients
    are float16, sums are float32.

    A CPU without float16 arithmetic takes fifteen times as long for its own. The one difference: at
    O1 autocast adds up the gradients of a weight that is used several times in float16.
    """
    if torch.is_autocast_enabled("cpu") or weight.dtype == torch.float16:
        with torch.autocast("cpu", enabled=False):
            operands = [None if value is None else value.half().float()
                        for value in (image, weight, bias)]
            return exact(*operands, *arguments, **named).half()
    return exact(image, weight, bias, *arguments, **named)


def quick_float16(device, kind):
    """Context for a training in float16 on a CPU; elsewhere it does nothing."""
    if device.type != "cpu" or kind != "float16":
        return contextlib.ExitStack()
    return mock.patch.object(F, "conv2d", functools.partial(rounded_conv2d, F.conv2d))


def train(data, device, flags, steps, jitter=0.0):
    """The run after `steps` steps, the total loss of each, and how many updates were skipped."""
    args = parse_train_flags(
        [f"--data={data}", "--config=yolact_shapes", "--no_autoscale", "--num_workers=0",
         "--node_device=" + device.type, f"--max_iter={steps}"] + flags)
    seed_everything(args.seed)
    run = build_training(args, Processes(), device, train_step, "test")
    learner = run.learner
    learner.optimizer.flat.mul_(1 + jitter)
    learner.optimizer.renew_half()
    learner.network.train()
    totals, applied = [], []
    batches = prefetch(run.loader, device)
    for step, batch in zip(range(steps), batches):
        losses = train_step(learner.network, learner.criterion, learner.optimizer, [batch],
                            run.schedule(step), run.sharing, learner.precision)
        totals.append(sum(losses.values()))
        applied.append(learner.optimizer.step_finite)
    batches.close()
    return run, torch.stack(totals).tolist(), steps - int(torch.stack(applied).sum())


def train_start(data, device, path):
    """Write the weights that all runs go on from."""
    run, totals, _ = train(data, device, ["--schedule=step"], FIRST_STEPS)
    torch.save(run.learner.model.state_dict(), str(path))
    print(f"start: mean loss of the last {WINDOW} steps {np.mean(totals[-WINDOW:]):.3f}")


def go_on(data, device, path, level, kind, jitter=0.0):
    """Mean losses of the windows of steps, box and mask AP, and skipped updates."""
    flags = [f"--weights={path}", f"--lr={RATE}", "--seed=1",
             "--opt_level=" + level]
    if level != "O0":
        flags.append("--amp_dtype=" + kind)
    with quick_float16(device, kind):
        run, totals, skipped = train(data, device, flags, STEPS, jitter)
    validation = open_dataset(run.config.dataset, str(data), None, None, "val")
    with run.learner.precision.float32_weights(run.learner.model):
        results = evaluate(run.learner.model.eval(), run.config, validation, device, num_workers=0)
    windows = np.asarray(totals).reshape(-1, WINDOW).mean(axis=1)
    scores = np.array([results.box.ap, results.mask.ap])
    print(f"{level} {kind} {jitter}: mean loss {windows.mean():.4f}, windows "
          f"{windows.round(4).tolist()}, box and mask AP {(100 * scores).round(2).tolist()}, "
          f"{skipped} skipped, scale {run.learner.precision.state_dict()}", flush=True)
    return windows, scores, skipped


def difference(found, wanted):
    """Largest relative difference of the windows' means and of the whole mean; of the scores."""
    windows = found[0] / wanted[0] - 1
    whole = found[0].mean() / wanted[0].mean() - 1
    scores = found[1] - wanted[1]
    print(f"    against O0: mean loss {100 * whole:+.2f} %, windows "
          f"{(100 * windows).round(2).tolist()} %, box and mask AP "
          f"{(100 * scores).round(2).tolist()} points")
    return max(np.abs(windows).max(), abs(whole)), np.abs(scores).max()


@pytest.mark.slow
@pytest.mark.skipif(not has_autocast(), reason="this PyTorch casts on accelerators only")
def test_losses_and_scores_are_those_of_float32(tmp_path, device):
    data, path = tmp_path / "shapes", tmp_path / "start.pth"
    write_dataset(str(data))
    train_start(data, device, path)
    wanted = go_on(data, device, path, "O0", "float32")
    assert wanted[0][-1] < 0.95 * wanted[0][0], "the 200 steps teach it nothing"
    floor = difference(go_on(data, device, path, "O0", "float32", JITTER), wanted)
    assert floor[0] < CURVES / 2 and floor[1] < POINT / 2, "two float32 runs are too far apart"
    for level, kind in LEVELS:
        found = go_on(data, device, path, level, kind)
        curves, scores = difference(found, wanted)
        assert curves < CURVES, (level, kind)
        assert scores < POINT, (level, kind)
        assert found[2] == 0 or kind == "float16", (level, kind)
