"""Order, sharding, resumption and errors of the training stream."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import time

import numpy as np
import pytest
import torch

from data.augment import Augmenter
from data.coco import Sample
from data.loader import TrainDataset, TrainLoader, prefetch
from data.targets import TargetMaker
from utils.errors import UserError

SIZE = 32


class Images:
    """Stand-in for a CocoDataset: noise with one square each; image `broken` cannot be read."""

    def __init__(self, length, broken=None):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError(f"image 7.jpg (id {index}) is truncated; fetch it again")
        image = np.random.RandomState(index).randint(0, 256, (40, 50, 3)).astype(np.uint8)
        square = np.array([[10, 8], [30, 8], [30, 24], [10, 24]], np.float32)
        return Sample(image_id=index, image=image, labels=np.array([1]), crowd=np.array([False]),
                      boxes=np.array([[.2, .2, .6, .6]], np.float32), segmentations=[[square]])


def make_loader(length=11, batch_size=2, workers=0, seed=3, rank=0, world_size=1, broken=None):
    side = np.linspace(0.1, 0.9, 5)
    y, x = np.meshgrid(side, side, indexing="ij")
    priors = np.stack([x, y, np.full_like(x, .3), np.full_like(x, .3)], -1).reshape(-1, 4)
    maker = TargetMaker(priors, num_classes=3, max_objects=4, masks_to_train=5, size=SIZE,
                        proto_size=8, semantic_size=4)
    dataset = TrainDataset(Images(length, broken), {SIZE: (Augmenter(SIZE), maker)},
                           seed)
    return TrainLoader(dataset, batch_size, workers, rank, world_size)


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(other, name)), name


def epochs_of(length, batch_size, world_size, epochs, seed=0):
    """Indices of each epoch, by rank."""
    shards = [make_loader(length, batch_size, 0, seed, rank, world_size)
              for rank in range(world_size)]
    size = shards[0].epoch_size
    result = []
    for epoch in range(epochs):
        ranks = []
        for shard in shards:
            shard.start_at(epoch * size)
            batches = take(shard.keys(), size)
            assert all(key[0] == epoch for batch in batches for key in batch)
            ranks.append([[key[1] for key in batch] for batch in batches])
        result.append(ranks)
    return result


@pytest.mark.parametrize("length, batch_size, world_size", [(24, 2, 3), (25, 4, 2), (9, 1, 8)])
def test_shards_cover_an_epoch_once(length, batch_size, world_size):
    left_out = length % (batch_size * world_size)
    for ranks in epochs_of(length, batch_size, world_size, epochs=3):
        seen = [index for batches in ranks for batch in batches for index in batch]
        assert len(seen) == len(set(seen)) == length - left_out
        assert set(seen) <= set(range(length))
        assert len({len(batches) for batches in ranks}) == 1


def test_epochs_and_seeds_differ():
    first, second = (ranks[0] for ranks in epochs_of(40, 4, 1, epochs=2))
    other = epochs_of(40, 4, 1, epochs=1, seed=1)[0][0]
    assert first != second and first != other


def test_global_batches_do_not_depend_on_the_number_of_processes():
    alone = epochs_of(24, 8, 1, epochs=1)[0][0]
    shared = epochs_of(24, 2, 4, epochs=1)[0]
    assert alone == [sum(parts, []) for parts in zip(*shared)]


def test_epochs_follow_each_other_without_a_gap():
    keys = take(make_loader(length=7, batch_size=2).keys(), 7)
    assert [batch[0][0] for batch in keys] == [0, 0, 0, 1, 1, 1, 2]


def test_worker_count_changes_nothing():
    alone = take(make_loader(workers=0), 8)
    assert_same(alone, take(make_loader(workers=2), 8))
    assert not torch.equal(alone[0].images, alone[5].images)


@pytest.mark.parametrize("start", [3, 5, 7])
def test_resumes_where_it_stopped(start):
    whole = take(make_loader(), 9)
    resumed = make_loader()
    resumed.start_at(start)
    assert_same(whole[start:], take(resumed, 9 - start))


def test_an_image_looks_different_in_each_epoch():
    dataset = make_loader().dataset
    first, second = dataset[(0, 4, SIZE)], dataset[(1, 4, SIZE)]
    assert (first["image"] != second["image"]).any()
    assert (first["image"] == dataset[(0, 4, SIZE)]["image"]).all()


def test_global_generators_are_left_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    numbers, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    take(make_loader(), 3)
    assert (np.random.get_state()[1] == numbers).all()
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 6)
    assert old or torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_the_same_sentence_in_the_main_process(workers):
    with pytest.raises(UserError) as caught:
        take(make_loader(workers=workers, broken=4), 6)
    assert str(caught.value) == "image 7.jpg (id 4) is truncated; fetch it again"


def test_too_few_images_for_a_step():
    with pytest.raises(UserError, match="11 images.*--batch_size to 2"):
        make_loader(length=11, batch_size=3, world_size=4)
    assert make_loader(length=11, batch_size=3).left_out == 2


def test_prefetching_puts_batches_on_the_device(device):
    expected = take(make_loader(), 3)
    moved = take(prefetch(make_loader(), device), 3)
    assert all(batch.images.device.type == device.type for batch in moved)
    assert_same(expected, [batch.to("cpu") for batch in moved])


def test_workers_leave_sigterm_to_the_training_process():
    """`timeout` and batch systems send it to every process of a job."""
    expected = take(make_loader(), 30)
    batches = iter(make_loader(workers=2))
    found = [next(batches), next(batches)]  # one of each worker
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM"] + [str(worker.pid) for worker in workers], check=True)
    time.sleep(0.5)  # what died of it would be noticed by the next batch
    found += [next(batches) for _ in range(28)]
    assert_same(found, expected)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_when_the_training_process_says_so():
    """As Python does with what is left at its exit, after an error for one."""
    batches = iter(make_loader(workers=1))
    next(batches)
    worker, = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()
