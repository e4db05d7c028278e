"""Batches for one rank: torch's DataLoader over steps, so that the numbers do not depend on its workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sptnet.data.batches import Batch, Batches, EvalBatch, EvalBatches, ImageSteps, TokenSteps, Views
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import Kind
from sptnet.data.order import BatchOrder, rank_slice
from sptnet.data.storage.store import Store
from sptnet.data.tokens import Tokens
from sptnet.data.waiting import Waiting
from sptnet.data.workers import PREFETCHED, SharedMemoryError, load
from sptnet.names import AugmentName


def _iterate(dataset: Batches, items: Sequence[int], workers: int, rank: int) -> Iterator[Any]:
    batches = load(dataset, items, workers)  # forks the workers: before any thread that fetches
    waiting = Waiting(dataset, rank)
    try:
        for number in items:
            if dataset.store.asks_ahead:
                dataset.store.fetch_ahead(dataset.upcoming(number + PREFETCHED * workers))
            with waiting.of(number):
                batch = next(batches)
            yield batch
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
    known_views: int | None = None,
    tokens: Tokens | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    tolerated: int = 0,
) -> Iterator[Batch]:
    """This rank's slice of the global batches of `steps`.

    Args:
        views_at: how many augmented views a step needs.
        known_views: how many views an image has, the same in every run; None: fresh ones in every step.
        tokens: of the known views, instead of pixels.
        workers: loader processes; 0 loads in this one. Decides speed only, never what is loaded.
        tolerated: damaged samples that a batch may replace by the next of their stream.

    Raises:
        DatasetError: damage in the shards, naming rank, shard and sample; or in the tokens.
    """
    slots = rank_slice(order.batch_size, rank, world_size)
    spec = Views(augment, image_size, seed, views_at, known_views, tolerated)
    dataset = ImageSteps(store, order, spec, slots) if tokens is None else TokenSteps(store, order, spec, slots, tokens)
    return _iterate(dataset, steps, workers, rank)


def eval_batches(
    store: Store,
    kind: Kind,
    *,
    batch_size: int,
    augment: AugmentName,
    image_size: int,
    tokens: Tokens | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvalBatch]:
    """This rank's share of a split, in the manifest's order; of `tokens`, where they are given.

    The batches themselves do not depend on the world size, only who computes them does: a prediction is the same bit
    for bit on any number of ranks.
    """
    dataset = EvalBatches(store, kind, batch_size, augment, image_size, tokens)
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
