"""What every command shares: flags with helpful errors, exit codes for exceptions, signals and
standard streams that may be closed, full or without a reader.

Exit codes: 0 success, 1 a failure inside, 2 the user has to change something, 130 Ctrl-C, 143
SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
from types import FrameType
from typing import Any, Callable, Iterator, Mapping, NoReturn, Sequence, TextIO

from utils.distributed.failures import LAUNCHER_VARIABLE, die_with_parent
from utils.errors import UserError, nearest, one_line, printable
from utils.parsing import LARGEST, whole_number

EXIT_USER_ERROR = 2

CARD = "card"
"""Name of the accelerator that is there, whichever it is."""
_TRUE = ("true", "t", "yes", "y", "on", "1")
_FALSE = ("false", "f", "no", "n", "off", "0")


def str2bool(text: str) -> bool:
    """Read `True`, `true`, `1`, `yes`, `on` and their opposites; `ValueError` for anything else."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"expected True or False, found '{text}'")


def split_device(name: str) -> tuple[str, int | None]:
    """Kind of a device, and its number where the name has one: `cuda:1`; `0` is a card's."""
    kind, _, number = name.strip().lower().rpartition(":")
    index = whole_number(number)
    if index is not None:
        return kind or CARD, index
    return f"{kind}:{number}" if kind else number, None


def refuse_two_cards(name: str, index: int | None) -> None:
    """A `UserError` where --device and --device_id name different cards."""
    number = split_device(name)[1]
    if number is not None and index not in (None, number):
        raise UserError(f"--device={name} is card {number}, --device_id={index} another; give one "
                        "of them")


_EXPECTED = {int: "a whole number", float: "a number", str2bool: "True or False"}
"""What types of flags take, in words; others say it by their attribute `expected`."""


class Bounded:
    """Type of a flag that takes numbers from `minimum` to `LARGEST`: `type=Bounded(int, 1)`."""

    def __init__(self, kind: Callable[[str], float], minimum: float) -> None:
        self.kind, self.minimum = kind, minimum
        self.expected = f"{_EXPECTED[kind]} from {minimum:g} to {LARGEST}"

    def __call__(self, text: str) -> float:
        value = self.kind(text)
        if not self.minimum <= value <= LARGEST:  # NaN, too
            raise ValueError(text)
        return value


def add_switch(target: Any, *names: str, default: bool = False, **more: Any) -> argparse.Action:
    """Add a boolean flag to a parser or a group: `--name`, `--name=True`, `--name False` work."""
    return target.add_argument(*names, type=str2bool, nargs="?", const=True, default=default,
                               metavar="True|False", **more)


def add_device_flags(target: Any, *names: str) -> None:
    """Add what chooses the device to a parser or a group; `names` are those of the device itself.

    `utils.device.select_device` reads it.
    """
    target.add_argument(*names, "--device", default="auto", metavar="NAME",
                        help="auto (the first of npu, cuda and cpu that works), npu, cuda, cpu, or "
                             "a card: 0, npu:0, cuda:1")
    target.add_argument("--device_id", type=Bounded(int, 0), default=None, metavar="N",
                        help="index of the card on this host; default: that of the process among "
                             "those of the host")
    add_switch(target, "--cuda", default=True,
               help="False is the original's spelling of --device=cpu")


def add_npu_modes(target: Any) -> None:
    """Add the modes of an NPU that differ from what the tests run, `utils.device.NpuModes`."""
    add_switch(target, "--jit_compile",
               help="Ascend: compile operators for each shape, the 910A's own default; untested")
    add_switch(target, "--internal_format",
               help="Ascend: let convolutions keep their own layout, the 910A's own default; "
                    "untested")


def foreign_words(program: str) -> tuple[dict[str, str], dict[str, str]]:
    """Other tools' words, from foreign_flags.ini: with the flag of `program` that means the same,
    and with a sentence on what there is in place of theirs.
    """
    table = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    table.read(os.path.join(os.path.dirname(__file__), "foreign_flags.ini"), encoding="utf-8")
    same, instead = table[f"{program}: same"], table[f"{program}: instead"]
    return ({word: flag for flag, words in same.items() for word in words.split()},
            {word: " ".join(answer.split()) for words, answer in instead.items()
             for word in words.split()})


