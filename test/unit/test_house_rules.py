"""Rules of the house that no linter knows; see also `[tool.ruff]` in pyproject.toml.

Each rule is a function from one parsed file to sentences about it, so that a rule can be tried on a
sample that breaks it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
DEVICE_WORDS = (".cuda(", ".npu(", "torch.cuda", "torch_npu", "apex")
DEVICE_FILES = ("utils/device.py", "utils/ascend_versions.py", "layers/fused_ops.py")
NOT_OURS = {"weights", "runs", "logs", "results", "test/output", "test/quickstart"}
"""Folders that the programs write to."""

# What each part of the house may import from the others, by the longest name that fits a file's
# module. Types for annotations may come from anywhere, under TYPE_CHECKING.
GROUND = {"utils"}
NETWORK = {"yolact", "backbone", "layers", "data", "utils"}
ALLOWED_IMPORTS = {
    "utils": GROUND,
    "data": {"data", "layers.box_ops", "utils.errors", "utils.compat", "utils.cli", "utils.files",
             "utils.drawing", "utils.parsing", "utils.pixels"},
    "layers": {"layers", "utils.errors"},
    "backbone": {"layers", "utils.errors"},
    "yolact": {"backbone", "layers", "data.config", "utils.errors"},
    "utils.inference": NETWORK | {"utils.inference"},
    "utils.engine": NETWORK | {"utils.engine", "utils.inference"},
    "utils.export": NETWORK | {"utils.export", "utils.inference"},
    "eval": NETWORK | {"utils.inference"},
    "train": NETWORK | {"utils.engine", "utils.inference"},
}
ABOVE_THE_NETWORK = ("utils.engine", "utils.inference", "utils.export")
"""Parts of `utils` that nothing below them imports."""
OURS = ("utils", "data", "layers", "backbone", "yolact", "eval", "train")


class Source:
    """One parsed file of the project."""

    def __init__(self, path, text):
        self.path = path
        self.text = text
        self.tree = ast.parse(text, filename=path)
        self.is_test = path.startswith("test/")

    def complaint(self, node, sentence):
        line = node if isinstance(node, int) else node.lineno
        return f"{self.path}:{line}: {sentence}"


def project_files():
    for folder, folders, files in os.walk(str(ROOT)):
        folders[:] = sorted(name for name in folders if name[0] not in "._" and Path(
            folder, name).relative_to(ROOT).as_posix() not in NOT_OURS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name).relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def sources():
    found = [Source(path, (ROOT / path).read_text(encoding="utf-8")) for path in project_files()]
    assert len(found) > 20
    return found


def device_words_stay_in_their_files(source):
    if source.is_test or source.path in DEVICE_FILES:
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        for word in DEVICE_WORDS:
            if word in line:
                yield source.complaint(number, "'{}' belongs in {}".format(
                    word, " or ".join(DEVICE_FILES)))


PRINTING = (
    "utils/cli.py",       # reports the commands' errors
    "utils/engine/learner.py",  # says what it loaded
    "utils/engine/record.py",  # says where the records are
    "utils/engine/batch_size.py",  # says which batch size it chose
    "utils/engine/saving.py",  # says what it saved and where it goes on
    "utils/weights_folder.py",  # says which checkpoint is damaged
    "utils/distributed/failures.py",  # says why it ends a process that hangs
)


def only_commands_print(source):
    """Files with a `main` print; so do the few of `PRINTING`."""
    is_command = any(isinstance(node, ast.FunctionDef) and node.name == "main"
                     for node in source.tree.body)
    if source.is_test or is_command or source.path in PRINTING:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            yield source.complaint(node, "print outside a command; return or log instead")


def no_mutable_globals_and_hidden_names(source):
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield source.complaint(node, "global statement")
        if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names):
            yield source.complaint(node, "star import")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield source.complaint(node, "bare except")


def flags_do_not_use_type_bool(source):
    """`type=bool` reads the text 'False' as True."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and node.arg == "type" and (
                getattr(node.value, "id", "") == "bool"):
            yield source.complaint(node.value, "type=bool; use str2bool")


def last_line(node):
    return max(getattr(child, "lineno", 0) for child in ast.walk(node))


def files_and_functions_are_short(source):
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield source.complaint(1, f"{lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            length = last_line(node) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield source.complaint(node, f"{node.name} has {length} lines, at most "
                                             f"{MAX_FUNCTION_LINES}")


def annotations_are_not_evaluated(source):
    """New annotation syntax may then be written for Python 3.7 too."""
    if any(isinstance(node, ast.ImportFrom) and node.module == "__future__"
           for node in source.tree.body):
        return
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign))
           for node in source.tree.body):
        yield source.complaint(1, "from __future__ import annotations is missing")


def plain_ascii(source):
    for number, line in enumerate(source.text.splitlines(), 1):
        if any(ord(letter) > 126 for letter in line):
            yield source.complaint(number, "not plain ASCII")


