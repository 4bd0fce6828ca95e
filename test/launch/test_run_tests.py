"""The test runner's own arguments; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from helpers.paths import ROOT

FILES = ("test/run_tests.sh", "requirements.txt", "1.5_requirements.txt", "1.8_requirements.txt",
         "requirements-dev.txt")


@pytest.fixture
def run(tmp_path):
    """Run a copy of the runner where no Python can be found."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(str(ROOT / name), str(tmp_path / name))
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "sed"):
        os.symlink(shutil.which(tool), str(tools / tool))
    env = {"PATH": str(tools), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "none")}

    def start(*arguments):
        return subprocess.run(["bash", "test/run_tests.sh"] + list(arguments), cwd=str(tmp_path),
                              env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=60)

    return start


@pytest.mark.parametrize("version", ["1.5", "1.8"])
def test_without_python_37_one_line_says_so(run, version):
    sentence = f"torch {version} is not tested here: it needs Python 3.7, which was not found\n"
    done = run("--torch", version, "--if-available")
    assert (done.returncode, done.stdout, done.stderr) == (0, sentence, "")
    done = run("--torch=" + version)
    assert (done.returncode, done.stdout) == (2, sentence)


def test_without_a_recent_python_it_fails_even_if_available_was_said(run):
    done = run("--if-available")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr


def test_unknown_torch_lists_the_known(run):
    done = run("--torch", "1.7")
    assert done.returncode == 2
    assert done.stderr == "error: --torch is '1.7', expected 2.13, 1.8 or 1.5\n"


def test_help(run):
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Install what the tests need")
