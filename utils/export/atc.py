"""ONNX to Ascend's OM: the command line of `atc`, and running it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from typing import Any, Callable, NamedTuple, Sequence

from data.config import Config
from utils.distributed.failures import die_with_parent
from utils.errors import UserError, nearest
from utils.files import digest

SOCS = ("310", "310B1", "310B2", "310B3", "310B4", "310P1", "310P3", "310P5", "310P7", "910A",
        "910B", "910PremiumA", "910ProA", "910ProB", "910B1", "910B2", "910B2C", "910B3", "910B4",
        "910B4-1", "910_9362", "910_9372", "910_9381", "910_9382", "910_9391", "910_9392")
"""Chips as `npu-smi info` and ATC's --soc_version name them, without `Ascend`."""
PRECISION_MODES = ("force_fp16", "force_fp32", "cube_fp16in_fp32out", "allow_fp32_to_fp16",
                   "must_keep_origin_dtype", "allow_mix_precision")
SCRIPT, AIPP = "atc.sh", "aipp.cfg"
ATC_ENDING = "_atc.onnx"
"""Of a model that ATC takes in the place of the one without it."""
SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
_LAST_LINES = 5
_GROUP = 'trap "kill -9 0" TERM; "$@" & wait $!'
"""Of a shell: run a command, and at SIGTERM end it with all that it has started. `atc` is a script
itself, which does not pass signals on."""


def parse_socs(text: str) -> list[str]:
    """The different chips of `310P3,Ascend910B3`; one that is not known is a `UserError`."""
    socs = [re.sub("(?i)^ascend", "", word.strip()) for word in text.split(",")]
    for soc in socs:
        if soc not in SOCS:
            raise UserError(f"--soc names '{soc}', which is no known chip{nearest(soc, SOCS)}; "
                            f"known: {', '.join(SOCS)} ('npu-smi info' shows that of a host)")
    return list(dict.fromkeys(socs))


class AtcPlan(NamedTuple):
    """What Ascend's models are made for, and how."""

    socs: list[str]
    precision_mode: str
    """One of `PRECISION_MODES`; empty for ATC's own."""
    aipp: bool
    """Take uint8 images, which the card normalises."""
    seconds: float
    """After these `atc` is ended."""


def add_om_models(facts: dict[str, Any], config: Config, plan: AtcPlan, folder: str, out: str,
                  say: Callable[[str], None]) -> list[str]:
    """Make Ascend's models of those in `folder`, and describe them; without `atc`, leave a script.

    The description `facts` gets an entry for each model. Everything lies in `folder` for now, which
    will be called `out`; `say` prints a line. Returns sentences for the user.
    """
    if plan.aipp:
        with open(os.path.join(folder, AIPP), "w", encoding="ascii") as stream:
            stream.write(aipp_config(config))
    entries = [_om_entry(entry, config, soc, plan, folder)
               for soc in plan.socs for entry in facts["models"]]
    facts["models"] = facts["models"] + entries
    if shutil.which("atc") is None:
        with open(os.path.join(folder, SCRIPT), "w", encoding="utf-8") as stream:
            stream.write(_script(entries))
        return [f"ATC is not installed here. Where CANN is: source {SET_ENV}, then bash "
                f"{os.path.join(out, SCRIPT)}"]
    for entry in entries:
        _convert(entry, folder, os.path.abspath(out) + ".atc.log", plan.seconds, say)
        entry["sha256"] = digest(os.path.join(folder, entry["file"]))
    return [f"Wrote   : {os.path.join(out, entry['file'])}, batch {entry['batch']}, {entry['soc']}"
            for entry in entries]


def _om_entry(entry: dict[str, Any], config: Config, soc: str, plan: AtcPlan,
              folder: str) -> dict[str, Any]:
    """How `model.yaml` describes the OM that `atc` makes of the ONNX model `entry`."""
    stem = os.path.splitext(entry["file"])[0]
    name, side = f"{stem}_{soc}", config.max_size
    has_own = os.path.exists(os.path.join(folder, stem + ATC_ENDING))
    command = ["atc", "--framework=5",
               f"--model={stem + ATC_ENDING if has_own else entry['file']}", f"--output={name}",
               "--input_format=NCHW",
               f"--input_shape={entry['input']['name']}:{entry['batch']},3,{side},{side}",
               "--log=error", f"--soc_version=Ascend{soc}"]
    if plan.precision_mode:
        command.append(f"--precision_mode={plan.precision_mode}")
    if plan.aipp:
        command.append(f"--insert_op_conf={AIPP}")
    model_input = dict(name=entry["input"]["name"], type="uint8", layout="NHWC") \
        if plan.aipp else entry["input"]
    return {"file": name + ".om", "batch": entry["batch"], "sha256": None, "soc": soc,
            "input": model_input, "command": " ".join(map(shlex.quote, command))}


def aipp_config(config: Config) -> str:
    """ATC's --insert_op_conf: uint8 RGB images `[B,S,S,3]`, normalised on the card as in training.

    AIPP computes (pixel - mean - min) * var_reci with whole means: the mean stands in min.
    """
    lines = ["aipp_mode: static", "input_format: RGB888_U8",
             f"src_image_size_w: {config.max_size}", f"src_image_size_h: {config.max_size}",
             "csc_switch: false", "rbuv_swap_switch: false"]
    for channel, (mean, std) in enumerate(zip(config.pixel_mean, config.pixel_std)):
        lines += [f"mean_chn_{channel}: 0", f"min_chn_{channel}: {mean:g}",
                  f"var_reci_chn_{channel}: {1 / std:.9g}"]
    return "aipp_op {\n" + "".join(f"    {line}\n" for line in lines) + "}\n"


def _script(entries: Sequence[dict[str, Any]]) -> str:
    """A script that makes the OMs on a host that has CANN."""
    return ("#!/bin/bash\n# Makes the Ascend models that model.yaml describes. Needs CANN:\n"
            f"#   source {SET_ENV}\n"
            'cd "$(dirname "${BASH_SOURCE[0]}")" && set -ex\n'
            + "".join(entry["command"] + "\n" for entry in entries))


def _convert(entry: dict[str, Any], folder: str, log_path: str, seconds: float,
             say: Callable[[str], None]) -> None:
    """Run the command of an OM's `entry` in `folder`.

    All that `atc` prints goes to `log_path`, which is left only where `atc` fails.

    Raises:
        UserError: `atc` fails, takes too long, or leaves no model; with its last lines.
    """
    say(entry["command"])
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with open(log_path, "w") as log:
        process = subprocess.Popen(["sh", "-c", _GROUP, "sh", *shlex.split(entry["command"])],
                                   cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, universal_newlines=True,
                                   errors="replace", start_new_session=True,
                                   preexec_fn=lambda: die_with_parent(signal.SIGTERM))
        assert process.stdout is not None
        limit = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stdout:
                say(line.rstrip("\n"))
                log.write(line)
                last.append(line.strip())
            code = process.wait()
        finally:
            is_late = not limit.is_alive()
            limit.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0 or not os.path.isfile(os.path.join(folder, entry["file"])):
        problem = (f"was ended after {seconds:g} s" if is_late else
                   f"failed with exit code {code}" if code else f"left no {entry['file']}")
        raise UserError(f"atc {problem} ({' / '.join(last) or 'it printed nothing'}); all of its "
                        f"output is in '{log_path}'")
    os.unlink(log_path)
