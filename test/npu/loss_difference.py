"""Print how far the losses of four training steps on an NPU are from the CPU's.

    python test/npu/loss_difference.py [--device npu]

The network is yolact_resnet50 at 138 px with fixed weights and images, in float32 without the
shortened products of some cards. Exit code 1 where a difference is beyond rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List

TEST = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TEST), str(TEST.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from npu.test_npu_training import ROUNDING, OneSide, bound_of_step  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import describe, select_device  # noqa: E402


def use_exact_float32(device: torch.device) -> None:
    """Turn off the shortened float32 (TF32, HF32) of convolutions and matrix products."""
    switch = "allow_hf32" if device.type == "npu" else "allow_tf32"
    npu = getattr(torch, "npu", None)
    holders = {"cuda": (torch.backends.cudnn, getattr(torch.backends.cuda, "matmul", None)),
               "npu": (getattr(npu, "conv", None), getattr(npu, "matmul", None))}
    for holder in holders.get(device.type, ()):
        if hasattr(holder, switch):
            setattr(holder, switch, False)


def _golden(name: str) -> dict:
    with np.load(str(TEST / "golden" / (name + ".npz")), allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="loss_difference.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="npu")
    device = select_device(parser.parse_args(argv).device)
    use_exact_float32(device)
    print(describe(device))
    ours, theirs = OneSide(_golden, device), OneSide(_golden, torch.device("cpu"))
    beyond = 0
    for step in range(len(ROUNDING)):
        allowed = bound_of_step(step)
        found, wanted = ours.step()[0], theirs.step()[0]
        for name, value in wanted.items():
            difference = abs(found[name] - value) / abs(value)
            beyond += not difference <= allowed
            print("step {} {}: {:.6f} on {}, {:.6f} on cpu, relative difference {:.1e} (at most "
                  "{:.0e}){}".format(step + 1, name, found[name], device.type, value, difference,
                                     allowed, "" if difference <= allowed else "  BEYOND"))
    print(f"{beyond} of {4 * len(ROUNDING)} losses beyond rounding")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(run_main(_run, sys.argv[1:]))
