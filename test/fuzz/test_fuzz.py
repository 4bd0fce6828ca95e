"""A short run of the fuzzer, and inputs that once ended otherwise than right or in a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from data.tools.conversion import Conversion
from data.tools.yolo import read_yolo
from fuzz import fuzz
from fuzz.inputs import KINDS
from helpers.paths import ROOT
from utils.cli import ArgumentParser, run_main
from utils.errors import UserError
from utils.parsing import parse_yaml

ROUNDS = 6


def test_a_few_inputs_of_every_kind():
    done = subprocess.run(
        [sys.executable, str(ROOT / "test" / "fuzz" / "fuzz.py"), f"--rounds={ROUNDS}"],
        env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("{") == len(KINDS) and "BAD" not in done.stdout


def run_for_ever():
    while True:
        pass


@pytest.mark.parametrize("command, outcome", [
    (lambda: 0, "right"),
    (lambda: {}["key"], "BAD traceback: KeyError: 'key'"), (run_for_ever, "BAD hang"),
    (lambda: os.mkdir("executed"), "BAD executed"), (lambda: 3, "BAD exit code 3"),
    (lambda: os.remove("keep/user.txt"), "BAD files"), (lambda: 2, "BAD exit code 2")])
def test_bad_outcomes_are_noticed(tmp_path, monkeypatch, command, outcome):
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setitem(fuzz.KINDS, "planted", lambda rng: (lambda argv: command(), []))
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.2)
    before = signal.signal(signal.SIGPROF, fuzz.too_long)
    try:
        assert fuzz.attempt("planted", 0).startswith(outcome)
    finally:
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("text", [
    "names: !!timestamp x", "names: " + "[" * 3000, "names: [" + "a, " * 200000 + "]"])
def test_yaml_that_its_reader_stumbles_over(text):
    with pytest.raises(UserError, match="^a.yaml: "):
        parse_yaml(text, "a.yaml")


BOMB = "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))


@pytest.mark.parametrize("text", [
    BOMB + "train: *a11\nnames: [a]", BOMB + "train: images\nnames: *a11",
    "train: " + "x" * 5000 + "\nnames: [a]", "train: images\nnames: {0: {1: 2}}"])
def test_descriptions_of_yolo_that_explode(tmp_path, text):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_yolo(tmp_path, Conversion())
    assert len(str(error.value)) < 11000


@pytest.mark.parametrize("value, said", [
    ("a\nb\x1b[2J", r"a\nb\x1b[2J"), ("\u732b", "\u732b"), ("9" * 5000, "99 ... 99"), ("--", "--")])
def test_an_error_is_one_line_whatever_was_given(capsys, value, said):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--n", type=int)
    assert run_main(lambda argv: parser.parse_args(argv) is None, [f"--n={value}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert said in message and len(message) < 2100
