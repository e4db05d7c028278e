"""Encoded images out of shards: by offset and `pread`, no tar is parsed."""

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data.manifest import DatasetError, Shard, UnreachableError
from sptnet.data.store import Store

LOOK_EVERY = 0.5  # seconds between looks for open files that left the cache


class Encoded(NamedTuple):
    """One sample as it lies on disk; `shard` is the tar's path or URL, for messages."""

    uid: int
    target: int
    image: bytes
    shard: str


class _Open(NamedTuple):
    descriptor: int
    entries: NDArray[np.void]


class ShardReader:
    """Random access to the samples of some shards. Not shared between processes.

    Args:
        store: where the dataset lies.
        shards: the shards of one kind, in the manifest's order.
        keep_open: how many shards stay open, with their indexes, at a time.
    """

    def __init__(self, store: Store, shards: Sequence[Shard], keep_open: int = 64):
        self.store, self.shards, self.keep_open = store, shards, keep_open
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._looked = 0.0

    def _shard(self, number: int) -> _Open:
        if self.store.remote:
            self._close_removed()
        if number not in self._open:
            shard = self.shards[number]
            entries = self.store.entries(shard)
            self._open[number] = _Open(self.store.open(shard), entries)
            while len(self._open) > self.keep_open:
                _, oldest = self._open.popitem(last=False)
                os.close(oldest.descriptor)
        self._open.move_to_end(number)
        return self._open[number]

    def _close_removed(self) -> None:
        """Close, now and then, what left the cache: an open file keeps its room on the disk until then."""
        if (now := time.monotonic()) - self._looked < LOOK_EVERY:
            return
        self._looked = now
        for number, opened in list(self._open.items()):
            if os.fstat(opened.descriptor).st_nlink == 0:
                os.close(opened.descriptor)
                del self._open[number]

    def read(self, shard: int, position: int) -> Encoded:
        """The sample at a position of a shard.

        Raises:
            DatasetError: the shard is missing, shorter than its index says, or its index is damaged.
        """
        opened, where = self._shard(shard), self.store.where(self.shards[shard].file)
        uid, target, offset, size = opened.entries[position].item()
        try:
            image = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise UnreachableError(f"{where}: sample {uid} cannot be read: {error.strerror}") from None
        if len(image) != size:
            raise DatasetError(f"{where} ends inside of sample {uid}: copy the shard again")
        return Encoded(uid, target, image, where)

    def close(self) -> None:
        while self._open:
            _, opened = self._open.popitem()
            os.close(opened.descriptor)
