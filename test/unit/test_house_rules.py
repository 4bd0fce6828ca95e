"""Rules of the house that no linter knows; see also `[tool.ruff]` in pyproject.toml.

Each rule is a function from one parsed file to sentences about it, so that a rule can be tried on a
sample that breaks it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
DEVICE_WORDS = (".cuda(", ".npu(", "torch.cuda", "torch_npu", "apex")
DEVICE_FILES = ("utils/device.py", "layers/fused_ops.py")
NOT_OURS = ("weights", "runs", "logs", "results", "output", "quickstart", "__pycache__")

# What each part of the house may import from the others. `utils.errors` is open to all; types for
# annotations may come from anywhere, under TYPE_CHECKING.
ALLOWED_IMPORTS = {
    "utils": {"utils"},
    # data.shapes, data.convert and data.check are commands, too.
    "data": {"data", "utils.compat", "utils.cli", "utils.files", "utils.drawing",
             "utils.loader_worker"},
    "layers": {"layers"},
    "backbone": {"layers"},
    "yolact": {"backbone", "layers", "data.config"},
    "eval": {"yolact", "backbone", "layers", "data", "utils"},
    "training": {"training", "yolact", "backbone", "layers", "data", "utils"},
    "train": {"training", "eval", "yolact", "backbone", "layers", "data", "utils"},
}
OURS = tuple(ALLOWED_IMPORTS)

# The public face for programs: its place is fixed by its name, and it stands above the network. No
# other module of utils imports it.
FACADE = "utils/predictor.py"
FACADE_MODULE = "utils.predictor"


class Source:
    """One parsed file of the project."""

    def __init__(self, path, text):
        self.path = path
        self.text = text
        self.tree = ast.parse(text, filename=path)
        self.is_test = path.startswith("test/")

    def complaint(self, node, sentence):
        line = node if isinstance(node, int) else node.lineno
        return "{}:{}: {}".format(self.path, line, sentence)


def project_files():
    for folder, folders, files in os.walk(str(ROOT)):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and name not in NOT_OURS)
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
    "training/run.py",    # says what it loaded
    "training/saving.py",  # says what it saved and where it goes on
    "utils/distributed/watchdog.py",  # says why it ends a process that hangs
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
        yield source.complaint(1, "{} lines, at most {}".format(lines, MAX_FILE_LINES))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            length = last_line(node) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield source.complaint(node, "{} has {} lines, at most {}".format(
                    node.name, length, MAX_FUNCTION_LINES))


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
                yield node, "{}.{}".format(node.module, name.name)
        else:
            yield from imported_modules(node)


def imports_point_one_way(source):
    part = source.path[:-len(".py")].split("/")[0]
    if part not in ALLOWED_IMPORTS:
        return
    allowed = ALLOWED_IMPORTS[part] | {"utils.errors"}
    if source.path == FACADE:
        allowed = ALLOWED_IMPORTS["eval"]
    for node, module in imported_modules(source.tree):
        if part not in ("eval", "train") and (module + ".").startswith(FACADE_MODULE + "."):
            yield source.complaint(node, "{} is for programs, not for {}".format(
                FACADE_MODULE, part))
        elif module.split(".")[0] in OURS and not any(
                module == name or module.startswith(name + ".") for name in allowed):
            yield source.complaint(node, "{} must not import {}".format(part, module))


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
    (imports_point_one_way, "utils/x.py", "from utils.predictor import Predictor"),
    (imports_point_one_way, FACADE, "import train"),
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
