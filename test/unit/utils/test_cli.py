"""Flags, their errors and exit codes."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.paths import ROOT
from utils.cli import ArgumentParser, LastingStream, add_switch, print_lines, run_main, str2bool
from utils.errors import UserError


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="train.py")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", "--learning_rate", type=float, dest="lr")
    parser.add_argument("--start_iter", type=int, default=-1)
    parser.add_argument("--nms", choices=["fast", "cross_class", "traditional"], default="fast")
    add_switch(parser, "--cuda", default=True)
    add_switch(parser, "--no_log", default=False)
    return parser


def error_of(parser, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("text, value", [
    ("True", True), ("true", True), ("1", True), ("yes", True), ("on", True), (" TRUE ", True),
    ("False", False), ("false", False), ("0", False), ("no", False), ("off", False)])
def test_str2bool_reads_the_usual_words(text, value):
    assert str2bool(text) is value


@pytest.mark.parametrize("text", ["", "maybe", "2", "None"])
def test_str2bool_refuses_other_words(text):
    with pytest.raises(ValueError, match="expected True or False"):
        str2bool(text)


@pytest.mark.parametrize("argv, cuda, no_log", [
    ([], True, False),
    (["--cuda=False", "--no_log=True"], False, True),
    (["--cuda", "False", "--no_log"], False, True),
    (["--no_log", "--cuda=0"], False, True)])
def test_switches_accept_all_spellings(parser, argv, cuda, no_log):
    args = parser.parse_args(argv)
    assert (args.cuda, args.no_log) == (cuda, no_log)


def test_equals_sign_and_space_are_the_same(parser):
    assert parser.parse_args(["--batch_size=4", "--learning_rate=1e-3"]) == parser.parse_args(
        ["--batch_size", "4", "--lr", "1e-3"])
    assert parser.parse_args(["--start_iter", "-1"]).start_iter == -1


def test_unknown_flag_names_the_nearest(parser, capsys):
    message = "error: unknown flag --bach_size; did you mean --batch_size?\n"
    assert error_of(parser, ["--bach_size=4"], capsys) == message
    assert error_of(parser, ["--bach_size", "4"], capsys) == message


def test_unknown_flag_unlike_any_points_to_help(parser, capsys):
    assert error_of(parser, ["--xyzzy"], capsys) == (
        "error: unknown flag --xyzzy; --help lists the known ones\n")


def test_flags_cannot_be_abbreviated(parser, capsys):
    assert "unknown flag --batch; did you mean --batch_size?" in error_of(
        parser, ["--batch=4"], capsys)


def test_words_of_a_flag_may_be_joined_by_dashes(parser, capsys):
    assert parser.parse_args(["--batch-size=4", "--no-log"]) == parser.parse_args(
        ["--batch_size", "4", "--no_log"])
    assert "--batch-sise; did you mean --batch_size?" in error_of(
        parser, ["--batch-sise=4"], capsys)


def test_help_says_the_default_of_every_flag():
    parser = ArgumentParser(prog="x")
    parser.add_argument("--size", type=int, default=3, help="in pixels")
    parser.add_argument("--place", help="of the file")
    parser.add_argument("--kind", default="a", help="which; default: that of the file")
    text = " ".join(parser.format_help().split())
    assert "in pixels (default: 3)" in text and "of the file (default: none)" in text
    assert text.endswith("default: that of the file")


def test_stray_word_is_named(parser, capsys):
    assert "unexpected argument 'coco'" in error_of(parser, ["coco"], capsys)


@pytest.mark.parametrize("argv, sentence", [
    (["--batch_size=many"], "--batch_size is 'many', expected a whole number"),
    (["--batch_size", "1.5"], "--batch_size is '1.5', expected a whole number"),
    (["--lr=fast"], "--lr is 'fast', expected a number"),
    (["--cuda=maybe"], "--cuda is 'maybe', expected True or False"),
    (["--nms=fats"], "--nms is 'fats', expected one of fast, cross_class, traditional; "
                     "did you mean 'fast'?")])
def test_wrong_value_names_flag_value_and_what_was_expected(parser, argv, sentence, capsys):
    assert error_of(parser, argv, capsys) == f"error: {sentence}\n"


def test_missing_value_names_the_flag(parser, capsys):
    assert "--batch_size" in error_of(parser, ["--batch_size"], capsys)


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (1, 1)])
def test_run_main_returns_the_code(result, code):
    assert run_main(lambda argv: result, []) == code


def test_run_main_passes_arguments_on():
    seen = []
    run_main(lambda argv: seen.extend(argv) or 0, ("--a", "b"))
    assert seen == ["--a", "b"]


def test_run_main_turns_a_user_error_into_one_sentence(capsys):
    def main(argv):
        raise UserError("no such folder '/data/coco'")

    assert run_main(main, []) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no such folder '/data/coco'\n"
    assert captured.out == ""


def test_run_main_reports_an_interrupt():
    def main(argv):
        raise KeyboardInterrupt

    assert run_main(main, []) == 130


def test_run_main_leaves_defects_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main, [])


def test_a_terminal_that_knows_ascii_alone_gets_escapes(tmp_path):
    script = "import sys; from utils.cli import run_main; from utils.errors import UserError\n" \
             "def fail(argv):\n    print('caf\\u00e9')\n    raise UserError('class \\ud800')\n" \
             "sys.exit(run_main(fail, []))"
    done = subprocess.run([sys.executable, "-c", script], cwd=str(ROOT), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=dict(os.environ, PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stdout, done.stderr) == (
        2, b"caf\\xe9\n", b"error: class \\ud800\n")


def test_a_tilde_that_the_shell_leaves_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = ArgumentParser()
    parser.add_argument("--path")
    for word, expected in (("~/a:~/b", "/home/me/a:/home/me/b"), ("~", "/home/me"),
                           ("a~/b", "a~/b"), ("~you/b", "~you/b")):
        assert parser.parse_args(["--path=" + word]).path == expected


def test_names_neither_add_lines_nor_drive_a_terminal(capsys):
    print_lines(["class \x1b[2J\nError : none", "\u88c2\u7f1d caf\u00e9"])
    assert capsys.readouterr().out == (
        "class \\x1b[2J\\nError : none\n\u88c2\u7f1d caf\u00e9\n")


class Broken:
    """A stream that fails with an error of the system."""

    def __init__(self, number, descriptor=None):
        self.number, self.descriptor, self.writes = number, descriptor, 0

    def write(self, text):
        self.writes += 1
        raise OSError(self.number, os.strerror(self.number))

    flush = write = write

    def fileno(self):
        return self.descriptor


def test_a_full_disk_is_said_once_and_tried_again():
    broken, other = Broken(errno.ENOSPC), io.StringIO()
    stream = LastingStream(broken, "stdout", other)
    for _ in range(3):
        print("line", file=stream)
    assert other.getvalue() == ("Warning: stdout cannot be written (No space left on device); the "
                                "program goes on\n")
    assert broken.writes == 6


def test_what_no_reader_takes_leads_nowhere(tmp_path):
    with open(str(tmp_path / "pipe"), "w") as file:
        stream = LastingStream(Broken(errno.EPIPE, file.fileno()), "stdout", Broken(errno.EPIPE))
        stream.write("line")
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == os.devnull
        assert stream.descriptor == file.fileno()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                          (signal.SIGINT, 130)])
def test_signals_end_a_program_as_ctrl_c_does(capsys, number, code):
    finished = []

    def program(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            finished.append(True)

    before = signal.getsignal(number)
    assert run_main(program, []) == code
    assert finished and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) == before


def test_a_launcher_s_shell_that_is_killed_ends_the_program_in_order(tmp_path):
    script = ("import time; from pathlib import Path; from utils.cli import run_main\n"
              "def main(argv):\n    try:\n        Path('started').touch(); time.sleep(1000)\n"
              "    finally:\n        Path('ended').touch()\nrun_main(main, [])")
    shell = subprocess.Popen(
        ["bash", "-c", 'export LAUNCHER_PID=$$; "$0" -c "$1" & wait', sys.executable, script],
        cwd=str(tmp_path), env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.DEVNULL)
    for name in ("started", "ended"):
        deadline = time.time() + 20
        while not (tmp_path / name).exists():
            assert time.time() < deadline
            time.sleep(0.05)
        shell.kill()
        shell.wait()


@pytest.mark.parametrize("command, code", [
    ("train.py --help", 0), ("train.py --max_iter=x", 2), ("eval.py --help", 0),
    ("eval.py --wieghts=a.pth", 2), ("-m data.check --help", 0), ("-m data.convert voc --help", 0),
    ("-m data.shapes --wrong", 2), ("-m utils.convert_weights --help", 0),
    ("-m utils.report --wrong", 2), ("-m utils.export --help", 0),
    ("-m utils.export a.pth --out=b --opset=x", 2)])
def test_help_and_mistakes_in_flags_do_not_wait_for_torch(command, code):
    done = subprocess.run([sys.executable, "-X", "importtime", *command.split()], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
                if line.startswith("import time:")}
    assert done.returncode == code
    slow = {"torch", "matplotlib"} if command.startswith("-m") else {"torch", "numpy", "cv2"}
    assert "argparse" in imported and not imported & slow
    assert done.stdout.startswith("usage:") if code == 0 else "error: " in done.stderr


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_an_interrupt_while_the_program_is_imported_shows_no_traceback(program):
    process = subprocess.Popen(
        [sys.executable, "-v", program, "--trained_model=nowhere"], cwd=str(ROOT),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    for line in process.stderr:  # -v tells of every module
        if "'torch.nn'" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[1]
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in rest
