"""A folder laid out like the project, with a stand-in for Python: for tests of the launchers."""

from __future__ import annotations

import os
import shutil
import subprocess

from helpers.paths import ROOT
from utils.engine.observer import format_line

SCRIPTS = ("common.sh", "env_npu.sh", "train_full_1p.sh", "train_performance_1p.sh",
           "train_eval_1p.sh", "train_performance_multinodes.sh")

STUB = r"""#!/bin/bash
# Called as: python -u PROGRAM FLAGS...
printf '%s\n' "${@:3}" > "$STUB_FOLDER/$2.args"
env > "$STUB_FOLDER/$2.env"
cat "$STUB_FOLDER/$2.log" 2>/dev/null
echo "something on stderr" >&2
if [[ -f $STUB_FOLDER/$2.endless ]]; then
    trap 'echo "stopped by INT"; exit 130' INT
    trap 'echo "stopped by TERM"; exit 130' TERM
    touch "$STUB_FOLDER/started"
    while true; do sleep 0.05; done
fi
exit "$(cat "$STUB_FOLDER/$2.exit" 2>/dev/null || echo 0)"
"""

def log_line(iteration, total, average_fps, eta="0:00:05", rank=0):
    losses = {"B": 4.0, "C": 8.0, "M": 5.0, "S": total - 17}
    return format_line(iteration // 20, iteration, losses, total, eta, 0.5, 16.0, average_fps,
                       rank) + "\n"


FIRST_LINE = log_line(1, 22.0, 0.0)
TRAIN_LOG = "".join([
    "device cpu\n", FIRST_LINE, log_line(10, 20.0, 30.0),
    log_line(20, 18.125, 25.4, eta="2 days, 0:00:00"), log_line(20, 99.0, 99.0, rank=1),
    "Saved weights : weights/yolact_base_1_20.pth\n",
    "Final weights : weights/my run/yolact_base_1_20.pth\n"])

EVAL_LOG = """\
       |  all  |  .50  |  .55  |
-------+-------+-------+-------+
   box | 31.98 | 50.00 | 45.00 |
  mask | 29.62 | 48.00 | 43.00 |
-------+-------+-------+-------+
"""


class Workplace:
    """A folder laid out like the project, and a stand-in for Python."""

    def __init__(self, folder):
        self.root = folder / "my project"
        self.stub = folder / "stub"
        self.data = folder / "coco data"
        (self.root / "test").mkdir(parents=True)
        self.stub.mkdir()
        self.data.mkdir()
        for name in SCRIPTS:
            shutil.copy(str(ROOT / "test" / name), str(self.root / "test" / name))
        python = self.stub / "python"
        python.write_text(STUB)
        python.chmod(0o755)
        self.write("train.py.log", TRAIN_LOG)
        self.write("eval.py.log", EVAL_LOG)
        self.env = {key: value for key, value in os.environ.items() if key not in (
            "ASCEND_DEVICE_ID", "etp_running_flag", "RANK_ID", "RANK_SIZE", "CANN_INSTALL_PATH")}
        self.env.update(PYTHON=str(python), STUB_FOLDER=str(self.stub), RANK="3", WORLD_SIZE="8")

    def write(self, name, text):
        (self.stub / name).write_text(text)

    def command(self, script, *arguments):
        return ["bash", "test/" + script] + [str(argument) for argument in arguments]

    def run(self, script, *arguments, **env):
        return run_command(self.command(script, *arguments), self.root, dict(self.env, **env))

    def arguments_of(self, program):
        return (self.stub / (program + ".args")).read_text().splitlines()

    def environment_of(self, program):
        lines = (self.stub / (program + ".env")).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def output(self, name, device=0):
        return (self.root / "test" / "output" / str(device) / name).read_text()


def run_command(command, folder, env, timeout=120):
    return subprocess.run(command, cwd=str(folder), env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout)
