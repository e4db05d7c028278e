"""Encoded images out of shards: by offset and `pread`, no tar is parsed; of shards that are still to come, by piece."""

import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.faults import DamagedSampleError, DatasetError, UnreachableError
from sptnet.data.format.manifest import Shard
from sptnet.data.storage.pieces import PieceError, Wanted
from sptnet.data.storage.store import Store

KEEP_OPEN = 64  # shards, with their indexes, at a time
LOOK_EVERY = 0.5  # seconds between looks for open files that left the cache


class Encoded(NamedTuple):
    """One sample as it lies on disk; `shard`: the tar's path or URL, for messages; `piece`: read without its shard."""

    uid: int
    target: int
    image: bytes
    shard: str
    piece: bool = False


class _Open(NamedTuple):
    descriptor: int
    entries: NDArray[np.void]


class ShardReader:
    """Random access to the samples of some shards. Not shared between processes.

    Args:
        store: where the dataset lies.
        shards: the shards of one kind, in the manifest's order.
    """

    def __init__(self, store: Store, shards: Sequence[Shard]):
        self.store, self.shards = store, shards
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._pieces: dict[tuple[int, int], Encoded] = {}
        self._believed: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._looked = 0.0

    def _shard(self, number: int) -> _Open:
        if self.store.remote:
            self._close_removed()
        if number not in self._open:
            shard = self.shards[number]
            entries = self.store.entries(shard)
            self._open[number] = _Open(self.store.open(shard), entries)
            self._compare(number)
            while len(self._open) > KEEP_OPEN:
                _, oldest = self._open.popitem(last=False)
                os.close(oldest.descriptor)
        self._open.move_to_end(number)
        return self._open[number]

    def _compare(self, number: int) -> None:
        """Whether pieces of a shard were what they are in the whole of it, whose digest was checked."""
        opened, where = self._open[number], self.store.where(self.shards[number].file)
        for position, checksum in self._believed.pop(number, {}).items():
            uid, _, offset, size = opened.entries[position].item()
            if crc32(os.pread(opened.descriptor, size, offset)) != checksum:
                raise PieceError(
                    f"{where}: sample {uid} was another one, or damaged, when it was read before its shard had come: "
                    "continue from a checkpoint that is older, or start anew"
                )

    def _close_removed(self) -> None:
        """Close, now and then, what left the cache: an open file keeps its room on the disk until then."""
        if (now := time.monotonic()) - self._looked < LOOK_EVERY:
            return
        self._looked = now
        for number, opened in list(self._open.items()):
            if os.fstat(opened.descriptor).st_nlink == 0:
                os.close(opened.descriptor)
                del self._open[number]

    def read_ahead(self, places: Iterable[tuple[int, int]]) -> None:
        """Read those samples (shard, position) at once whose shards are not on this node; `read` has them until the
        next call. What does not come is left to `read`, which fetches the shard and says what is wrong.

        Raises:
            UnreachableError: an index does not come.
        """
        self._pieces.clear()
        if not self.store.remote:
            return
        found: dict[tuple[int, int], Encoded] = {}
        wanted = []
        for number, of_shard in groupby(sorted(set(places)), key=itemgetter(0)):
            shard = self.shards[number]
            if number in self._open or self.store.is_here(shard):
                continue
            try:
                entries, where = self.store.entries(shard), self.store.where(shard.file)
            except DatasetError as error:
                if error.outcome == "retry":
                    raise  # it was tried for minutes
                continue
            for place in of_shard:
                uid, target, offset, size = entries[place[1]].item()
                found[place] = Encoded(uid, target, b"", where, piece=True)
                wanted.append(Wanted(shard, offset, size))
        for (place, sample), image in zip(found.items(), self.store.pieces(wanted), strict=True):
            if image is not None:
                self._pieces[place] = sample._replace(image=image)

    def read(self, shard: int, position: int, whole: bool = False) -> Encoded:
        """The sample at a position of a shard.

        Args:
            whole: out of its shard, also where it was read ahead.

        Raises:
            DatasetError: the shard is missing, shorter than its index says, or its index is damaged.
        """
        if not whole and (piece := self._pieces.get((shard, position))) is not None:
            self._believed[shard][position] = crc32(piece.image)
            return piece
        if whole and shard in self._believed:
            self._believed[shard].pop(position, None)  # it did not decode
        opened, where = self._shard(shard), self.store.where(self.shards[shard].file)
        uid, target, offset, size = opened.entries[position].item()
        try:
            image = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            raise UnreachableError(f"{where}: sample {uid} cannot be read: {error.strerror}") from None
        if len(image) != size:
            raise DamagedSampleError(f"{where} ends inside of sample {uid}: copy the shard again")
        return Encoded(uid, target, image, where)

    def close(self) -> None:
        while self._open:
            _, opened = self._open.popitem()
            os.close(opened.descriptor)
