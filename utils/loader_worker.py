"""A loader's worker process: how many threads it has, and whose signals it leaves alone."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Optional

import cv2
import torch

SECONDS_AFTER_SIGTERM = 60
"""Longer than a training needs to end its step, save, and shut its workers down."""


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: one thread; Ctrl-C and SIGTERM are for the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stay_for_a_while)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _stay_for_a_while(number: int, frame: Optional[FrameType]) -> None:
    """Give the main process the time to save what it has.

    `timeout` and batch systems send SIGTERM to every process of a job, and a worker that died of it
    at once would take the training down before its checkpoint. The alarm, or a second SIGTERM, ends
    a worker that nobody shuts down.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(SECONDS_AFTER_SIGTERM)
