"""Print what a card spends a training step on, by torch_npu's own profiler.

    python test/npu/profile_step.py [--config=yolact_base] [--batch_size=8] [--steps=20]
        [--opt_level=O1] [--max_size=S]

Kernels by the kind of core that ran them, the time between kernels, the ten dearest, and those that
the auxiliary CPU ran beside what the table of test/npu/kernels.py says of them. The emulator has no
profiler.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple

os.environ["ASCEND_LAUNCH_BLOCKING"] = "0"
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
TEST = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TEST), str(TEST.parent)]

from npu import counters  # noqa: E402
from npu.audit_scene import Scene, shrunk  # noqa: E402
from npu.kernels import AUXILIARY, CORE, UNKNOWN, place_of_type  # noqa: E402
from utils.amp import build_precision  # noqa: E402
from utils.cli import ArgumentParser, Bounded, run_main  # noqa: E402
from utils.device import describe, saturates, select_device, synchronize  # noqa: E402
from utils.errors import UserError  # noqa: E402

WARM_UP = 5
DEAREST = 10
KERNEL_FILE = "kernel_details.csv"
AUXILIARY_CORE = "AI_CPU"


class Launch(NamedTuple):
    """A kernel that the profiler saw; times in microseconds."""

    type: str
    core: str
    start: float
    duration: float
    types: str
    """Data types of the inputs, with ";" between them."""
    made: str
    """Those of the results."""
    shapes: str


def read_kernels(path: Path) -> List[Launch]:
    """The rows of the profiler's `kernel_details.csv`, in the order of time.

    Raises:
        UserError: there is no such file, or it has other columns than torch_npu 2.13 writes.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = [Launch(row["Type"], row["Accelerator Core"], float(row["Start Time(us)"]),
                        float(row["Duration(us)"]), _words(row, "Input Data Types"),
                        _words(row, "Output Data Types"), _words(row, "Input Shapes"))
                 for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"the profiler's '{path.name}' cannot be used: "
                        f"{type(error).__name__} {error}") from error
    return sorted(found, key=lambda launch: launch.start)


def _words(row: Dict[str, str], column: str) -> str:
    return (row.get(column) or "").strip('"')


def by_core(launches: Iterable[Launch], steps: int) -> List[str]:
    """A line for each kind of core: kernels and milliseconds a step."""
    count: Dict[str, int] = defaultdict(int)
    spent: Dict[str, float] = defaultdict(float)
    for launch in launches:
        count[launch.core] += 1
        spent[launch.core] += launch.duration
    return [f"  {core:<16} {count[core] / steps:8.1f} kernels {spent[core] / steps / 1e3:9.3f} ms"
            for core in sorted(spent, key=lambda core: -spent[core])]


def between(launches: List[Launch]) -> Tuple[float, float]:
    """Microseconds from the first kernel's start to the last one's end, and those of them in which
    no kernel ran.
    """
    idle, end = 0.0, launches[0].start
    for launch in launches:
        idle += max(0.0, launch.start - end)
        end = max(end, launch.start + launch.duration)
    return end - launches[0].start, idle


def dearest(launches: Iterable[Launch], steps: int) -> List[str]:
    """The kernels with the most time, by type and shapes."""
    spent: Dict[Tuple[str, str, str], List[float]] = defaultdict(list)
    for launch in launches:
        spent[launch.type, launch.core, launch.shapes].append(launch.duration)
    chosen = sorted(spent, key=lambda key: -sum(spent[key]))[:DEAREST]
    return [f"  {sum(spent[key]) / steps / 1e3:9.3f} ms {len(spent[key]) / steps:6.1f} times "
            f"{' '.join(key)}" for key in chosen]


