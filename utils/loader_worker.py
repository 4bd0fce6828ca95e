"""A loader's worker process: how many threads it has, and whose signals end it."""

from __future__ import annotations

import os
import signal
import threading

import cv2
import torch


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: one thread; Ctrl-C and SIGTERM are for the main process.

    `timeout` and batch systems send SIGTERM to every process of a job, and a worker that died of it
    would take the training down before its checkpoint. One from the main process ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the training's own, which it was born with
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _obey(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
