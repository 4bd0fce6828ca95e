"""What a step takes on several cards, on paper: docs/scaling.md holds its output.

    python test/benchmark/scaling.py [--config=yolact_base] [--report=field_report.txt]

Counted: operations, parameters and bytes, from the network. Assumed, and to be given where they are
known: what a card sustains, how fast it starts a kernel, and the two bandwidths. A report of
`test/npu/field_report.sh` takes the place of the first two, and of the bandwidth between the cards
of a host where it measured that; its speed of several cards stands beside the computed one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from data.config import Config, get_config  # noqa: E402
from utils.cli import ArgumentParser, Bounded, run_main  # noqa: E402
from utils.errors import UserError  # noqa: E402
from yolact import build_yolact  # noqa: E402

BUCKET = 25 * 2 ** 20
"""Bytes that PyTorch exchanges at a time, while gradients of earlier layers are computed."""
BACKWARD = 2 / 3
"""Share of the backward pass in the operations of a step."""


class Counts(NamedTuple):
    """What a step asks for, whatever card it runs on."""

    flop_per_image: float
    gradient_bytes: int
    kernels: int


class Speeds(NamedTuple):
    """What the hardware does: FLOP/s that a card sustains, seconds to start a kernel, bytes/s
    between two cards of a host and between two hosts.
    """

    flops: float
    launch: float
    link: float
    network: float


def count(config: Config, kernels: int) -> Counts:
    """Operations forward and backward, on tensors without memory."""
    if any(config.dcn_layers):
        raise UserError(f"--config={config.name}: the operations of deformable convolution are not "
                        "counted; give a recipe without")
    with torch.device("meta"):
        network = build_yolact(config).train()
        image = torch.zeros(1, 3, config.max_size, config.max_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        found = network(image)
        sum(found[name].float().sum() for name in ("loc", "conf", "mask", "proto",
                                                   "segm")).backward()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Counts(counter.get_total_flops(), 4 * parameters, kernels)


def exchange_seconds(size: float, cards: int, per_host: int, speeds: Speeds) -> float:
    """A ring of the cards of each host, then one of the hosts: each sends 2 (n - 1) / n of it."""
    inside = min(cards, per_host)
    hosts = -(-cards // per_host)
    return 2 * size * ((inside - 1) / inside / speeds.link + (hosts - 1) / hosts / speeds.network)


def step_seconds(counts: Counts, batch_size: int, cards: int, per_host: int,
                 speeds: Speeds) -> Dict[str, float]:
    """Seconds of a step and of its parts: `compute`, `exchange`, and what of it is `visible`.

    Kernels are started ahead, so that the slower of starting and computing counts. The last bucket
    has nothing to hide behind, the others have the backward pass.
    """
    compute = max(counts.flop_per_image * batch_size / speeds.flops, counts.kernels * speeds.launch)
    exchange = exchange_seconds(counts.gradient_bytes, cards, per_host, speeds)
    last = exchange_seconds(min(BUCKET, counts.gradient_bytes), cards, per_host, speeds)
    visible = max(last, exchange - BACKWARD * compute)
    return {"compute": compute, "exchange": exchange, "visible": visible,
            "step": compute + visible}


class Measured(NamedTuple):
    """What a field report measured."""

    speeds: Dict[int, float]
    """Images per second, by number of cards."""
    link: Optional[float]
    """Gigabytes a second between two cards of the host; None with one card."""


def read_report(path: str) -> Measured:
    """The numbers of a field report.

    Raises:
        UserError: there is no such file, or no speed of one card in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        hint = "; name the file in it" if Path(path).is_dir() else ""
        raise UserError(f"cannot read --report '{path}': {error.strerror}{hint}") from error
    found = {int(cards): float(speed) for cards, speed in re.findall(
        r"^speed_(\d+)p: +Final Performance images/sec : (\d+\.?\d*)", text, re.MULTILINE)}
    if not found.get(1):
        raise UserError(f"'{path}' has no line 'speed_1p: Final Performance images/sec : ...', "
                        "which test/npu/field_report.sh writes")
    link = re.search(r"^all_reduce: +all-reduce of .* (\d+\.?\d*) GB/s a card", text, re.MULTILINE)
    return Measured(found, float(link.group(1)) if link and float(link.group(1)) else None)


def print_table(counts: Counts, speeds: Speeds, batch_size: int, per_host: int,
                measured: Dict[int, float]) -> None:
    """A line for each number of cards; `measured` are images per second by number of cards."""
    print("| cards | step, ms | computing | exchange | not hidden | images/s | of ideal | measured "
          "|\n|---|---|---|---|---|---|---|---|")
    alone = step_seconds(counts, batch_size, 1, per_host, speeds)["step"]
    for cards in sorted({1, 8, 16, 64, *measured}):
        found = step_seconds(counts, batch_size, cards, per_host, speeds)
        times = " | ".join(f"{1e3 * found[name]:.1f}" for name in ("step", "compute", "exchange",
                                                                  "visible"))
        print(f"| {cards} | {times} | {cards * batch_size / found['step']:.0f} | "
              f"{100 * alone / found['step']:.1f} % | {measured.get(cards, '')} |")


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="scaling.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="yolact_base")
    parser.add_argument("--batch_size", type=Bounded(int, 1), default=8, help="of a card")
    parser.add_argument("--kernels", type=Bounded(int, 1), default=925,
                        help="that a step starts, as the audit counts them (aclnn calls)")
    parser.add_argument("--tflops", type=Bounded(float, 1e-3), default=20.0,
                        help="that a card sustains over a step")
    parser.add_argument("--launch_us", type=Bounded(float, 0), default=15.0,
                        help="microseconds to start a kernel")
    parser.add_argument("--link_gb", type=Bounded(float, 1e-3), default=30.0,
                        help="gigabytes a second between cards of a host")
    parser.add_argument("--network_gb", type=Bounded(float, 1e-3), default=12.5,
                        help="gigabytes a second between hosts")
    parser.add_argument("--cards_per_host", type=Bounded(int, 1), default=8)
    parser.add_argument("--report", default="",
                        help="of test/npu/field_report.sh, made with the same --batch_size")
    args = parser.parse_args(argv)
    config = get_config(args.config)
    counts = count(config, args.kernels)
    measured = read_report(args.report) if args.report else Measured({}, None)
    flops = (measured.speeds[1] * counts.flop_per_image if measured.speeds else 1e12 * args.tflops)
    link = measured.link or args.link_gb
    # A measured speed has the starts inside.
    speeds = Speeds(flops, 0.0 if measured.speeds else 1e-6 * args.launch_us, 1e9 * link,
                    1e9 * args.network_gb)
    print(f"{config.name}, {config.max_size} px, {args.batch_size} images a card: "
          f"{counts.flop_per_image / 1e9:.0f} GFLOP an image, {counts.gradient_bytes / 1e6:.1f} MB "
          f"of gradients; {flops / 1e12:.2f} TFLOP/s a card "
          f"({'measured' if measured.speeds else 'assumed'}), {link:g} GB/s between cards "
          f"({'measured' if measured.link else 'assumed'}), "
          f"{args.network_gb:g} GB/s between hosts of {args.cards_per_host} (assumed)\n")
    print_table(counts, speeds, args.batch_size, args.cards_per_host, measured.speeds)
    return 0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line entry; returns the exit code."""
    return run_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