def against_the_table(launches: Iterable[Launch], soc: str, steps: int) -> List[str]:
    """A line for each kernel and types that ran elsewhere than `test/npu/kernels.py` says, or that
    the auxiliary CPU ran.
    """
    seen: Dict[Tuple[str, str, str, bool], List[float]] = defaultdict(list)
    for launch in launches:
        seen[launch.type, launch.types, launch.made, launch.core == AUXILIARY_CORE].append(
            launch.duration)
    lines = []
    for (name, types, made, auxiliary), durations in sorted(seen.items()):
        expected = place_of_type(name, types.split(";")[0], made.split(";")[0], soc)
        found = AUXILIARY if auxiliary else CORE
        verdict = ("as the table says" if found == expected else "not in the table"
                   if expected == UNKNOWN else f"DIFFERENT: the table says {expected}")
        if auxiliary or verdict.startswith("DIFFERENT"):
            lines.append(f"  {name} {types} to {made}: {found}, "
                         f"{len(durations) / steps:.1f} times and "
                         f"{sum(durations) / steps / 1e3:.3f} ms a step; {verdict}")
    return lines


def profile(scene: Scene, steps: int, folder: str) -> float:
    """Write the profile of some steps below `folder`; returns milliseconds a step without it."""
    work = scene.steps()
    for _ in range(WARM_UP):
        next(work)
    synchronize(scene.device)
    start = time.perf_counter()
    for _ in range(steps):
        next(work)
    synchronize(scene.device)
    usual = 1e3 * (time.perf_counter() - start) / steps
    import torch_npu.profiler as npu

    with npu.profile(
            activities=[npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU],
            on_trace_ready=npu.tensorboard_trace_handler(folder), record_shapes=True,
            experimental_config=npu._ExperimentalConfig(profiler_level=npu.ProfilerLevel.Level1)):
        for _ in range(steps):
            next(work)
        synchronize(scene.device)
    return usual


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="profile_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="yolact_base")
    parser.add_argument("--batch_size", type=Bounded(int, 1), default=8)
    parser.add_argument("--steps", type=Bounded(int, 1), default=20)
    parser.add_argument("--opt_level", default="O0", help="O0, O1 or O2")
    parser.add_argument("--max_size", type=Bounded(int, 1), default=None, help="input side")
    args = parser.parse_args(argv)
    device = select_device("npu")
    if counters.available():
        raise UserError("the emulator has no profiler; this needs a card")
    precision = build_precision(args.opt_level, None, "auto", device)
    scene = Scene(shrunk(args.config, args.max_size), args.batch_size, device, precision)
    print(f"{args.config}, batch {args.batch_size}, {args.opt_level}, {describe(device)}")
    with tempfile.TemporaryDirectory() as folder:
        usual = profile(scene, args.steps, folder)
        files = sorted(Path(folder).rglob(KERNEL_FILE))
        if not files:
            raise UserError(f"the profiler wrote no {KERNEL_FILE}: CANN's msprof is not here")
        launches = read_kernels(files[0])
    if not launches:
        raise UserError(f"the profiler's {KERNEL_FILE} is empty")
    print("\n".join(report(launches, args.steps, "910A" if saturates(device) else "910B", usual)))
    return 0


def report(launches: List[Launch], steps: int, soc: str, usual: float) -> List[str]:
    """All that is told of the kernels of some steps; `usual` are milliseconds a step unprofiled."""
    span, idle = between(launches)
    auxiliary = sum(launch.duration for launch in launches if launch.core == AUXILIARY_CORE)
    differences = against_the_table(launches, soc, steps)
    return ["kernels by core, a step:", *by_core(launches, steps),
            f"the {DEAREST} dearest, a step:", *dearest(launches, steps),
            f"auxiliary CPU against the table of {soc}:",
            *(differences or ["  nothing ran there, and nothing is different"]),
            f"step {usual:.1f} ms; profiled {span / steps / 1e3:.1f} ms, of it "
            f"{100 * idle / span:.0f} % between kernels, auxiliary CPU "
            f"{auxiliary / steps / 1e3:.2f} ms, "
            f"{sum('DIFFERENT' in line for line in differences)} kernels unlike the table"]


if __name__ == "__main__":
    sys.exit(run_main(_run, sys.argv[1:]))