class _HelpFormatter(argparse.HelpFormatter):
    """Says the default of every flag whose sentence does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default is argparse.SUPPRESS or "default" in text:
            return text
        default = "none" if action.default in (None, "", []) else action.default
        return f"{text} (default: {default})"


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and name the nearest flag or choice.

    Flags cannot be abbreviated: a shortened name would change its meaning when a flag is added.
    Words of a flag may be joined by dashes; `same` and `instead` are `foreign_words`. Every error
    leaves with exit code 2 and nothing but `error: <sentence>` on stderr.
    """

    def __init__(self, *args: Any, same: Mapping[str, str] | None = None,
                 instead: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **kwargs)
        self._same, self._instead = dict(same or {}), dict(instead or {})

    def parse_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                   namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Parse all of `args`; what is left over is an error that names the nearest flag."""
        words = sys.argv[1:] if args is None else args
        for word in words:  # argparse would take `--` away and leave nothing
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word[:-len('=--')]} is '--', expected a value")
        parsed, left = self.parse_known_args([self._own_word(word) for word in words], namespace)
        if left:
            self.error(self._describe_leftover(left))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one sentence and leave with exit code 2."""
        self.exit(EXIT_USER_ERROR, f"error: {one_line(message)}\n")

    def _own_word(self, word: str) -> str:
        """A flag as it is declared here, with `~` in its value, which shells leave there, as the
        user's home; anything else as it is.
        """
        flag, equals, value = word.partition("=")
        value = re.sub("(?:(?<=:)|^)~(?=/|$)", lambda _: os.path.expanduser("~"), value)
        if flag.startswith("--") and flag not in self._option_string_actions:
            name = flag[2:].replace("-", "_")
            flag = self._same.get(name, f"--{name}")
        return flag + equals + value if flag in self._option_string_actions else word

    def _describe_leftover(self, left: list[str]) -> str:
        word = next((word for word in left if word.startswith("-")), left[0])
        flag = word.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if name in self._instead:
            return f"{flag} does not exist here: {self._instead[name]}"
        if not word.startswith("-"):
            own = self._own_word(f"--{word}")
            known = "=" in word and own.split("=", 1)[0] in self._option_string_actions
            return f"unexpected argument '{word}'; " + (
                f"did you mean {own}?" if known else "flags start with --")
        names = {known.lstrip("-"): known for known in self._option_string_actions}
        match = difflib.get_close_matches(name, [*names, *self._same], n=1, cutoff=0.65)
        if match:
            return (f"unknown flag {flag}; did you mean "
                    f"{names.get(match[0]) or self._same[match[0]]}?")
        return f"unknown flag {flag}; --help lists the known ones"

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            kind: Any = action.type
            expected = getattr(kind, "expected", _EXPECTED.get(kind))
            if expected is None:
                raise
            # Without an action argparse prints the sentence as it is.
            raise argparse.ArgumentError(None, f"{_flag_name(action)} is '{arg_string}', expected "
                                               f"{expected}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                None, f"{_flag_name(action)} is '{value}', expected one of {', '.join(choices)}"
                      f"{nearest(str(value), choices)}")


def _flag_name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.dest)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise `KeyboardInterrupt(number)` for the signals of a batch system and of a terminal that is
    gone: as after Ctrl-C, what the program has begun is finished first.

    A launcher's shell that dies without a word counts as one that has sent SIGTERM.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = {}
    if os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid()):
        die_with_parent(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored
                previous[number] = signal.signal(number, interrupt)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # of a program that was starting
            previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class LastingStream:
    """A text stream that outlives what it leads to: a reader that has gone, a disk that is full.

    No program loses its work because a line of text cannot be shown; the first that cannot is said
    on another stream. A disk is tried again with every line, a reader does not come back.
    """

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other
        self._said = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or say that it fails."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or say that it fails."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *given: str) -> None:
        try:
            action(*given)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            if not self._said:
                self._said = True
                with contextlib.suppress(OSError):
                    print(f"Warning: {self._name} cannot be written ({error.strerror}); the "
                          "program goes on", file=self._other, flush=True)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard streams that never raise: closed ones lead nowhere, failing ones are left alone."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would get its number, and others' words
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        if hasattr(stream, "reconfigure"):  # a terminal or log that does not take every letter
            stream.reconfigure(errors="backslashreplace")
    lasting: Any = (LastingStream(out, "stdout", err), LastingStream(err, "stderr", out))
    with contextlib.redirect_stdout(lasting[0]), contextlib.redirect_stderr(lasting[1]):
        try:
            yield
        finally:
            sys.stdout.flush()


def before_torch(parser: Callable[[], ArgumentParser] | None) -> None:
    """What train.py and eval.py do before they import PyTorch, which takes seconds; with the parser
    of a program that is not only imported, --help and mistakes in its flags are answered.
    """
    # utils.device imports the NPU's plugin where one is wanted, and says what is wrong with it.
    # Left to PyTorch, a plugin that finds no CANN ends `import torch`, on the CPU too.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # Threads that wait by spinning would take the cores from the loader's processes, and others'.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if parser is not None:
        with lasting_streams():
            parser().parse_args()


def run_main(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return the process's exit code.

    A `UserError` becomes `error: <sentence>` on stderr and 2, as a mistake in the flags does;
    Ctrl-C becomes 130, SIGTERM 143 and SIGHUP 129. Any other exception is a defect and keeps its
    traceback. `argv` defaults to the command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams(), signals_interrupt():
        try:
            return main(arguments) or 0
        except SystemExit as leave:  # argparse leaves this way, after --help too
            return leave.code if isinstance(leave.code, int) else 0
        except UserError as error:
            sys.stdout.flush()
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt as stop:
            sys.stdout.flush()
            print("interrupted", file=sys.stderr)
            return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def print_lines(lines: Sequence[str]) -> None:
    """Print at once, if there is anything; names in them can neither add lines nor drive a
    terminal.
    """
    if lines:
        print("\n".join(map(printable, lines)), flush=True)
