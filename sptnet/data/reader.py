"""Encoded images out of shards: by offset and `pread`, no tar is parsed."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data.manifest import DatasetError, Shard, read_index


class Encoded(NamedTuple):
    """One sample as it lies on disk; `shard` is the tar's file name, for messages."""

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
        root: the dataset's folder.
        shards: the shards of one kind, in the manifest's order.
        keep_open: how many shards stay open, with their indexes, at a time.
    """

    def __init__(self, root: Path, shards: Sequence[Shard], keep_open: int = 64):
        self.root, self.shards, self.keep_open = root, shards, keep_open
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def _shard(self, number: int) -> _Open:
        if number not in self._open:
            path = self.root / self.shards[number].file
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DatasetError(f"{path} cannot be opened: {error.strerror}") from None
            self._open[number] = _Open(descriptor, read_index(self.root, self.shards[number]))
            while len(self._open) > self.keep_open:
                _, oldest = self._open.popitem(last=False)
                os.close(oldest.descriptor)
        self._open.move_to_end(number)
        return self._open[number]

    def read(self, shard: int, position: int) -> Encoded:
        """The sample at a position of a shard.

        Raises:
            DatasetError: the shard is missing, shorter than its index says, or its index is damaged.
        """
        opened, file = self._shard(shard), self.shards[shard].file
        uid, target, offset, size = (int(value) for value in opened.entries[position])
        image = os.pread(opened.descriptor, size, offset)
        if len(image) != size:
            raise DatasetError(f"{self.root / file} ends inside of sample {uid}: copy the shard again")
        return Encoded(uid, target, image, file)

    def close(self) -> None:
        while self._open:
            _, opened = self._open.popitem()
            os.close(opened.descriptor)
