"""Batches for one rank: torch's DataLoader over steps, so that the numbers do not depend on its workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sptnet.data.augment import AugmentName, eval_view, prepare, train_view
from sptnet.data.image import DecodeError, decode
from sptnet.data.manifest import DatasetError, Kind, Shard, UnreachableError
from sptnet.data.order import BatchOrder, Slot, rank_slice
from sptnet.data.reader import Encoded, ShardReader
from sptnet.data.store import Store
from sptnet.data.workers import PREFETCHED, SharedMemoryError, load


class Batch(NamedTuple):
    """A rank's slice of global batch `step`.

    views: uint8 [V, b, 3, H, W]; targets, uids: int64 [b]; labelled: bool [b].
    replaced: what was wrong with each sample that another one stands in for.
    """

    step: int
    views: Tensor
    targets: Tensor
    labelled: Tensor
    uids: Tensor
    replaced: tuple[str, ...] = ()


class EvalBatch(NamedTuple):
    """images: uint8 [n, 3, H, W]; targets, uids: int64 [n]."""

    images: Tensor
    targets: Tensor
    uids: Tensor


def _decoded(sample: Encoded, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The sample's image, decoded and through the part of the transforms that draws nothing."""
    try:
        return transform(decode(sample.image))
    except DecodeError as error:
        raise DatasetError(
            f"{sample.shard}: sample {sample.uid} does not decode ({error}): make the shards again"
        ) from None


class _Batches(Dataset[Batch | EvalBatch]):
    """Batches by number."""

    def __init__(self, store: Store):
        self.store = store

    def __getitem__(self, number: int) -> Batch | EvalBatch:
        return self._batch(number)

    def _batch(self, number: int) -> Batch | EvalBatch:
        raise NotImplementedError

    def upcoming(self, number: int) -> Sequence[Shard]:
        """The shards that batches from this number on read, nearest first."""
        raise NotImplementedError


class _TrainSteps(_Batches):
    def __init__(
        self, store: Store, order: BatchOrder, augment: AugmentName, image_size: int, seed: int,
        slots: tuple[int, int], views_at: Callable[[int], int], tolerated: int,
    ):  # fmt: skip
        super().__init__(store)
        self.order, self.augment, self.image_size = order, augment, image_size
        self.seed, self.slots, self.views_at, self.tolerated = seed, slots, views_at, tolerated
        self.readers = {
            labelled: ShardReader(store, store.manifest.of_kind("labelled" if labelled else "unlabelled"))
            for labelled in (True, False)
        }

    def _batch(self, number: int) -> Batch:
        step, (begin, end) = number, self.slots
        # channels last in memory, as the decoder writes them: a crop is then a copy of whole rows
        views = _empty(self.views_at(step), end - begin, size=self.image_size)
        targets, labelled, uids = [], [], []
        replaced: list[str] = []
        for i, slot in enumerate(self.order.batch(step, begin, end)):
            sample, image = self._sample(slot, replaced)
            for view in range(len(views)):
                views[view, i] = train_view(self.augment, image, self.image_size, self.seed, step, slot.number, view)
            targets.append(sample.target)
            labelled.append(slot.labelled)
            uids.append(sample.uid)
        return Batch(
            step, views, torch.tensor(targets), torch.tensor(labelled), torch.tensor(uids), tuple(replaced)
        )  # fmt: skip

    def _sample(self, slot: Slot, replaced: list[str]) -> tuple[Encoded, Tensor]:
        """The slot's sample, or, where that is damaged and damage is tolerated, the next sound one of its stream."""
        reader, distance = self.readers[slot.labelled], 0
        while True:
            place = slot.place if distance == 0 else self.order.instead(slot, distance).place
            try:
                sample = reader.read(*place)
                return sample, _decoded(sample, lambda image: prepare(self.augment, image, self.image_size))
            except UnreachableError:
                raise  # nothing is wrong with the sample
            except DatasetError as error:
                if len(replaced) >= self.tolerated:
                    raise
                replaced.append(str(error))
                distance += 1

    def upcoming(self, number: int) -> Sequence[Shard]:
        shards = {labelled: reader.shards for labelled, reader in self.readers.items()}
        return [shards[labelled][shard] for labelled, shard in self.order.upcoming(number, *self.slots)]


