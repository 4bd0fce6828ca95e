"""The environment that the launchers source: on hosts of different ages, and without CANN."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import ROOT

COMMON = {"ASCEND_SLOG_PRINT_TO_STDOUT": "0", "ASCEND_GLOBAL_LOG_LEVEL": "3",
          "ASCEND_GLOBAL_EVENT_ENABLE": "0", "TASK_QUEUE_ENABLE": "1", "COMBINED_ENABLE": "0",
          "HCCL_WHITELIST_DISABLE": "1", "HCCL_CONNECT_TIMEOUT": "1800"}
ONLY_1 = {"PTCOPY_ENABLE": "1", "DYNAMIC_OP": "ADD#MUL"}
OURS = tuple(COMMON) + tuple(ONLY_1) + ("HCCL_IF_IP", "CANN_SOURCED")


class Host:
    """A CANN in a folder, cards and the driver's tool; all of them files."""

    def __init__(self, folder):
        self.folder = folder
        self.cann = folder / "Ascend"
        self.tools = folder / "bin"
        self.dev = folder / "dev"
        for path in (self.cann, self.tools, self.dev):
            path.mkdir()

    def install(self, name, version=None):
        (self.cann / name).mkdir()
        (self.cann / name / "set_env.sh").write_text(f"export CANN_SOURCED={name}\n")
        if version is not None:
            info = self.cann / name / "latest" / "aarch64-linux" / "ascend_toolkit_install.info"
            info.parent.mkdir(parents=True)
            info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\narch=aarch64\n")

    def add_tool(self, cards):
        tool = self.tools / "msnpureport"
        line = f'printf "%s\\n" "$*" >> {self.folder}/calls'
        tool.write_text("#!/bin/bash\n" + line + "\nexit 1\n")
        tool.chmod(0o755)
        for name in [f"davinci{card}" for card in cards] + ["davinci_manager"]:
            (self.dev / name).write_text("")

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def source(self, **given):
        """The variables after sourcing, and everything that was printed."""
        env = {key: value for key, value in os.environ.items() if key not in OURS}
        env.update(given, CANN_INSTALL_PATH=str(self.cann), NPU_DEV=str(self.dev),
                   PATH="{}:{}".format(self.tools, env["PATH"]))
        script = "set -e; source test/env_npu.sh; declare -F | grep npu_ >&2 || true; env"
        done = subprocess.run(
            ["bash", "-c", script], cwd=str(ROOT), env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        return {name: found[name] for name in OURS if name in found}


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_without_cann_nothing_is_set(host):
    host.add_tool([0])
    assert host.source() == {}
    assert host.calls() == []


@pytest.mark.parametrize("name, version", [("ascend-toolkit", "8.5.0"), ("cann", "9.1.0"),
                                           ("nnae", "7.0.RC1")])
def test_today_s_cann(host, name, version):
    host.install(name, version)
    found = host.source()
    found.pop("HCCL_IF_IP", None)  # a host without a network has none
    assert found == dict(COMMON, CANN_SOURCED=name)


@pytest.mark.parametrize("version", ["5.0.2", "5.1.RC2", "6.0.1", "6.3.RC2", None])
def test_the_cann_of_pytorch_1(host, version):
    host.install("ascend-toolkit", version)
    found = host.source()
    found.pop("HCCL_IF_IP", None)
    assert found == dict(COMMON, CANN_SOURCED="ascend-toolkit", **ONLY_1)


def test_what_is_set_already_stays(host):
    host.install("ascend-toolkit", "6.0.1")
    given = {"TASK_QUEUE_ENABLE": "2", "HCCL_CONNECT_TIMEOUT": "7200", "HCCL_IF_IP": "10.0.0.7",
             "DYNAMIC_OP": "ADD", "ASCEND_GLOBAL_LOG_LEVEL": "1"}
    found = host.source(**given)
    assert {name: found[name] for name in given} == given


def test_the_toolkit_goes_before_nnae(host):
    host.install("nnae", "8.0.0")
    host.install("ascend-toolkit", "8.0.0")
    assert host.source()["CANN_SOURCED"] == "ascend-toolkit"


def test_the_driver_s_tool_is_used_where_it_is_and_for_the_cards_that_are(host):
    host.install("cann", "8.5.0")
    host.source()
    assert host.calls() == []
    host.add_tool([0, 5, 12])
    host.source()  # the tool fails: no root
    assert host.calls() == ["-g error -d 0", "-g error -d 12", "-g error -d 5", "-e disable"]
