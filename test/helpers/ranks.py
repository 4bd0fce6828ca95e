"""Real processes for the tests of several cards: started without a launcher, on gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

from helpers.paths import ROOT
from utils.weights_folder import list_checkpoints

LAUNCH_VARIABLES = ("ASCEND_DEVICE_ID", "RANK_ID", "RANK_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK",
                    "MASTER_ADDR", "MASTER_PORT", "FAILURE_FILE")

TRAIN = """
import sys, train
from utils.engine import learner as run
from data import config_file
from data.config import get_config
{prepare}
sys.exit(train.main(sys.argv[1:]))
"""

PLAIN_SGD = """
config_file.get_config = lambda name: get_config(name).replace(
    optimizer="sgd", lr=0.002, lr_warmup_until=0)
"""
"""AdamW's first steps have the size of the learning rate however small a gradient is: rounding
would show there."""

FROZEN = """
build = run.build_model
def frozen(*args, **kwargs):
    model = build(*args, **kwargs)
    model.freeze_bn()
    return model
run.build_model = frozen
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environ(**more):
    env = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    env.update({key: str(value) for key, value in more.items()})
    return env


def run_ranks(count, script, arguments, folder, timeout=240, **more):
    """Run `script` in `count` processes; returns exit codes and outputs by rank."""
    port, running = free_port(), []
    for rank in range(count):
        env = clean_environ(**more)
        if count > 1:
            env.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        log = open(str(folder / f"rank{rank}.txt"), "wb")  # noqa: SIM115
        running.append((subprocess.Popen([sys.executable, "-u", "-c", script] + list(arguments),
                                         cwd=str(folder), env=env, stdout=log,
                                         stderr=subprocess.STDOUT), log))
    try:
        codes = [process.wait(timeout) for process, _ in running]
    finally:
        for process, log in running:
            process.kill()
            log.close()
    texts = [(folder / f"rank{rank}.txt").read_text() for rank in range(count)]
    return codes, texts


def train_flags(data, folder, **flags):
    given = dict(data=data, config="yolact_shapes", node_device="cpu", num_workers=0,
                 no_autoscale="True", no_log="True", save_folder=folder / "weights",
                 validation_epoch=-1)
    given.update(flags)
    return [f"--{name}={value}" for name, value in given.items()]


def train_ranks(count, data, folder, prepare="", environ=None, **flags):
    """Train in `count` processes; returns the exit codes, the outputs and the newest weights."""
    folder.mkdir(exist_ok=True)
    codes, texts = run_ranks(count, TRAIN.format(prepare=prepare),
                             train_flags(data, folder, **flags), folder, **(environ or {}))
    found = list_checkpoints(str(folder / "weights"))
    return codes, texts, torch.load(found[-1]) if found else None


def largest_difference(left, right, skip=("running_mean", "running_var")):
    """Over all parameters; running statistics of batch norm are each process's own."""
    assert list(left) == list(right)
    return max((left[key].double() - right[key].double()).abs().max().item()
               for key in left if not key.endswith(skip))
