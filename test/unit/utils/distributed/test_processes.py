"""Who am I among the processes of a run: torchrun's environment or Ascend's, and a real group."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from helpers.paths import ROOT
from utils.distributed.processes import Processes, open_store
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
from utils.distributed.processes import Processes, open_store
mine = Processes.from_env()
mine.init(torch.device("cpu"))
value = torch.tensor([float(mine.rank + 1)])
dist.all_reduce(value)
dist.barrier()
mine.shutdown()
print("rank", mine.rank, "sum", value.item(), "main", mine.is_main, "open", dist.is_initialized())
"""


def listens_at(port):
    """Local addresses, as /proc/net has them, at which someone listens on `port`."""
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as stream:
            for line in list(stream)[1:]:
                (address, number), state = line.split()[1].split(":"), line.split()[3]
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_LOOPBACK = "0100007F"
_needs_sockets = pytest.mark.skipif(
    "master_listen_fd" not in (dist.TCPStore.__init__.__doc__ or ""),
    reason="this PyTorch's store listens on all networks")


@_needs_sockets
def test_the_store_of_one_host_listens_to_no_other(free_port):
    store = open_store("localhost", free_port, 1, True, datetime.timedelta(seconds=10))
    assert listens_at(free_port) == {_LOOPBACK}
    store.set("key", "value")
    assert open_store("127.0.0.1", free_port, 1, False,
                      datetime.timedelta(seconds=10)).get("key") == b"value"


@_needs_sockets
@pytest.mark.launch
def test_torch_s_launcher_on_one_host_listens_to_no_other(free_port):
    command = [sys.executable, "-m", "utils.distributed.torch_distributed_run",
               "--nproc_per_node=1", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1",
               f"--master_port={free_port}", "--no_python", "sleep", "60"]
    launcher = subprocess.Popen(command, cwd=str(ROOT), start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not listens_at(free_port) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert listens_at(free_port) == {_LOOPBACK}
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.launch
@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE")])
def test_two_processes_meet(names, free_port):
    port, workers = str(free_port), []
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


_LEAVES_AT_ONCE = """
import sys, torch
from utils.distributed.processes import Processes
sys.setswitchinterval(100)  # a thread that asks for the interpreter waits until this one waits
processes = Processes.from_env()
processes.init(torch.device("cpu"))
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
for _ in range(20):
    torch.distributed.all_reduce(torch.ones(3))
processes.shutdown()
"""


@pytest.mark.launch
def test_a_process_that_ends_after_the_last_exchange_is_not_aborted(free_port):
    workers = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), PYTHONPATH=str(ROOT))
        workers.append(subprocess.Popen([sys.executable, "-c", _LEAVES_AT_ONCE], env=env,
                                        cwd=str(ROOT)))
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
