"""A folder laid out like the project, whose train.py breaks on demand, for several cards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import torch

from helpers.ranks import ROOT, clean_environ
from utils.weights_folder import find_checkpoint

STEPS, SAVE = 9, 4

FAULTY_TRAIN = """
import errno, importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("real_train", os.environ["REAL_TRAIN"])
train = importlib.util.module_from_spec(spec)
sys.modules["real_train"] = train
spec.loader.exec_module(train)
kind, rank, at = (os.environ.get("FAULT") or "none:0:0").split(":")
struck = os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
real, steps = train.train_step, []

def strike(*args, **kwargs):
    steps.append(1)
    with open(os.environ["FAULT_STEPS"] + os.environ["RANK"], "w") as stream:
        stream.write(str(len(steps)))
    if struck and len(steps) == int(at):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "raise":
            raise ArithmeticError("the kernel is broken")
        if kind == "stuck":
            time.sleep(10 ** 6)
    return real(*args, **kwargs)

train.train_step = strike
if struck and kind == "hang":
    from data.augment import Augmenter
    augment, images = Augmenter.__call__, []
    def hang(self, *args):
        images.append(1)
        if len(images) > 2 * int(at):
            time.sleep(10 ** 6)
        return augment(self, *args)
    Augmenter.__call__ = hang
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""


class Place:
    """A folder like the project, whose train.py breaks on demand."""

    def __init__(self, folder, data):
        self.root, self.data, self.mark = folder, data, uuid.uuid4().hex
        (folder / "test").mkdir(parents=True)
        for script in (ROOT / "test").glob("*.sh"):
            shutil.copy(str(script), str(folder / "test" / script.name))
        for name in ("eval.py", "utils"):
            os.symlink(str(ROOT / name), str(folder / name))
        (folder / "train.py").write_text(FAULTY_TRAIN)
        self.weights = folder / "weights"

    def start(self, *flags, **env):
        more = dict(NPROC="2", PYTHON=sys.executable, REAL_TRAIN=ROOT / "train.py",
                    FAULT_STEPS=self.root / "steps", RUN_MARK=self.mark)
        more.update(env)
        command = ["bash", "test/train_performance_8p.sh", str(self.data),
                   "--config=yolact_shapes", "--node_device=cpu", "--num_workers=1",
                   "--batch_size=2", "--no_autoscale", f"--max_iter={STEPS}",
                   f"--save_interval={SAVE}", "--no_log"] + list(flags)
        return subprocess.Popen(command, cwd=str(self.root), env=clean_environ(**more),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                universal_newlines=True)

    def run(self, *flags, **env):
        launcher = self.start(*flags, **env)
        try:
            out, err = launcher.communicate(timeout=900)
        finally:
            launcher.kill()
        return launcher.returncode, out, err

    def steps(self, rank):
        path = Path("{}{}".format(self.root / "steps", rank))
        text = path.read_text() if path.exists() else ""
        return int(text) if text else 0

    def processes(self):
        """Commands that still run of all those started from here."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_text(errors="replace"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def final(self):
        return torch.load(find_checkpoint("latest", str(self.weights)))
