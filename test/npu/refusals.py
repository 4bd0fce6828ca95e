"""Pytest plugin: a run on the emulator fails if any process reported an operator error.

torch_npu queues its operators: after the first one that fails, a process works with garbage and may
still pass its tests. So the emulator writes every error to a file, and the run fails if it is not
empty at the end.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import List

import pytest

LOG = "NPUEMU_LOG"


class Refusals:
    """Collects the emulator's error lines of this run, those of child processes included."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="npuemu-")
        self.path = Path(self._folder.name) / "errors"
        os.environ[LOG] = str(self.path)  # read by all processes that are started from here

    @property
    def lines(self) -> List[str]:
        """What was reported so far."""
        return self.path.read_text().splitlines() if self.path.exists() else []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run."""
        if self.lines:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was missing, and where."""
        if self.lines:
            terminalreporter.section("errors of the NPU emulator: the run fails", red=True)
            for line in self.lines:
                terminalreporter.line(line)
