"""The processes of one training run: who am I, how many are we, start, wait, end.

One process drives one device. The numbers come from the environment, as torchrun writes it
(RANK, WORLD_SIZE, LOCAL_RANK) or as Ascend's launch scripts do (RANK_ID, RANK_SIZE).
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Mapping

import torch
import torch.distributed as dist

from utils.device import distributed_backend
from utils.distributed.failures import time_limit
from utils.errors import UserError, counted
from utils.parsing import whole_number

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = "29688"
_OWN_ADDRESSES = (DEFAULT_ADDRESS, "localhost")
TIMEOUT = datetime.timedelta(minutes=30)
JOIN_SECONDS = 300
"""For all processes to meet; collectives have longer, since one may validate or save."""
_GIVEN_BACK_SECONDS = 0.5


@dataclass(frozen=True)
class Processes:
    """One process among all those of a run."""

    rank: int = 0
    """Number of this process, from 0 to world_size - 1."""
    world_size: int = 1
    """Number of processes on all hosts."""
    local_rank: int = 0
    """Index of this process's device on its host."""

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None,
                 devices_per_host: int | None = None) -> Processes:
        """Read the environment; without any of its variables this is a run of one process.

        The device is LOCAL_RANK where it is set. Else a single process takes ASCEND_DEVICE_ID, and
        one of several takes its rank modulo `devices_per_host`, the cards of this host (None: the
        processes share one device). Contradictory or unreadable values, and more processes than
        cards on one host, are a `UserError`.
        """
        env = os.environ if environ is None else environ
        if "WORLD_SIZE" in env:
            rank_name, size_name = "RANK", "WORLD_SIZE"
        else:
            rank_name, size_name = "RANK_ID", "RANK_SIZE"
        world_size = _read(env, size_name, 1, minimum=1)
        if world_size > 1 and not env.get(rank_name, "").strip():
            raise UserError(f"environment: {size_name}={world_size} but {rank_name} is not set; "
                            "every process needs its own rank")
        rank = _read(env, rank_name, 0)
        device = rank
        if world_size == 1:
            # Scripts of the existing port write the device's number into RANK_ID here.
            device = _read(env, "ASCEND_DEVICE_ID", rank)
            rank = 0
        elif rank >= world_size:
            raise UserError(f"environment: {rank_name}={rank} but {size_name}={world_size}; ranks "
                            f"count from 0 to {world_size - 1}")
        elif devices_per_host:
            # Nothing names a second host: no LOCAL_RANK, no address but this host's own.
            one_host = not env.get("LOCAL_RANK") and (
                env.get("MASTER_ADDR", "") in ("", *_OWN_ADDRESSES))
            if world_size > devices_per_host and one_host:
                raise UserError(
                    f"{world_size} processes were started ({size_name}={world_size}), but this "
                    f"host has {counted(devices_per_host, 'card')}; start at most that many, or "
                    "with several hosts name the first by MASTER_ADDR")
            device = rank % devices_per_host
        local_rank = _read(env, "LOCAL_RANK", device)
        if devices_per_host and world_size > 1 and local_rank >= devices_per_host:
            raise UserError(
                f"process {local_rank} of this host was started (LOCAL_RANK={local_rank}), but the "
                f"host has {counted(devices_per_host, 'card')}, one for each process; start at "
                "most that many (NPROC of the launchers)")
        return Processes(rank, world_size, local_rank)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def init(self, device: torch.device) -> None:
        """Join the other processes; a run of one process needs no group and gets none.

        The meeting point is MASTER_ADDR:MASTER_PORT, by default this host, port 29688.
        """
        if self.world_size == 1:
            return
        address = os.environ.setdefault("MASTER_ADDR", DEFAULT_ADDRESS)
        port = os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
        number = whole_number(port)
        if number is None or not 0 < number < 65536:
            raise UserError(f"environment: MASTER_PORT is '{port}', expected a number from 1 to "
                            "65535")
        of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
        try:
            with time_limit(JOIN_SECONDS, self.rank, "could not join the other processes at "
                                                     f"{address}:{port} within {JOIN_SECONDS} s"):
                store = open_store(address, number, self.world_size,
                                   self.is_main and not of_launcher, TIMEOUT)
                # Torch's elastic launcher keeps its store when it restarts the processes, and what
                # the failed ones left there would be read as addresses of living ones. So every
                # start has a corner of its own.
                dist.init_process_group(
                    backend=distributed_backend(device), rank=self.rank,
                    world_size=self.world_size, timeout=TIMEOUT,
                    store=dist.PrefixStore(f"restart {restarts}", store))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"process {self.rank} of {self.world_size} could not join the others "
                            f"at {address}:{port} ({error}); check that all were started and that "
                            "the port is free (MASTER_PORT)") from error

    def shutdown(self) -> None:
        """Leave the group, if there is one."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # Gloo's threads outlive this where there was a DistributedDataParallel. They give back
            # the tensors of the last exchange, which takes the interpreter: one that asked for it
            # when that has ended would abort the process, of a training that is complete.
            time.sleep(_GIVEN_BACK_SECONDS)


def open_store(address: str, port: int, world_size: int, is_main: bool,
               timeout: datetime.timedelta, **more: Any) -> Any:
    """PyTorch's store at an address, made by the main process; `more` are arguments of TCPStore.

    One at this host's own address listens there alone where this PyTorch takes a socket for it
    (2.13 does, 1.5 and 1.8 do not); every other one listens on all networks.

    Raises:
        OSError: the port is taken.
        RuntimeError: the main process's store cannot be made, or be reached in `timeout`.
    """
    knows_sockets = "master_listen_fd" in (dist.TCPStore.__init__.__doc__ or "")
    if is_main and address in _OWN_ADDRESSES and knows_sockets:
        more["master_listen_fd"] = socket.create_server((DEFAULT_ADDRESS, port)).detach()
    return dist.TCPStore(address, port, world_size, is_main, timeout, **more)


def _read(env: Mapping[str, str], name: str, default: int, minimum: int = 0) -> int:
    """Return the whole number in `env[name]`, or `default` where it is not set or empty."""
    text = env.get(name, "").strip()
    if not text:
        return default
    number = whole_number(text)
    if number is None or number < minimum:
        raise UserError(f"environment: {name} is '{text}', expected a whole number from {minimum} "
                        "upwards")
    return number


def is_restart(environ: Mapping[str, str]) -> bool:
    """Whether torch's elastic launcher has started this process in place of one that failed."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def launch_id(environ: Mapping[str, str]) -> str:
    """A name for this launch that no other has, the same in each attempt of torch's launcher."""
    began, port = environ.get("LAUNCH_TIME"), environ.get("MASTER_PORT")
    return f"launch-{began}-{port}" if began and port else f"{time.time_ns():x}-{os.getpid():x}"
