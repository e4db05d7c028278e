"""Which samples make global batch `step`: a pure function of (seed, split, step). The world size does not enter.

One split is an endless chain of passes, each of which visits every sample once:

1. In pass p the shards are permuted and laid end to end; that line of N samples is cut into C pieces of equal length
   (to within one sample). Piece c is what *stream* c reads in pass p. Since the lengths do not depend on p, position
   n of a stream lies in pass n // length: finding a step costs no walk from 0.
2. Inside a stream, *windows* of W consecutive shards are permuted as a whole, one after the other.

A batch takes the same number of samples from every stream, and half of it from the labelled split and half from the
unlabelled one, slot by slot in turn. So every rank's slice is balanced too, and with R <= C ranks, R dividing C, each
rank reads no shard but those of its own streams.

CHANGING ANYTHING HERE CHANGES EVERY RUN: tests/data/test_order.py holds a digest of the order; say so in CHANGELOG.md.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data import keyed

PASSES_KEPT, WINDOWS_KEPT = 2, 2  # a batch may straddle the border between two


class Place(NamedTuple):
    """Where a sample is: index of its shard in the split, and its position in that shard."""

    shard: int
    position: int


class _Line(NamedTuple):
    """The shards of one pass laid end to end: shard order [S] and where each shard starts [S + 1]."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]


class StreamOrder:
    """The order of one split.

    Args:
        counts: samples of every shard of the split, in the manifest's order.
        streams: C, the number of canonical streams, at most the number of shards.
        window: W, how many consecutive shards of a stream are shuffled together.
        seed: the run's seed.
        split: a number that tells splits of one run apart.

    Raises:
        ValueError: more streams than shards, or an empty shard list.
    """

    def __init__(self, counts: Sequence[int] | NDArray[np.int64], streams: int, window: int, seed: int, split: int):
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        if not 1 <= streams <= len(self.counts):
            raise ValueError(f"{streams} streams need at least as many shards, and there are {len(self.counts)}")
        if self.total < streams:
            raise ValueError(f"{streams} streams need at least as many samples, and there are {self.total}")
        self.streams, self.window, self.seed, self.split = streams, window, seed, split
        self._lines: OrderedDict[int, _Line] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()

    def piece(self, stream: int) -> tuple[int, int]:
        """[begin, end) of what a stream reads of every pass's line."""
        return stream * self.total // self.streams, (stream + 1) * self.total // self.streams

    def _line(self, pass_: int) -> _Line:
        if pass_ not in self._lines:
            shards = keyed.permutation(self.seed, keyed.SHARD_ORDER, self.split, pass_, 0, len(self.counts))
            starts = np.concatenate(([0], np.cumsum(self.counts[shards])))
            self._lines[pass_] = _Line(shards, starts)
            while len(self._lines) > PASSES_KEPT:
                self._lines.popitem(last=False)
        self._lines.move_to_end(pass_)
        return self._lines[pass_]

    def _shuffled(self, pass_: int, stream: int, window: int, size: int) -> NDArray[np.int64]:
        key = (pass_, stream, window)
        if key not in self._windows:
            place = stream << 32 | window
            self._windows[key] = keyed.permutation(self.seed, keyed.SAMPLE_ORDER, self.split, pass_, place, size)
            while len(self._windows) > WINDOWS_KEPT * self.streams:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def window_bounds(self, pass_: int, stream: int, offset: int) -> tuple[int, int, int]:
        """(number, begin, end) on the line of the window that holds the stream's sample `offset` of this pass."""
        begin, end = self.piece(stream)
        line = self._line(pass_)
        first = int(np.searchsorted(line.starts, begin, side="right")) - 1
        shard = int(np.searchsorted(line.starts, begin + offset, side="right")) - 1
        number = (shard - first) // self.window
        left = first + number * self.window
        right = min(left + self.window, len(line.shards))
        return number, max(begin, int(line.starts[left])), min(end, int(line.starts[right]))

    def at(self, stream: int, position: int) -> Place:
        """The sample at a position of a stream, counted from the beginning of the run."""
        begin, end = self.piece(stream)
        pass_, offset = divmod(position, end - begin)
        number, left, right = self.window_bounds(pass_, stream, offset)
        shuffled = self._shuffled(pass_, stream, number, right - left)
        on_line = left + int(shuffled[begin + offset - left])
        line = self._line(pass_)
        place = int(np.searchsorted(line.starts, on_line, side="right")) - 1
        return Place(int(line.shards[place]), on_line - int(line.starts[place]))

    def ahead(self, stream: int, position: int) -> tuple[list[int], int]:
        """The shards of the window that holds a position of a stream, and the position after that window."""
        begin, end = self.piece(stream)
        pass_, offset = divmod(position, end - begin)
        _, left, right = self.window_bounds(pass_, stream, offset)
        line = self._line(pass_)
        first = int(np.searchsorted(line.starts, left, side="right")) - 1
        last = int(np.searchsorted(line.starts, right, side="left"))
        return line.shards[first:last].tolist(), position - offset + right - begin


