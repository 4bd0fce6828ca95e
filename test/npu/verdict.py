"""Print what the summary of a field report says to set, on one page.

    python test/npu/verdict.py SUMMARY

SUMMARY has a line for each part of `test/npu/field_report.sh`. Parts that measured a speed are held
against `speed_1p`, the settings as they are; each changes one thing, so what several do together is
not known.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.errors import UserError  # noqa: E402

NOISE = 0.03
"""Share of the speed below which two runs are not told apart."""
SPEED = re.compile(r"Final Performance images/sec : (\d+\.?\d*)")


class Setting(NamedTuple):
    """One thing that a part of the report changed."""

    flag: str
    caution: str = ""
    """What to know before it is set."""


SETTINGS = {
    "graph": Setting("--device_graph", "the same numbers to the bit, emulated"),
    "O1": Setting("--opt_level=O1", "half precision: compare the losses of a run"),
    "O2": Setting("--opt_level=O2", "half precision: compare the losses of a run"),
    "fused_loss": Setting("--fused_loss", "equal but for rounding"),
    "batch_1": Setting("--batch_size=1"),
    "batch_4": Setting("--batch_size=4"),
    "batch_auto": Setting("--batch_size=auto", "the learning rate follows the batch"),
    "internal_format": Setting("--internal_format", "nothing has been tested with it"),
    "jit_compile": Setting("--jit_compile", "nothing has been tested with it"),
}
TESTED = ("graph", "fused_loss", "O1")
"""What may be advised, the safest first; of two precisions the one with float32 weights."""


def lines_of(summary: str) -> Dict[str, str]:
    """What each part came to, by its name."""
    return {name: text.strip() for name, text in
            re.findall(r"^(\w+): +(.*)$", summary, re.MULTILINE)}


def speed_of(text: Optional[str]) -> Optional[float]:
    """Images a second; None where the part failed, was refused or was left out."""
    found = SPEED.search(text or "")
    return float(found.group(1)) if found and "FAILED" not in str(text) else None


def verdict(summary: str) -> List[str]:
    """The page.

    Raises:
        UserError: the summary has no speed of one card to compare with.
    """
    parts = lines_of(summary)
    base = speed_of(parts.get("speed_1p"))
    if not base:
        raise UserError("there is no speed of one card (part speed_1p), so nothing can be "
                        "compared; see that part")
    lines = ["EMULATED: these speeds say nothing of a card."] * ("EMULATED" in summary)
    lines += [f"As it is set now: {base:g} images/s on one card.", ""]
    advised = []
    for name, setting in SETTINGS.items():
        if name not in parts:
            continue
        speed = speed_of(parts[name])
        if speed is None:
            lines.append(f"  {setting.flag:<20} not measured: {parts[name][:100]}")
            continue
        gain = speed / base - 1
        judged = "no difference" if abs(gain) < NOISE else "faster" if gain > 0 else "slower"
        lost = "ActualLoss = nan" in parts[name]
        caution = f"; {setting.caution}" if setting.caution and gain >= NOISE else ""
        caution += "; its last loss is not finite" * lost
        lines.append(f"  {setting.flag:<20} {speed:g} images/s ({100 * gain:+.0f} %): "
                     f"{judged}{caution}")
        if name in TESTED and gain >= NOISE and not lost:
            advised.append(setting.flag)
    lines += ["", "Set: " + (" ".join(sorted(advised)) + " (each measured alone)" if advised else
                             "nothing; the defaults are as fast as what was tried")]
    lines += [f"Look at: {name}: {text[:120]}" for name, text in parts.items()
              if "FAILED" in text or name == "profile" and _is_notable(text)]
    return lines


def _is_notable(profile: str) -> bool:
    """Whether a step leaves much to the auxiliary CPU or to nobody, or is unlike the table."""
    idle = re.search(r"(\d+) % between kernels", profile)
    unlike = re.search(r"(\d+) kernels unlike", profile)
    auxiliary = re.search(r"auxiliary CPU ([\d.]+) ms", profile)
    return bool((idle and int(idle.group(1)) > 20) or (unlike and int(unlike.group(1)))
                or (auxiliary and float(auxiliary.group(1)) > 1))


def _run(argv: List[str]) -> int:
    parser = ArgumentParser(prog="verdict.py", description=__doc__.splitlines()[0])
    parser.add_argument("summary")
    path = parser.parse_args(argv).summary
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    print("\n".join(verdict(text)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(_run, sys.argv[1:]))
