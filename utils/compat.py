"""Where PyTorch 1.5, 1.8 and 2.x differ and the rest of the project must not care."""

from __future__ import annotations

import contextlib
import inspect
import os
import resource
import signal
import threading
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from utils.errors import UserError, first_line


def loader_generator(seed: int) -> dict[str, Any]:
    """Arguments for a `DataLoader` whose workers' base seed comes from `seed`.

    Without them it is drawn from, and so changes, the global generator. PyTorch 1.5 has no such
    argument: empty there.
    """
    if "generator" not in inspect.signature(DataLoader.__init__).parameters:
        return {}
    return {"generator": torch.Generator().manual_seed(seed)}


def iterate(loader: DataLoader) -> Iterator[Any]:
    """Iterate a `DataLoader`; its workers have ended when this iterator is closed.

    Left to the garbage collector, PyTorch 1.5 may tear down the queues to its workers before it
    tells them to end, and then waits for them for ever.

    Raises:
        UserError: a worker has died, was killed, or had no memory to share its batch; or this
            process may not open the files that it takes.
    """
    allow_files(loader.num_workers)
    try:
        iterator = iter(loader)
    except OSError as error:
        raise UserError(_lost_worker(error, loader.num_workers)) from error
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise wherever the program is, within an update as well; a worker
        # that has died is noticed all the same when its batch does not come.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for item in iterator:
            yield item
    except UserError:  # it took too long: PyTorch would wait five seconds for each that hangs
        _kill(iterator)
        raise
    except (RuntimeError, OSError, EOFError) as error:
        # A worker killed while its batch was being fetched is a connection that has ended.
        if loader.num_workers and (isinstance(error, (ConnectionError, EOFError)) or any(
                word in str(error) for word in _OF_WORKERS)):
            raise UserError(_lost_worker(error, loader.num_workers)) from error
        raise
    finally:
        end_workers = getattr(iterator, "_shutdown_workers", None)  # absent without workers
        if end_workers is not None:
            end_workers()
        _kill(iterator)  # who hangs does not hear the SIGTERM that PyTorch has sent


def _kill(iterator: Any) -> None:
    for worker in getattr(iterator, "_workers", ()):
        worker.kill()


def share(tensors: Iterable[Tensor]) -> UserError | None:
    """Move a worker's batch to shared memory; None, or why that failed. Nothing in other processes.

    It would go there by itself, but in a thread of the worker whose failure nobody is told of: the
    batch would never come.
    """
    if get_worker_info() is None:
        return None
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        return UserError(
            f"a batch does not fit into shared memory ({first_line(error)}): enlarge /dev/shm "
            "(docker run --shm-size=8g), or lower --num_workers or --batch_size; --num_workers=0 "
            "needs none")
    return None


def allow_files(num_workers: int) -> None:
    """Take what the system lets this process have, and refuse workers that would wait for more:
    one that cannot send its batch says nothing.
    """
    if not num_workers or not os.path.isdir("/proc/self/fd"):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    needed = len(os.listdir("/proc/self/fd")) + FILES_PER_WORKER * num_workers + FILES_OF_BATCHES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise UserError(f"this process may open {soft} files (ulimit -n), and --num_workers="
                        f"{num_workers} needs up to {needed}: raise that limit or lower "
                        "--num_workers (0 reads images in this process)")


FILES_PER_WORKER = 8
"""Pipes to a worker of a training, and to one of a validation."""
FILES_OF_BATCHES = 48
"""A worker shares two batches of 13 tensors as files; the rest is for files of other kinds."""
_OF_WORKERS = ("DataLoader worker", "shared memory", "Too many open files", "received 0 items",
               "No space left on device")


def _lost_worker(error: Exception, num_workers: int) -> str:
    return (f"a process that loads images was lost ({first_line(error)}): the system may have "
            "ended it for want of memory, shared memory (/dev/shm) or open files (ulimit -n); "
            f"lower --num_workers, now {num_workers}, or --batch_size, or raise that limit")


def unsynchronised_buffers() -> dict[str, Any]:
    """Arguments for `DistributedDataParallel` that keep it from sending buffers in every step.

    PyTorch 2.13 renamed the argument and warns of the old name.
    """
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False}
