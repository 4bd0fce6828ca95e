"""The endless, resumable stream of training batches, sharded over processes.

What an image looks like in an epoch depends on (seed, epoch, index) alone, and the order of images
on (seed, epoch): neither on the number of workers nor on where a run was stopped and resumed.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any, Callable, Dict, Generator, Iterable, Iterator, Tuple, Union

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.augment import Augmenter
from data.batch import Batch, bit_values, collate, pack
from data.coco import CocoDataset
from data.config import Config
from data.targets import TargetMaker, ground_truth_slots
from utils.compat import allow_files, iterate, loader_generator, share
from utils.errors import UserError


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: one thread; signals to end are for the main process.

    `timeout` and batch systems send SIGTERM to every process of a job, and a worker that died of it
    would take the training down before its checkpoint. One from the main process ends it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the training's own, which it was born with
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        main_process = os.getppid()

        def obey() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# These take the place of an image's index where a side or the order of an epoch is drawn.
_SIDE_STREAM, _ORDER_STREAM = 2 ** 32 - 2, 2 ** 32 - 1

Key = Tuple[int, int, int]
"""Epoch, index of an image in the dataset, and side of the network's input."""

Row = Union[Dict[str, Any], UserError]
"""An image's arrays, or why it has none: raised in a worker an error would lose its type."""

SamplePath = Tuple[Augmenter, TargetMaker]
"""From `Sample` to `AugmentedSample`, and from that to arrays."""


