"""Images in fixed blocks, for what is computed once over many of them: features and predictions.

A source of images consists of parts, a part of blocks of `block_size` images. A part is computed whole by one process
and its blocks are the same on any number of processes: kernels may round differently for another batch, so only equal
batches give equal bits. A damaged image keeps its place in its block, black, so that nobody else's numbers change.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sptnet.data.augment import eval_view, known_view, prepare
from sptnet.data.format.manifest import Kind, Shard
from sptnet.data.image import DecodeError, decode
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import Store
from sptnet.data.workers import load
from sptnet.names import AugmentName

ADDRESS = re.compile(r" <_io\.\w+ object at 0x\w+>")  # in Pillow's messages; another one in every process


class Sample(NamedTuple):
    """One image of a source; `error`: why it cannot be read, empty where it can."""

    path: str
    uid: int
    target: int
    encoded: bytes
    error: str = ""


class Source(Protocol):
    """Images in parts. Picklable or forkable: loader workers get a copy."""

    def __len__(self) -> int:
        """How many parts."""

    def size(self, part: int) -> int:
        """Images of a part."""

    def read(self, part: int, positions: range) -> list[Sample]:
        """Some images of a part; one that cannot be read comes with its `error`. Raises DatasetError."""

    def fetch_ahead(self, part: int) -> None:
        """Begin to fetch what a part needs, where that takes time; returns at once."""


class Block(NamedTuple):
    """images: uint8 [n, 3, S, S], black where `samples[i].error` says why; samples: [n], without their bytes.

    views: uint8 [V, n, 3, S, S], the known views where they were asked for.
    """

    part: int
    begin: int
    images: Tensor
    samples: tuple[Sample, ...]
    views: Tensor | None = None


class ShardSource:
    """The shards of some kinds, in the manifest's order; a part is a shard."""

    def __init__(self, store: Store, kinds: Sequence[Kind]):
        self.store = store
        self._latest: tuple[int, list[str] | None] | None = None
        self.readers = {kind: ShardReader(store, store.manifest.of_kind(kind)) for kind in kinds}
        self.ends = np.cumsum([len(self.readers[kind].shards) for kind in kinds]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, part: int) -> tuple[Kind, int]:
        """The kind of a part, and its number among the shards of that kind."""
        kind = bisect_right(self.ends, part)
        return list(self.readers)[kind], part - (self.ends[kind - 1] if kind else 0)

    def shard(self, part: int) -> Shard:
        kind, number = self.place(part)
        return self.readers[kind].shards[number]

    def size(self, part: int) -> int:
        return self.shard(part).samples

    def read(self, part: int, positions: range) -> list[Sample]:
        kind, number = self.place(part)
        encoded = [self.readers[kind].read(number, position) for position in positions]
        paths = self._paths(part)
        return [
            Sample(paths[i] if paths else path_of_sample(kind, one.uid), one.uid, one.target, one.image)
            for i, one in zip(positions, encoded, strict=True)
        ]

    def _paths(self, part: int) -> list[str] | None:
        """Where the samples of a part came from; of one part at a time, as blocks come part by part."""
        if self._latest is None or self._latest[0] != part:
            self._latest = part, self.store.paths(self.shard(part))
        return self._latest[1]

    def fetch_ahead(self, part: int) -> None:
        if self.store.asks_ahead:
            self.store.fetch_ahead([self.shard(part)])


def path_of_sample(kind: Kind, uid: int) -> str:
    """What stands for a path where a dataset does not keep it: uids repeat between training and test."""
    return f"{'test' if kind == 'test' else 'train'}/{uid}"


class _Blocks(Dataset[Block]):
    """Blocks by (part, begin)."""

    def __init__(self, source: Source, block_size: int, augment: AugmentName, image_size: int, known_views: int):
        self.source, self.block_size, self.augment, self.image_size = source, block_size, augment, image_size
        self.known_views = known_views

    def __getitem__(self, place: tuple[int, int]) -> Block:
        part, begin = place
        samples = self.source.read(part, range(begin, min(begin + self.block_size, self.source.size(part))))
        if not self.known_views:
            return Block(part, begin, *prepared(samples, self.augment, self.image_size))
        views = torch.zeros(self.known_views, len(samples), self.image_size, self.image_size, 3, dtype=torch.uint8)
        views = views.movedim(-1, -3)

        def draw(i: int, sample: Sample, image: Tensor) -> None:
            whole = prepare(self.augment, image, self.image_size)
            for view in range(self.known_views):
                views[view, i] = known_view(self.augment, whole, self.image_size, sample.uid, view)

        images, told = prepared(samples, self.augment, self.image_size, draw)
        return Block(part, begin, images, told, views)


def prepared(
    samples: Sequence[Sample],
    augment: AugmentName,
    image_size: int,
    look: Callable[[int, Sample, Tensor], None] = lambda i, sample, image: None,
) -> tuple[Tensor, tuple[Sample, ...]]:
    """Decode, resize and crop as an evaluation does: uint8 [n, 3, S, S], and the samples without their bytes.

    Args:
        look: is given number, sample and decoded image of every sample that decodes.
    """
    images = torch.zeros(len(samples), image_size, image_size, 3, dtype=torch.uint8).movedim(-1, -3)
    told = []
    for i, sample in enumerate(samples):
        error = sample.error
        if not error:
            try:
                image = decode(sample.encoded)
                images[i] = eval_view(augment, image, image_size)
                look(i, sample, image)
            except DecodeError as reason:
                error = ADDRESS.sub("", str(reason))
        told.append(sample._replace(encoded=b"", error=error))
    return images, tuple(told)


class _Places:
    """(part, begin) of every block of the parts that are wanted; a part that lacks images has one empty block."""

    def __init__(self, source: Source, parts: Sequence[int], wanted: Callable[[int], bool], block_size: int):
        self.source, self.parts, self.wanted, self.block_size = source, parts, wanted, block_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for part in self.parts:
            if self.wanted(part):
                for begin in range(0, max(1, self.source.size(part)), self.block_size):
                    yield part, begin


def blocks(
    source: Source,
    parts: Sequence[int],
    wanted: Callable[[int], bool],
    *,
    block_size: int,
    augment: AugmentName,
    image_size: int,
    known_views: int = 0,
    workers: int = 0,
) -> Iterator[Block]:
    """The blocks of some parts, in order; memory does not grow with the number of parts or images.

    Args:
        parts: those of this process.
        wanted: whether a part is to be computed; asked once for each, shortly before it is read.
        known_views: how many of the views that an image has in every run come beside the evaluated one.
        workers: loader processes; decide speed only.

    Raises:
        DatasetError: a shard that is missing or damaged as a whole; a worker that was killed.
        SharedMemoryError: /dev/shm is full.
    """
    places = _Places(source, parts, wanted, block_size)
    pairs = pairwise(chain(parts, [None]))
    for block in load(_Blocks(source, block_size, augment, image_size, known_views), places, workers):
        if block.begin == 0:
            following = next(after for part, after in pairs if part == block.part)
            if following is not None:
                source.fetch_ahead(following)
        yield block
