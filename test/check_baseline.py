"""Compare a run with a published result: `python test/check_baseline.py test/output/0/*.log`.

Reads what the launchers leave behind: train_0.log (training, then the table of average precisions),
eval_0.log and the case file. Only a run like the published one can be compared: same recipe, cards,
batch, iterations, classes, input and number of images; whatever differs is named.

Exit codes: 0 the run reaches the baseline, within its tolerance; 1 it stays below; 2 the logs hold
no such number, or the run cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence
from xml.etree import ElementTree

BASELINES = Path(__file__).resolve().parent / "baseline.json"
PASSED, BELOW, UNKNOWN = 0, 1, 2

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_VALUES = {
    "box mAP": (r"^ *box \| *" + _NUMBER + r" *\|", r"^TrainAccuracy = box mAP: *" + _NUMBER),
    "mask mAP": (r"^ *mask \| *" + _NUMBER + r" *\|", r"^TrainAccuracy = .*mask mAP: *" + _NUMBER),
    "FPS": (r"\|\| avg_fps: *" + _NUMBER + r" \|\| GPU: 0$", r"^ActualFPS = " + _NUMBER),
}
_RUN = {
    "config": (r"^(\w+): [0-9]+ classes, [0-9]+ parameters, input",),
    "classes": (r"^\w+: ([0-9]+) classes, [0-9]+ parameters, input",),
    "input": (r"^\w+: [0-9]+ classes, [0-9]+ parameters, input ([0-9]+) x",),
    "images": (r"^([0-9]+) images, batch [0-9]+ x",),
    "batch": (r"^[0-9]+ images, batch ([0-9]+) x", r"^BatchSize = ([0-9]+)$"),
    "cards": (r"^[0-9]+ images, batch [0-9]+ x ([0-9]+) card", r"^RankSize = ([0-9]+)$"),
    "evaluated": (r"^\S+\.\w+: ([0-9]+) images of ",),
}
_LAST_STEP = r"^\[ *[0-9]+\] +([0-9]+) \|\| "


class Row(NamedTuple):
    """One compared number; `found` is None where the logs do not hold it."""

    name: str
    expected: float
    tolerance: float
    found: Optional[float]

    @property
    def verdict(self) -> str:
        """`ok`, `below` or `missing`."""
        if self.found is None:
            return "missing"
        # Published numbers have two decimals; half of the last one is no difference.
        return "ok" if self.found >= self.expected - self.tolerance - 0.005 else "below"


def last_match(patterns: Sequence[str], text: str) -> Optional[str]:
    """Last match of the first pattern that matches at all."""
    for pattern in patterns:
        found = re.findall(pattern, text, re.M)
        if found:
            return found[-1]
    return None


def read_run(text: str) -> Dict[str, Any]:
    """What the logs say of the run; what they do not say is left out."""
    run: Dict[str, Any] = {}
    for name, patterns in _RUN.items():
        value = last_match(patterns, text)
        if value is not None:
            run[name] = int(value) if value.isdigit() else value
    steps = last_match((_LAST_STEP,), text)
    if steps is not None:
        run["iterations"] = int(steps)
    return run


def differences(run: Dict[str, Any], expected: Dict[str, Any]) -> List[str]:
    """Sentences on what makes the run another one than the published."""
    found = []
    for name, value in expected.items():
        if name not in run:
            found.append(f"the logs do not say its {name} (published: {value})")
        elif run[name] not in (value if isinstance(value, list) else [value]):
            found.append(f"{name} is {run[name]}, published is {value}")
    return found


def compare(text: str, baseline: Dict[str, Any], only: Optional[Sequence[str]]) -> List[Row]:
    """A row for each number of the baseline, or for those named in `only`."""
    rows = []
    for name, expected in baseline["values"].items():
        if only is None or name in only:
            found = last_match(_VALUES[name], text)
            rows.append(Row(name, expected, baseline["tolerance"][name],
                            None if found is None else float(found)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The comparison for people."""
    lines = ["{:10s} {:>9s} {:>10s} {:>9s}  {}".format(
        "", "baseline", "tolerance", "this run", "")]
    for row in rows:
        lines.append("{:10s} {:9.2f} {:10.2f} {:>9s}  {}".format(
            row.name, row.expected, row.tolerance,
            "-" if row.found is None else f"{row.found:.2f}", row.verdict))
    return "\n".join(lines)


def junit(name: str, rows: Sequence[Row], reasons: Sequence[str]) -> bytes:
    """JUnit XML: a test case for comparability and one for each number."""
    suite = ElementTree.Element("testsuite", {
        "name": "baseline " + name, "tests": str(len(rows) + 1),
        "failures": str(sum(row.verdict == "below" for row in rows)),
        "errors": str(sum(row.verdict == "missing" for row in rows) + bool(reasons))})
    case = ElementTree.SubElement(suite, "testcase", classname=name, name="comparable")
    if reasons:
        ElementTree.SubElement(case, "error", message="; ".join(reasons))
    for row in rows:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=row.name)
        message = (f"{row.name}: baseline {row.expected}, tolerance {row.tolerance}, this run "
                   f"{row.found}")
        if row.verdict != "ok":
            kind = "failure" if row.verdict == "below" else "error"
            ElementTree.SubElement(case, kind, message=message)
    return ElementTree.tostring(suite, encoding="utf-8")


def check(args: argparse.Namespace) -> int:
    """Compare, print, write; returns the exit code."""
    baselines = json.loads(BASELINES.read_text(encoding="utf-8"))
    if args.baseline not in baselines:
        print("error: no baseline '{}'; known: {}".format(args.baseline, ", ".join(baselines)),
              file=sys.stderr)
        return UNKNOWN
    baseline = baselines[args.baseline]
    try:
        text = "\n".join(Path(path).read_text(encoding="utf-8", errors="replace")
                         for path in args.logs)
    except OSError as error:
        print(f"error: cannot read '{error.filename}': {error.strerror}",
              file=sys.stderr)
        return UNKNOWN
    rows = compare(text, baseline, args.only)
    reasons = differences(read_run(text), baseline["run"])
    print("{}: {}\n{}".format(args.baseline, baseline["title"], table(rows)))
    if reasons:
        print("Not comparable: " + "; ".join(reasons))
    if args.junit:
        Path(args.junit).write_bytes(junit(args.baseline, rows, reasons))
    verdicts = {row.verdict for row in rows}
    if (reasons and not args.any_run) or "missing" in verdicts or not rows:
        return UNKNOWN
    return BELOW if "below" in verdicts else PASSED


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        prog="check_baseline.py", description="Compare a run's logs with a published result.",
        epilog="Exit codes: 0 reached; 1 below; 2 not in the logs, or not comparable.")
    parser.add_argument("logs", nargs="+", metavar="LOG", help="test/output/0/*.log of one run")
    parser.add_argument("--baseline", default="full_8p", help="entry of test/baseline.json")
    parser.add_argument("--only", action="append", choices=sorted(_VALUES),
                        help="compare this number only; may be given several times")
    parser.add_argument("--junit", metavar="FILE", help="write the result as JUnit XML")
    parser.add_argument("--any_run", action="store_true",
                        help="compare although the run is another one; it still says so")
    return check(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