@dataclass(eq=False)
class TrainDataset(Dataset):
    """Images as rows of a `Batch`; item (epoch, index, side) is image `index` in epoch `epoch`."""

    coco: CocoDataset
    paths: dict[int, SamplePath]
    """For each side of the network's input."""
    seed: int
    """Of the run."""
    interval: int = 1
    """Iterations that keep a side."""

    @staticmethod
    def from_config(coco: CocoDataset, config: Config,
                    priors_of: Callable[[Config], np.ndarray], seed: int = 0) -> TrainDataset:
        """Build the whole sample path of a recipe.

        `priors_of` are `layers.anchors.make_priors` of a recipe as NumPy.
        """
        slots, paths = ground_truth_slots(coco.max_objects), {}
        for side in config.multi_scale or (config.max_size,):
            recipe = config.at_side(side)
            paths[side] = Augmenter.from_config(recipe), TargetMaker(
                priors_of(recipe), num_classes=recipe.num_classes, max_objects=slots,
                masks_to_train=recipe.masks_to_train, size=side, proto_size=recipe.proto_size,
                semantic_size=recipe.semantic_size, pos_threshold=recipe.positive_iou,
                neg_threshold=recipe.negative_iou, crowd_iou=recipe.crowd_iou)
        return TrainDataset(coco, paths, seed, config.multi_scale_interval)

    def side_of(self, iteration: int) -> int:
        """Input side of an iteration, counted from the start of the training.

        A pure function of the seed and the iteration, so that all processes agree and a resumed run
        goes on exactly. The device meets as many sets of shapes as there are sides.
        """
        rng = np.random.default_rng([self.seed, iteration // self.interval, _SIDE_STREAM])
        return list(self.paths)[int(rng.integers(len(self.paths)))]

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, key: Key) -> Row:
        """Augment one image and assign its targets."""
        epoch, index, side = key
        rng = np.random.default_rng([self.seed, epoch, index])
        augment, make_targets = self.paths[side]
        try:
            return make_targets(augment(self.coco[index], rng), rng)
        except UserError as error:
            return error


class TrainLoader:
    """An endless iterable of `Batch`, every epoch in a new order; starts where `start_at` says.

    A global batch is a stretch of the epoch's order, and each process takes its part of it, so the
    same images are trained together however many processes share the work. The rest of an epoch
    that does not fill a global batch is left out; another order leaves out others.

    Args:
        dataset: items of `TrainDataset`.
        batch_size: images per batch of this process.
        num_workers: worker processes; 0 loads in this process.
        rank, world_size: this process among those that share the epoch.
        pin_memory: batches come in page-locked memory.
        pack_masks: batches come as `PackedBatch`, for the journey to a device.
        parts: batches of this process that make up one iteration.

    Attributes:
        epoch_size: iterations in an epoch.
        left_out: images that an epoch does not reach, for they do not fill a global batch.

    Raises:
        UserError: the dataset does not fill one global batch, or the system lets this process open
            too few files.
    """

    def __init__(self, dataset: TrainDataset, batch_size: int, num_workers: int = 0,
                 rank: int = 0, world_size: int = 1, pin_memory: bool = False,
                 pack_masks: bool = False, parts: int = 1) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.rank, self.world_size, self.parts = rank, world_size, parts
        self.pin_memory, self.pack_masks = pin_memory, pack_masks
        global_batch = batch_size * world_size * parts
        self.epoch_size = len(dataset) // global_batch
        self.left_out = len(dataset) % global_batch
        self._start = 0
        if self.epoch_size == 0:
            size = len(dataset) // (world_size * parts)
            lower = f"--batch_size to {max(size, 1)}" if size or parts == 1 else "--accumulate"
            raise UserError(
                f"the training set has {len(dataset)} images, fewer than one step of batch size "
                f"{batch_size} on {world_size} card{'' if world_size == 1 else 's'}"
                f"{f' x {parts} parts' if parts > 1 else ''}; lower {lower} or give more images")
        allow_files(num_workers)

    def start_at(self, iteration: int) -> None:
        """Let the next pass begin with `iteration`, counted from the start of the training."""
        self._start = iteration

    def keys(self) -> Iterator[list[Key]]:
        """Keys of this process's batches, without end."""
        epoch, first = divmod(self._start, self.epoch_size)
        while True:
            rng = np.random.default_rng([self.dataset.seed, epoch, _ORDER_STREAM])
            order = rng.permutation(len(self.dataset))
            for part in range(first * self.parts, self.epoch_size * self.parts):
                begin = (part * self.world_size + self.rank) * self.batch_size
                side = self.dataset.side_of(epoch * self.epoch_size + part // self.parts)
                yield [(epoch, index, side)
                       for index in order[begin:begin + self.batch_size].tolist()]
            epoch, first = epoch + 1, 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end.

        Raises:
            UserError: an image cannot be read; raised here although it happened in a worker.
        """
        batches = DataLoader(
            self.dataset, batch_sampler=self.keys(), num_workers=self.num_workers,
            collate_fn=functools.partial(_collate, packed=self.pack_masks),
            pin_memory=self.pin_memory, worker_init_fn=start_worker,
            **loader_generator(self.dataset.seed))
        for batch in iterate(batches):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def prefetch(loader: Iterable[Batch], device: torch.device,
             places: int = 0) -> Generator[Batch, None, None]:
    """Yield the batches of `loader` on `device`.

    A batch is asked for while the device still works on the step before, so its copy from pinned
    memory is queued without waiting. On the CPU batches pass through.

    With `places` batches of a side are copied into that many places in turn, and come as these:
    the same objects with the same memory again and again, still packed.
    """
    values = bit_values(device)
    kept: dict[tuple[int, torch.Size], Batch] = {}
    for number, batch in enumerate(loader):
        if places:
            place = number % places, batch.images.shape
            kept[place] = (kept[place].take(batch) if place in kept
                           else batch.to(device, non_blocking=True))
            yield kept[place]
            continue
        if device.type != "cpu":
            batch = batch.to(device, non_blocking=True)
        yield batch.unpack(values)


def _collate(samples: list[Row], packed: bool) -> Batch | UserError:
    rows = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        rows.append(sample)
    batch = pack(collate(rows)) if packed else collate(rows)
    return share(vars(batch).values()) or batch
