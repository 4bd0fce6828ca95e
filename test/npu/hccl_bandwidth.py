"""Print how fast the cards of a host add up their gradients; start it in one process a card.

    python -m torch.distributed.launch --use_env --nproc_per_node=8 test/npu/hccl_bandwidth.py
        [--megabytes=200] [--times=20] [--device=npu]

An all-reduce of as many bytes as yolact_base has of gradients, by the process group that training
has: HCCL on NPUs. The number is what each card sends, 2 (n - 1) / n of these bytes on n cards, by
the time that the slowest one takes; `test/benchmark/scaling.py` calculates with it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import List

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from utils.cli import ArgumentParser, Bounded, run_main  # noqa: E402
from utils.device import cards_of_host, select_device, synchronize  # noqa: E402
from utils.distributed.processes import Processes  # noqa: E402
from utils.errors import UserError  # noqa: E402

WARM_UP = 3


def all_reduce_seconds(device: torch.device, size: int, times: int) -> float:
    """Of one all-reduce of `size` bytes, on the slowest card."""
    values = torch.ones(size // 4, device=device)
    for number in range(WARM_UP + times):
        if number == WARM_UP:
            synchronize(device)
            start = time.perf_counter()
        dist.all_reduce(values)
    synchronize(device)
    taken = torch.tensor([(time.perf_counter() - start) / times], device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="hccl_bandwidth.py", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=Bounded(int, 1), default=200)
    parser.add_argument("--times", type=Bounded(int, 1), default=20, help="all-reduces")
    parser.add_argument("--device", default="npu")
    args = parser.parse_args(argv)
    processes = Processes.from_env(os.environ, cards_of_host(args.device))
    if processes.world_size < 2:
        raise UserError("this is one process; torch.distributed.launch starts one for each card")
    device = select_device(args.device, processes.local_rank)
    processes.init(device)
    size, cards = args.megabytes * 10 ** 6, processes.world_size
    seconds = all_reduce_seconds(device, size, args.times)
    if processes.is_main:
        print(f"all-reduce of {args.megabytes} MB on {cards} cards: {1e3 * seconds:.2f} ms, "
              f"{2 * (cards - 1) / cards * size / seconds / 1e9:.2f} GB/s a card")
    processes.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(_run, sys.argv[1:]))
