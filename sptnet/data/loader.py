"""Batches for one rank: torch's DataLoader over steps, so that the numbers do not depend on its workers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sptnet.data.augment import AugmentName, DecodeError, decode, eval_view, train_view
from sptnet.data.manifest import DatasetError, Kind, Manifest
from sptnet.data.order import BatchOrder, rank_slice
from sptnet.data.reader import Encoded, ShardReader


class Batch(NamedTuple):
    """A rank's slice of global batch `step`.

    views: uint8 [V, b, 3, H, W]; targets, uids: int64 [b]; labelled: bool [b].
    """

    step: int
    views: Tensor
    targets: Tensor
    labelled: Tensor
    uids: Tensor


class EvalBatch(NamedTuple):
    """images: uint8 [n, 3, H, W]; targets, uids: int64 [n]."""

    images: Tensor
    targets: Tensor
    uids: Tensor


class _Failed(NamedTuple):
    """What a worker sends instead of a batch: an exception would arrive wrapped in a traceback of many lines."""

    message: str


def _decoded(root: Path, sample: Encoded) -> Image.Image:
    try:
        return decode(sample.image)
    except DecodeError as error:
        raise DatasetError(
            f"{root / sample.shard}: sample {sample.uid} does not decode ({error}): make the shards again"
        ) from None


class _Batches(Dataset[Batch | EvalBatch | _Failed]):
    """Batches by number; damage in the shards is passed on as `_Failed`."""

    def __getitem__(self, number: int) -> Batch | EvalBatch | _Failed:
        try:
            return self._batch(number)
        except DatasetError as error:
            return _Failed(str(error))

    def _batch(self, number: int) -> Batch | EvalBatch:
        raise NotImplementedError


class _TrainSteps(_Batches):
    def __init__(
        self, root: Path, manifest: Manifest, order: BatchOrder, augment: AugmentName, image_size: int,
        seed: int, slots: tuple[int, int], views_at: Callable[[int], int],
    ):  # fmt: skip
        self.root, self.order, self.augment, self.image_size = root, order, augment, image_size
        self.seed, self.slots, self.views_at = seed, slots, views_at
        self.readers = {
            labelled: ShardReader(root, manifest.of_kind("labelled" if labelled else "unlabelled"))
            for labelled in (True, False)
        }

    def _batch(self, number: int) -> Batch:
        step = number
        begin, end = self.slots
        views = np.empty((self.views_at(step), end - begin, 3, self.image_size, self.image_size), np.uint8)
        targets, labelled, uids = [], [], []
        for i, slot in enumerate(self.order.batch(step, begin, end)):
            sample = self.readers[slot.labelled].read(*slot.place)
            image = _decoded(self.root, sample)
            for view in range(len(views)):
                views[view, i] = train_view(self.augment, image, self.image_size, self.seed, step, slot.number, view)
            targets.append(sample.target)
            labelled.append(slot.labelled)
            uids.append(sample.uid)
        return Batch(step, torch.from_numpy(views), torch.tensor(targets), torch.tensor(labelled), torch.tensor(uids))


class _EvalBatches(_Batches):
    def __init__(
        self, root: Path, manifest: Manifest, kind: Kind, batch_size: int, augment: AugmentName, image_size: int
    ):
        shards = manifest.of_kind(kind)
        self.root, self.reader = root, ShardReader(root, shards)
        self.batch_size, self.augment, self.image_size = batch_size, augment, image_size
        self.starts = np.concatenate(([0], np.cumsum([shard.samples for shard in shards])))

    def __len__(self) -> int:
        return -(-int(self.starts[-1]) // self.batch_size)

    def _batch(self, number: int) -> EvalBatch:
        begin = number * self.batch_size
        places = np.arange(begin, min(begin + self.batch_size, int(self.starts[-1])))
        shards = np.searchsorted(self.starts, places, side="right") - 1
        samples = [
            self.reader.read(int(shard), int(place - self.starts[shard]))
            for shard, place in zip(shards, places, strict=True)
        ]
        images = [eval_view(self.augment, _decoded(self.root, sample), self.image_size) for sample in samples]
        return EvalBatch(
            torch.from_numpy(np.stack(images)),
            torch.tensor([sample.target for sample in samples]),
            torch.tensor([sample.uid for sample in samples]),
        )


def _unchanged(item: object) -> object:
    return item


def _iterate(dataset: _Batches, items: Sequence[int], workers: int) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    for item in loader:
        if isinstance(item, _Failed):
            raise DatasetError(item.message)
        yield item


def train_batches(
    root: Path,
    manifest: Manifest,
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
) -> Iterator[Batch]:
    """This rank's slice of the global batches of `steps`.

    Args:
        views_at: how many augmented views a step needs.
        workers: loader processes; 0 loads in this one. Decides speed only, never what is loaded.

    Raises:
        DatasetError: damage in the shards, naming shard and sample.
    """
    slots = rank_slice(order.batch_size, rank, world_size)
    dataset = _TrainSteps(root, manifest, order, augment, image_size, seed, slots, views_at)
    return _iterate(dataset, steps, workers)


def eval_batches(
    root: Path,
    manifest: Manifest,
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
    dataset = _EvalBatches(root, manifest, kind, batch_size, augment, image_size)
    mine = range(rank * len(dataset) // world_size, (rank + 1) * len(dataset) // world_size)
    return _iterate(dataset, mine, workers)


def pixels(
    root: Path, manifest: Manifest, kind: Kind, augment: AugmentName, image_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """A whole split in memory, for small baselines: images [N, 3 * H * W] in 0..1, targets [N], uids [N]."""
    batches = list(eval_batches(root, manifest, kind, batch_size=256, augment=augment, image_size=image_size))
    images = np.concatenate([batch.images.flatten(1).numpy() for batch in batches]).astype(np.float32) / np.float32(255)
    return (
        images,
        np.concatenate([batch.targets.numpy() for batch in batches]),
        np.concatenate([batch.uids.numpy() for batch in batches]),
    )
