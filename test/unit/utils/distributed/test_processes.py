"""Who am I among the processes of a run: torchrun's environment or Ascend's, and a real group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from helpers.paths import ROOT
from utils.distributed.processes import Processes
from utils.errors import UserError


@pytest.mark.parametrize("env, devices, expected", [
    ({}, 8, (0, 1, 0)),
    ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}, 8, (5, 16, 5)),
    ({"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.1"}, 8, (9, 16, 1)),
    ({"RANK_ID": "3", "RANK_SIZE": "8"}, 8, (3, 8, 3)),
    ({"RANK_ID": "11", "RANK_SIZE": "16", "MASTER_ADDR": "10.0.0.1"}, 8, (11, 16, 3)),
    ({"RANK_ID": "3", "RANK_SIZE": "8"}, None, (3, 8, 3)),
    # ModelZoo's platform exports ASCEND_DEVICE_ID for the whole job: each rank has its own device.
    ({"RANK_ID": "3", "RANK_SIZE": "8", "ASCEND_DEVICE_ID": "0"}, 8, (3, 8, 3)),
    ({"ASCEND_DEVICE_ID": "6"}, 8, (0, 1, 6)),
    ({"RANK_ID": "0", "RANK_SIZE": "1", "ASCEND_DEVICE_ID": "6"}, 8, (0, 1, 6)),
    # The existing port's launchers write the device into RANK_ID of a single process.
    ({"RANK_ID": "6", "RANK_SIZE": "1"}, 8, (0, 1, 6)),
    ({"RANK": "1", "WORLD_SIZE": "2", "RANK_ID": "0", "RANK_SIZE": "1"}, 8, (1, 2, 1)),
    ({"RANK_SIZE": "", "RANK_ID": ""}, 8, (0, 1, 0)),
])
def test_environment(env, devices, expected):
    found = Processes.from_env(env, devices_per_host=devices)
    assert (found.rank, found.world_size, found.local_rank) == expected
    assert found.is_main is (found.rank == 0)


@pytest.mark.parametrize("env, words", [
    ({"RANK_SIZE": "8"}, "RANK_SIZE=8 but RANK_ID is not set"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK is not set"),
    ({"RANK_SIZE": "eight", "RANK_ID": "0"}, "RANK_SIZE is 'eight'"),
    ({"RANK_SIZE": "8", "RANK_ID": "8"}, "RANK_ID=8 but RANK_SIZE=8"),
    ({"RANK_SIZE": "8", "RANK_ID": "-1"}, "RANK_ID is '-1'"),
    ({"RANK_SIZE": "0"}, "RANK_SIZE is '0'"),
    ({"ASCEND_DEVICE_ID": "npu0"}, "ASCEND_DEVICE_ID is 'npu0'"),
])
def test_contradictions_are_named(env, words):
    with pytest.raises(UserError, match=words):
        Processes.from_env(env)


@pytest.mark.parametrize("env, words", [
    ({"RANK_ID": "1", "RANK_SIZE": "8"}, r"8 processes were started \(RANK_SIZE=8\), but this host "
                                         "has 4 cards"),
    ({"RANK_ID": "1", "RANK_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}, "has 4 cards; start at most"),
    ({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "4", "MASTER_ADDR": "10.0.0.1"},
     r"process 4 of this host was started \(LOCAL_RANK=4\), but the host has 4 cards"),
])
def test_more_processes_than_cards_are_refused(env, words):
    with pytest.raises(UserError, match=words):
        Processes.from_env(env, devices_per_host=4)
    Processes.from_env(env, devices_per_host=None)  # the CPU is shared


def test_one_process_needs_no_group():
    alone = Processes()
    alone.init(torch.device("cpu"))
    assert not dist.is_initialized()
    alone.shutdown()


@pytest.mark.parametrize("port", ["none", "83215"])
def test_impossible_port_is_named(port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"MASTER_PORT is '{port}'"):
        Processes(0, 2, 0).init(torch.device("cpu"))


_WORKER = """
import torch, torch.distributed as dist
from utils.distributed.processes import Processes
mine = Processes.from_env()
mine.init(torch.device("cpu"))
value = torch.tensor([float(mine.rank + 1)])
dist.all_reduce(value)
dist.barrier()
mine.shutdown()
print("rank", mine.rank, "sum", value.item(), "main", mine.is_main, "open", dist.is_initialized())
"""


@pytest.mark.launch
@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE")])
def test_two_processes_meet(names):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in range(2):
        env = {key: value for key, value in os.environ.items() if key not in (
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK_ID", "RANK_SIZE", "MASTER_ADDR")}
        env.update({names[0]: str(rank), names[1]: "2", "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        workers.append(subprocess.Popen([sys.executable, "-c", _WORKER], env=env, cwd=str(ROOT),
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        universal_newlines=True))
    try:
        results = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (out, err) in enumerate(results):
        assert out.split("\n")[0] == f"rank {rank} sum 3.0 main {rank == 0} open False", err
