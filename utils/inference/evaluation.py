"""Scoring a network on a dataset, by one process or several: train.py and eval.py both do."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Callable, Generator, List, Sequence, Tuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.coco import CocoDataset
from data.loader import start_worker
from utils.compat import iterate, share
from utils.device import pin_memory_supported
from utils.distributed.failures import WatchedLoader
from utils.distributed.processes import Processes
from utils.distributed.sharing import failing_together, gather_bytes, gather_state, shard
from utils.errors import UserError
from utils.inference.detector import Detector, StageTimes, to_network_batch
from utils.inference.evaluator import CocoEvaluator
from utils.inference.ground_truth import GroundTruth
from utils.progress import ProgressBar

ImageBatch = Tuple[Tensor, List[Tuple[int, int, int]]]
"""uint8 `[B, 3, S, S]`; image id, height and width of each stored image."""


class EvaluationBatches(Dataset):
    """Batches of B of a dataset's images, resized for a network whose input side is S; with `full`
    black images fill up the last one.
    """

    def __init__(self, dataset: CocoDataset, indices: Sequence[int], batch_size: int,
                 side: int, full: bool = True) -> None:
        self.dataset, self.batch_size, self.side, self.full = dataset, batch_size, side, full
        self._indices = [indices[n:n + batch_size] for n in range(0, len(indices), batch_size)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> ImageBatch | UserError:
        """Return a batch, or an image's error: raised in a worker it would lose its type."""
        indices = self._indices[number]
        try:
            samples = [self.dataset[index] for index in indices]
        except UserError as error:
            return error
        planes = to_network_batch([sample.image for sample in samples], self.side,
                                  self.batch_size if self.full else len(indices))
        return share([planes]) or (planes, [(sample.image_id, *sample.image.shape[:2])
                                            for sample in samples])


def load_batches(batches: EvaluationBatches, num_workers: int = 0,
                 pin_memory: bool = False) -> Generator[ImageBatch, None, None]:
    """Yield the batches in their order; an image that cannot be read raises its `UserError`."""
    for batch in iterate(DataLoader(batches, batch_size=None, num_workers=num_workers,
                                    pin_memory=pin_memory, worker_init_fn=start_worker)):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def choose_images(total: int, max_images: int, shuffle: bool = False,
                  seed: int | None = None) -> list[int]:
    """Indices of the images to evaluate: the first `max_images`, or random ones; <= 0 is all."""
    indices = (np.random.default_rng(seed).permutation(total).tolist() if shuffle
               else list(range(total)))
    return indices[:max_images] if max_images > 0 else indices


@dataclass(frozen=True)
class Evaluation:
    """Which images of which dataset are scored, and how they are read."""

    dataset: CocoDataset
    category_ids: Sequence[int | None]
    """Of each class of the network; None for one that the dataset does not have."""
    indices: Sequence[int]
    """Of the images, as from `choose_images`."""
    batch_size: int = 4
    num_workers: int = 2
    """Processes that read images; 0 reads in this one."""
    processes: Processes = Processes()
    """That share the images."""
    show_progress: bool = False
    loader_timeout: float = 0
    """Seconds that a batch may take; 0 waits for ever."""
    _truth: GroundTruth = field(init=False)
    """Read once, however often the network is scored."""

    def __post_init__(self) -> None:
        sizes = dict(zip(self.dataset.image_ids.tolist(),
                         map(tuple, self.dataset.annotations.image_sizes.tolist())))
        object.__setattr__(self, "_truth", GroundTruth(
            self.dataset.annotation_file, sizes, self.dataset.annotations.rows))

    def evaluator(self) -> CocoEvaluator:
        """An evaluator on the dataset's annotations, without detections."""
        return CocoEvaluator(self._truth, self.category_ids)

    def run(self, detector: Detector, evaluator: CocoEvaluator, times: StageTimes | None = None,
            stopped: Callable[[], bool] = lambda: False) -> bool:
        """Find the objects of all images, all processes together. The model keeps its mode.

        The main process's `evaluator` gets the detections of all; `times` is told how long the
        stages take, and counts this process's images; `stopped` is asked after each image whether
        this process is to stop.

        Returns:
            False where a process was to stop: `evaluator` has gained nothing.

        Raises:
            UserError: an image cannot be read, or the loader hangs; in all processes.
        """
        own, was_training = self.evaluator(), detector.model.training
        with failing_together(self.processes, detector.device):
            detector.model.eval()
            try:
                complete = self._detect(detector, own, times or StageTimes(), stopped)
            finally:
                detector.model.train(was_training)
        if b"\0" in gather_bytes(bytes([complete]), self.processes, detector.device):
            return False
        image_ids = [int(self.dataset.image_ids[index]) for index in self.indices]
        evaluator.merge(gather_state(own.state(), image_ids, self.processes, detector.device))
        return True

    def _detect(self, detector: Detector, own: CocoEvaluator, times: StageTimes,
                stopped: Callable[[], bool]) -> bool:
        """Add the detections of this process's share of the images to `own`; whether of all."""
        share = shard(self.indices, self.batch_size, self.processes)
        batches = load_batches(
            EvaluationBatches(self.dataset, share, self.batch_size, detector.model.input_size,
                              detector.full_batches),
            self.num_workers, pin_memory_supported(detector.device))
        progress = ProgressBar(len(share), sys.stderr,
                               enabled=self.show_progress and self.processes.is_main)
        watched = WatchedLoader(batches, self.loader_timeout, self.processes.rank)
        with contextlib.closing(batches):
            for image_id, objects in detector.find(watched, times, progress):
                own.add(image_id, objects.boxes, objects.rles, objects.classes.tolist(),
                        objects.scores.tolist(), objects.mask_scores.tolist())
                if stopped():
                    return False
        return True
