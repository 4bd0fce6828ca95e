"""What the documents tell people to type: found in the text, and made small enough to run."""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Optional, Tuple

from helpers.paths import ROOT

SMALL = ("--config=yolact_shapes --max_iter=2 --batch_size=2 --no_autoscale --num_workers=0 "
         "--backbone_weights=none --node_device=cpu")
"""Added to whatever trains. The last of two equal flags counts."""

OWN_WEIGHTS = "weights/yolact_shapes_0_2.pth"
"""Of the recipe in `SMALL`; in training it stands for the weights that a document names."""

SHRINK: Tuple[Tuple[str, str], ...] = (
    (r"^(.*bash test/train_(?:full|performance|finetune)_.*)$", r"\1 " + SMALL),
    (r"^(python train\.py --resume.*)$", r"\1 --max_iter=40"),
    (r"^(python train\.py (?!--resume).*)$", r"\1 " + SMALL),
    (r"^(?!NPROC=)(.*bash test/train_\w+_8p\.sh)", r"NPROC=2 \1"),
    (r"(--(?:weights|pth_path)=)weights/yolact_base_54_800000\.pth(?=.*--max_iter)",
     r"\1" + OWN_WEIGHTS),
    (r"(python test/benchmark/bench_loader\.py .*)$", r"\1 --epochs=1 --repeats=1"),
    (r"^(python -m utils\.export )weights/\S+\.pth", r"\1" + OWN_WEIGHTS),
    (r"(python test/benchmark/bench_export\.py).*$", r"\1 --config=yolact_shapes --rounds=1"),
    (r"(python test/benchmark/bench_eval\.py .*)$", r"\1 --images=1"),
    (r"(python test/benchmark/run\.py .*)$", r"\1 --config=yolact_shapes --rounds=1 --images=1"),
)
"""Pattern and replacement, applied to a command one after the other."""

MAY_EXIT_WITH: Dict[str, Tuple[int, ...]] = {
    "python test/check_baseline.py": (1, 2),  # below the baseline, or not to be compared with it
}

ELSEWHERE: Dict[str, str] = {
    "bash .ci/run": ".ci/run",
    "bash test/run_tests.sh": "test/launch/test_run_tests.py",
    "NPUEMU_SOC=Ascend910A bash test/run_tests.sh": ".ci/run",
    "bash test/quickstart.sh": "test/launch/test_quickstart.py",
    "bash test/npu/field_report.sh": "test/npu/test_field_report.py",
    "python test/npu/audit.py": "test/npu/test_npu_audit.py",
    "python test/fuzz/fuzz.py": "test/fuzz/test_fuzz.py",
    "environment=$(bash test/npu/make_env.sh)": "test/run_tests.sh",
    '"$PYTHON" -m pytest --device npu': "test/run_tests.sh",
    '"$PYTHON" test/npu/emulator/build.py': "test/npu/make_env.sh",
    "python -m pytest --slow": "test/run_tests.sh",
    "bash test/infer_om.sh": "test/launch/test_infer_om.py",
    "python -m utils.export.offline": "test/launch/test_infer_om.py",
    "python test/check_baseline.py test/output/0/YOLACT_bs1": "test/launch/test_infer_om.py",
    "NNODES=2": "test/launch/test_launchers_ranks.py",
}
"""Start of a command, and what else runs it on every change."""

NOT_HERE: Dict[str, str] = {
    "--video=0": "needs a camera",
    "pip install": "changes the Python that runs it; test/run_tests.sh installs the same files",
    "source /usr/local/Ascend": "needs CANN",
    "source .venv/": "test/quickstart.sh makes that environment",
    "bash om/atc.sh": "needs CANN",
    "python3 -m ais_bench": "needs an Ascend card",
    "docker run": "needs a container host",
}
"""Part of a command, and why no test runs it."""


IN_LINE = re.compile(
    r"`((?:[A-Z_]+=\S+ )*(?:bash|python(?! -m [\w.]+`)|pip|source|docker|head) [^`]+)`")
"""A command between backquotes; a module's name alone is none."""


class Command(NamedTuple):
    """Something to type."""

    document: str
    section: str
    """Heading that it stands below."""
    text: str
    """As in the document, continued lines as one, without the comment behind it."""

    @property
    def elsewhere(self) -> Optional[str]:
        """The file that runs it, where no test of the documents does."""
        return next((path for start, path in ELSEWHERE.items() if self.text.startswith(start)),
                    None)

    @property
    def impossible(self) -> Optional[str]:
        """Why it cannot be run here."""
        return next((why for part, why in NOT_HERE.items() if part in self.text), None)

    def shrunk(self) -> str:
        """The command with sizes that a test can afford."""
        text = self.text
        for pattern, replacement in SHRINK:
            text = re.sub(pattern, replacement, text)
        return text

    def exit_codes(self) -> Tuple[int, ...]:
        """Those that are no failure."""
        return (0,) + next((codes for start, codes in MAY_EXIT_WITH.items()
                            if self.text.startswith(start)), ())


def documents() -> List[str]:
    """Paths of all documents below the project's root, translations left out."""
    return [str(path.relative_to(ROOT))
            for path in [ROOT / "README.md"] + sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> List[str]:
    """Contents of a document's fenced blocks of one language."""
    return re.findall(rf"(?sm)^```{language}\n(.*?)^```", text)


def commands(document: str) -> List[Command]:
    """Every command of a document, in order: lines of bash blocks, and those within a line."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found, section = [], ""
    for part in re.split(r"(?sm)^(```\w*\n.*?^```$|## .*?$)", text):
        lines: List[str] = []
        if part.startswith("## "):
            section = part[3:]
        elif part.startswith("```bash\n"):
            lines = part[len("```bash\n"):-len("```")].replace("\\\n", " ").splitlines()
            lines = [re.sub(r" +", " ", line.split("  #")[0]).strip() for line in lines]
        elif not part.startswith("```"):
            lines = [code.replace("\n", " ").replace("\\|", "|") for code in IN_LINE.findall(part)]
        found += [Command(document, section, line) for line in lines
                  if line and not line.startswith("#")]
    return list(dict.fromkeys(found))