class _EvalBatches(_Batches):
    def __init__(self, store: Store, kind: Kind, batch_size: int, augment: AugmentName, image_size: int):
        super().__init__(store)
        self.reader = ShardReader(store, store.manifest.of_kind(kind))
        self.batch_size, self.augment, self.image_size = batch_size, augment, image_size
        self.starts = np.concatenate(([0], np.cumsum([shard.samples for shard in self.reader.shards])))

    def __len__(self) -> int:
        return -(-int(self.starts[-1]) // self.batch_size)

    def _places(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and position of every sample of a batch."""
        begin = number * self.batch_size
        places = np.arange(begin, min(begin + self.batch_size, int(self.starts[-1])))
        shards = np.searchsorted(self.starts, places, side="right") - 1
        return shards, places - self.starts[shards]

    def _batch(self, number: int) -> EvalBatch:
        shards, positions = self._places(number)
        samples = [self.reader.read(*place) for place in zip(shards.tolist(), positions.tolist(), strict=True)]
        images = _empty(len(samples), size=self.image_size)
        for i, sample in enumerate(samples):
            images[i] = _decoded(sample, lambda image: eval_view(self.augment, image, self.image_size))
        return EvalBatch(
            images,
            torch.tensor([sample.target for sample in samples]),
            torch.tensor([sample.uid for sample in samples]),
        )

    def upcoming(self, number: int) -> Sequence[Shard]:
        first = int(self._places(min(number, len(self) - 1))[0][0])
        return self.reader.shards[first : first + 2]


def _empty(*leading: int, size: int) -> Tensor:
    """uint8 [..., 3, size, size], channels last in memory."""
    return torch.empty(*leading, size, size, 3, dtype=torch.uint8).movedim(-1, -3)


def _iterate(dataset: _Batches, items: Sequence[int], workers: int, rank: int) -> Iterator[Any]:
    batches = load(dataset, items, workers)  # forks the workers: before any thread that fetches
    try:
        for number in items:
            if dataset.store.remote:
                dataset.store.fetch_ahead(dataset.upcoming(number + PREFETCHED * workers))
            yield next(batches)
    except (DatasetError, SharedMemoryError) as error:
        raise type(error)(f"rank {rank}: {error}") from None
    finally:
        dataset.store.cancel_ahead()


def train_batches(
    store: Store,
    order: BatchOrder,
    *,
    augment: AugmentName,
    image_size: int,
    seed: int,
    steps: range,
    views_at: Callable[[int], int] = lambda step: 2,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    tolerated: int = 0,
) -> Iterator[Batch]:
    """This rank's slice of the global batches of `steps`.

    Args:
        views_at: how many augmented views a step needs.
        workers: loader processes; 0 loads in this one. Decides speed only, never what is loaded.
        tolerated: damaged samples that a batch may replace by the next of their stream.

    Raises:
        DatasetError: damage in the shards, naming rank, shard and sample.
    """
    slots = rank_slice(order.batch_size, rank, world_size)
    dataset = _TrainSteps(store, order, augment, image_size, seed, slots, views_at, tolerated)
    return _iterate(dataset, steps, workers, rank)


def eval_batches(
    store: Store,
    kind: Kind,
    *,
    batch_size: int,
    augment: AugmentName,
    image_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvalBatch]:
    """This rank's share of a split, in the manifest's order.

    The batches themselves do not depend on the world size, only who computes them does: a prediction is the same bit
    for bit on any number of ranks.
    """
    dataset = _EvalBatches(store, kind, batch_size, augment, image_size)
    mine = range(rank * len(dataset) // world_size, (rank + 1) * len(dataset) // world_size)
    return _iterate(dataset, mine, workers, rank)


def pixels(
    store: Store, kind: Kind, augment: AugmentName, image_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """A whole split in memory, for small baselines: images [N, 3 * H * W] in 0..1, targets [N], uids [N]."""
    batches = list(eval_batches(store, kind, batch_size=256, augment=augment, image_size=image_size))
    images = np.concatenate([batch.images.flatten(1).numpy() for batch in batches]).astype(np.float32) / np.float32(255)
    return (
        images,
        np.concatenate([batch.targets.numpy() for batch in batches]),
        np.concatenate([batch.uids.numpy() for batch in batches]),
    )