def imported_modules(tree):
    """Yield (node, dotted name) for imports that run; those for type checkers do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node, name.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for name in node.names:
                yield node, f"{node.module}.{name.name}"
        else:
            yield from imported_modules(node)


def part_of(module, parts):
    """The longest of `parts` that `module` is or lies in; None where there is none."""
    fitting = [part for part in parts if (module + ".").startswith(part + ".")]
    return max(fitting, key=len, default=None)


def imports_point_one_way(source):
    part = part_of(source.path[:-len(".py")].replace("/", "."), ALLOWED_IMPORTS)
    if part is None:
        return
    allowed = ALLOWED_IMPORTS[part]
    for node, module in imported_modules(source.tree):
        if part_of(module, OURS) is None:
            continue
        above = part_of(module, ABOVE_THE_NETWORK)
        if part_of(module, allowed) is None or (above is not None and above not in allowed):
            yield source.complaint(node, f"{part} must not import {module}")


RULES = [device_words_stay_in_their_files, only_commands_print, no_mutable_globals_and_hidden_names,
         flags_do_not_use_type_bool, files_and_functions_are_short, annotations_are_not_evaluated,
         plain_ascii, imports_point_one_way]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps(rule, sources):
    complaints = [complaint for source in sources for complaint in rule(source)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule, path, text", [
    (device_words_stay_in_their_files, "data/x.py", "image = image.cuda()"),
    (only_commands_print, "layers/x.py", "def f():\n    print(1)"),
    (no_mutable_globals_and_hidden_names, "utils/x.py", "def f():\n    global g\n    g = 1"),
    (no_mutable_globals_and_hidden_names, "utils/x.py", "from math import *"),
    (no_mutable_globals_and_hidden_names, "utils/x.py", "try:\n    pass\nexcept:\n    pass"),
    (flags_do_not_use_type_bool, "train.py", "parser.add_argument('--x', type=bool)"),
    (files_and_functions_are_short, "utils/x.py", "\n" * MAX_FILE_LINES + "x = 1"),
    (files_and_functions_are_short, "utils/x.py", "def f():\n" + "    x = 1\n" * 60),
    (annotations_are_not_evaluated, "utils/x.py", "def f(x: int) -> int: ..."),
    (plain_ascii, "utils/x.py", "# caf\u00e9"),
    (imports_point_one_way, "layers/x.py", "from data.batch import Batch"),
    (imports_point_one_way, "utils/x.py", "import yolact"),
    (imports_point_one_way, "data/x.py", "from utils.device import select_device"),
    (imports_point_one_way, "yolact.py", "def f():\n    import train"),
    (imports_point_one_way, "utils/x.py", "from utils.inference import Predictor"),
    (imports_point_one_way, "utils/inference/x.py", "from utils.engine.setup import build"),
    (imports_point_one_way, "utils/inference/x.py", "from utils.export.run import decode"),
    (imports_point_one_way, "utils/exported.py", "from utils.export.run import decode"),
    (imports_point_one_way, "utils/engine/x.py", "import train"),
    (imports_point_one_way, "eval.py", "from utils.engine.setup import build"),
])
def test_a_rule_can_be_broken(rule, path, text):
    assert len(list(rule(Source(path, text)))) == 1


def test_types_may_be_imported_from_anywhere():
    text = "if TYPE_CHECKING:\n    from data.batch import Batch\nfrom utils.errors import UserError"
    assert list(imports_point_one_way(Source("layers/x.py", text))) == []


@pytest.mark.skipif(sys.version_info < (3, 8), reason="Python 3.7 parses as itself")
def test_syntax_of_python_37(sources):
    for source in sources:
        ast.parse(source.text, filename=source.path, feature_version=(3, 7))


_IMPORT = """
import time, threading
import torch
start, threads = time.process_time(), threading.active_count()
import train, eval, yolact
assert threading.active_count() == threads, "an import started a thread"
assert not torch.cuda.is_initialized(), "an import started the device"
assert not torch.distributed.is_initialized()
print(time.process_time() - start)
"""


def test_importing_the_programs_has_no_effect(tmp_path):
    """No output, no reading of arguments, no file, and little time beside PyTorch's own import."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", _IMPORT, "--no-such-flag"], cwd=str(tmp_path),
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                          universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert float(done.stdout) < 5
    assert list(tmp_path.iterdir()) == []


def test_every_public_address_is_stated():
    """Those of product code and of the scripts, by their host, each beside its file."""
    stated = (ROOT / "public_address_statement.md").read_text()
    files = [path for folder in ("", "data", "layers", "utils")
             for path in (ROOT.glob("*.py") if not folder else (ROOT / folder).rglob("*.py"))]
    for path in files + sorted((ROOT / "test").glob("*.sh")):
        text = path.read_text()
        for address in re.findall(r"https?://[\w.-]+|\b(?:gitcode|github)\.com/\w+/\w+", text):
            assert address in stated, address
            assert f"`{path.relative_to(ROOT).as_posix()}`" in stated, path


def test_requirements_with_digests_are_the_same():
    plain, hashed = ((ROOT / name).read_text(encoding="ascii") for name in (
        "requirements.txt", "requirements-hashed.txt"))
    named = set(re.findall(r"^([\w.-]+==[\w.]+)$", plain.lower(), re.MULTILINE))
    pinned = re.findall(r"^([\w.-]+==[\w.]+)[^\n]*\\\n((?:    --hash=sha256:\w{64}[ \\]*\n?)+)",
                        hashed, re.MULTILINE)
    assert len(named) == 8 and named <= {name for name, _ in pinned}
    lines = [line for line in hashed.splitlines() if line[0] not in "# "]
    assert len(pinned) == len(lines)  # none without a digest