class Slot(NamedTuple):
    """One place of a global batch: its number in the batch, its split, the stream it comes from, and its sample."""

    number: int
    labelled: bool
    stream: int
    position: int  # in the stream, counted from the beginning of the run
    place: Place


class BatchOrder:
    """Global batches of half labelled, half unlabelled samples.

    Args:
        labelled, unlabelled: samples per shard of the two training splits.
        batch_size: B, the global batch; a multiple of 2 * streams.
        streams, window, seed: as for StreamOrder.

    Raises:
        ValueError: a batch that cannot be dealt evenly, or more streams than shards.
    """

    def __init__(
        self,
        labelled: Sequence[int] | NDArray[np.int64],
        unlabelled: Sequence[int] | NDArray[np.int64],
        batch_size: int,
        streams: int,
        window: int,
        seed: int,
    ):
        if batch_size % (2 * streams):
            raise ValueError(f"a batch of {batch_size} cannot be dealt: it must be a multiple of 2 x {streams} streams")
        self.batch_size, self.streams = batch_size, streams
        self.splits = (
            StreamOrder(labelled, streams, window, seed, split=0),
            StreamOrder(unlabelled, streams, window, seed, split=1),
        )

    @property
    def steps_per_epoch(self) -> int:
        return (self.splits[0].total + self.splits[1].total) // self.batch_size

    def batch(self, step: int, begin: int = 0, end: int | None = None) -> list[Slot]:
        """Slots [begin, end) of global batch `step`; all of them by default."""
        per_stream = self.batch_size // (2 * self.streams)
        slots = []
        for number in range(begin, self.batch_size if end is None else end):
            pair, unlabelled = divmod(number, 2)
            stream, within = divmod(pair, per_stream)
            position = step * per_stream + within
            place = self.splits[unlabelled].at(stream, position)
            slots.append(Slot(number, not unlabelled, stream, position, place))
        return slots

    def instead(self, slot: Slot, distance: int) -> Slot:
        """What takes a slot whose sample is damaged: the sample that comes `distance` later in the same stream."""
        position = slot.position + distance
        return slot._replace(position=position, place=self.splits[not slot.labelled].at(slot.stream, position))

    def upcoming(self, step: int, begin: int, end: int) -> list[tuple[bool, int]]:
        """(labelled, shard) of the windows that slots [begin, end) read at a step, and of the windows after them."""
        per_stream = self.batch_size // (2 * self.streams)
        streams = range(begin // 2 // per_stream, (end // 2 - 1) // per_stream + 1)
        now, later = [], []
        for split, labelled in zip(self.splits, (True, False), strict=True):
            for stream in streams:
                position, end_of_batch = step * per_stream, (step + 1) * per_stream
                while position < end_of_batch:
                    shards, position = split.ahead(stream, position)
                    now += [(labelled, shard) for shard in shards]
                later += [(labelled, shard) for shard in split.ahead(stream, position)[0]]
        return now + later


def rank_slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """[begin, end) of the slots that a rank computes.

    Raises:
        ValueError: a batch that the world size does not divide.
    """
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} cannot be dealt to {world_size} processes: it must be a multiple")
    share = batch_size // world_size
    return rank * share, (rank + 1) * share
