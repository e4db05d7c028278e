"""What a batch holds, by number: images out of shards, or a frozen trunk's tokens in their place.

Pure functions of the number, for loader workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sptnet.data.augment import choose_views, eval_view, known_view, prepare, train_view
from sptnet.data.format.faults import DamagedSampleError, undecodable
from sptnet.data.format.manifest import Kind, Shard
from sptnet.data.image import DecodeError, decode
from sptnet.data.order import BatchOrder, Place, Slot
from sptnet.data.reader import Encoded, ShardReader
from sptnet.data.storage.store import Store
from sptnet.data.tokens import Tokens
from sptnet.names import AugmentName

Read = TypeVar("Read")
AHEAD = 64  # samples that are asked for at once where their shards are still to come: as many requests


class Batch(NamedTuple):
    """A rank's slice of global batch `step`.

    views: uint8 [V, b, 3, H, W], or float [V, b, T, D], a trunk's tokens; targets, uids: int64 [b].
    replaced: what was wrong with each sample that another one stands in for.
    """

    step: int
    views: Tensor
    targets: Tensor
    uids: Tensor
    replaced: tuple[str, ...] = ()


class EvalBatch(NamedTuple):
    """images: uint8 [n, 3, H, W], or float [n, T, D], a trunk's tokens; targets, uids: int64 [n]."""

    images: Tensor
    targets: Tensor
    uids: Tensor


@dataclass(frozen=True)
class Views:
    """What the views of a step depend on beside the order; see `train_batches`."""

    augment: AugmentName
    image_size: int
    seed: int
    views_at: Callable[[int], int]
    known: int | None
    tolerated: int


def _decoded(sample: Encoded, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The sample's image, decoded and through the part of the transforms that draws nothing."""
    try:
        return transform(decode(sample.image))
    except DecodeError as error:
        raise DamagedSampleError(undecodable(sample.shard, sample.uid, str(error))) from None


class Batches(Dataset[Batch | EvalBatch]):
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

    def needs(self, number: int) -> Sequence[Shard]:
        """The shards that a batch reads."""
        raise NotImplementedError


class _Steps(Batches):
    """Slices of global batches; where a slot's pixels or tokens come from is a subclass's affair."""

    def __init__(self, store: Store, order: BatchOrder, spec: Views, slots: tuple[int, int]):
        super().__init__(store)
        self.order, self.spec, self.slots = order, spec, slots

    def _batch(self, number: int) -> Batch:
        count = self.spec.views_at(number)
        views = self._empty(count, self.slots[1] - self.slots[0])
        told: list[tuple[int, int]] = []
        replaced: list[str] = []
        slots = self.order.batch(number, *self.slots)
        for i, slot in enumerate(slots):
            if i % AHEAD == 0:
                self._soon(slots[i : i + AHEAD])
            uid, target = self._fill(views[:, i], slot, number, replaced)
            told.append((uid, target))
        uids, targets = (torch.tensor(column) for column in zip(*told, strict=True))
        return Batch(number, views, targets, uids, tuple(replaced))

    def _soon(self, slots: Sequence[Slot]) -> None:
        """Told of the slots that are filled next."""

    def _empty(self, views: int, images: int) -> Tensor:
        raise NotImplementedError

    def _fill(self, views: Tensor, slot: Slot, step: int, replaced: list[str]) -> tuple[int, int]:
        """The views of a slot, into `views` [V, ...]; returns uid and target of their sample."""
        raise NotImplementedError

    def _sound(self, slot: Slot, replaced: list[str], read: Callable[[Place], Read]) -> Read:
        """What `read` makes of the slot's sample, or, where damage is tolerated, of the next sound one."""
        distance = 0
        while True:
            place = slot.place if distance == 0 else self.order.instead(slot, distance).place
            try:
                return read(place)
            except DamagedSampleError as error:  # and none of a disk, a network or a whole shard
                if len(replaced) >= self.spec.tolerated:
                    raise
                replaced.append(str(error))
                distance += 1

    def _chosen(self, step: int, slot: Slot, count: int) -> list[int]:
        assert self.spec.known is not None
        return choose_views(self.spec.known, self.spec.seed, step, slot.number, count)


class ImageSteps(_Steps):
    """Views drawn from images out of shards."""

    def __init__(self, store: Store, order: BatchOrder, spec: Views, slots: tuple[int, int]):
        super().__init__(store, order, spec, slots)
        self.readers = {
            labelled: ShardReader(store, store.manifest.of_kind("labelled" if labelled else "unlabelled"))
            for labelled in (True, False)
        }

    def _soon(self, slots: Sequence[Slot]) -> None:
        for kind, reader in self.readers.items():
            reader.read_ahead(slot.place for slot in slots if slot.labelled == kind)

    def _empty(self, views: int, images: int) -> Tensor:
        # channels last in memory, as the decoder writes them: a crop is then a copy of whole rows
        return _empty(views, images, size=self.spec.image_size)

    def _fill(self, views: Tensor, slot: Slot, step: int, replaced: list[str]) -> tuple[int, int]:
        spec, reader = self.spec, self.readers[slot.labelled]
        size = spec.image_size

        def read(place: Place, whole: bool = False) -> tuple[Encoded, Tensor]:
            sample = reader.read(*place, whole)
            try:
                return sample, _decoded(sample, lambda image: prepare(spec.augment, image, size))
            except DamagedSampleError:
                if sample.piece:
                    return read(place, whole=True)
                raise

        sample, image = self._sound(slot, replaced, read)
        if spec.known is None:
            for view in range(len(views)):
                views[view] = train_view(spec.augment, image, size, spec.seed, step, slot.number, view)
        else:
            for place, view in enumerate(self._chosen(step, slot, len(views))):
                views[place] = known_view(spec.augment, image, size, sample.uid, view)
        return sample.uid, sample.target

    def upcoming(self, number: int) -> Sequence[Shard]:
        return self._shards(self.order.upcoming(number, *self.slots))

    def needs(self, number: int) -> Sequence[Shard]:
        slots = self.order.batch(number, *self.slots)
        return self._shards(sorted({(slot.labelled, slot.place.shard) for slot in slots}))

    def _shards(self, places: Sequence[tuple[bool, int]]) -> list[Shard]:
        return [self.readers[labelled].shards[number] for labelled, number in places]


class TokenSteps(_Steps):
    """Known views as the tokens that a frozen trunk made of them; no shard is opened."""

    def __init__(self, store: Store, order: BatchOrder, spec: Views, slots: tuple[int, int], tokens: Tokens):
        super().__init__(store, order, spec, slots)
        self.tokens = tokens

    def _empty(self, views: int, images: int) -> Tensor:
        return torch.from_numpy(self.tokens.empty(views, images))

    def _fill(self, views: Tensor, slot: Slot, step: int, replaced: list[str]) -> tuple[int, int]:
        kind: Kind = "labelled" if slot.labelled else "unlabelled"
        chosen, rows = self._chosen(step, slot, len(views)), views.numpy()

        def read(place: Place) -> tuple[int, int]:
            part = self.tokens.part(kind, place.shard)
            for into, view in zip(rows, chosen, strict=True):
                part.read(place.position, view, into)
            return int(part.uid[place.position]), int(part.target[place.position])

        return self._sound(slot, replaced, read)

    def upcoming(self, number: int) -> Sequence[Shard]:
        return []

    def needs(self, number: int) -> Sequence[Shard]:
        return []


class EvalBatches(Batches):
    def __init__(
        self, store: Store, kind: Kind, batch_size: int, augment: AugmentName, image_size: int, tokens: Tokens | None
    ):
        super().__init__(store)
        shards = store.manifest.of_kind(kind)
        self.reader = ShardReader(store, shards)
        self.kind, self.tokens = kind, tokens
        self.batch_size, self.augment, self.image_size = batch_size, augment, image_size
        self.starts = np.concatenate(([0], np.cumsum(shards.samples)))

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
        if self.tokens is not None:
            return self._of_tokens(self.tokens, list(zip(shards.tolist(), positions.tolist(), strict=True)))
        samples = [self.reader.read(*place) for place in zip(shards.tolist(), positions.tolist(), strict=True)]
        images = _empty(len(samples), size=self.image_size)
        for i, sample in enumerate(samples):
            images[i] = _decoded(sample, lambda image: eval_view(self.augment, image, self.image_size))
        return EvalBatch(
            images,
            torch.tensor([sample.target for sample in samples]),
            torch.tensor([sample.uid for sample in samples]),
        )

    def _of_tokens(self, tokens: Tokens, places: list[tuple[int, int]]) -> EvalBatch:
        rows, told = tokens.empty(len(places)), []
        for i, (shard, position) in enumerate(places):
            part = tokens.part(self.kind, shard)
            part.read(position, tokens.shape.evaluated(self.kind), rows[i])
            told.append((int(part.target[position]), int(part.uid[position])))
        targets, uids = (torch.tensor(column) for column in zip(*told, strict=True))
        return EvalBatch(torch.from_numpy(rows), targets, uids)

    def upcoming(self, number: int) -> Sequence[Shard]:
        if self.tokens is not None:
            return []
        first = int(self._places(min(number, len(self) - 1))[0][0])
        return self.reader.shards[first : first + 2]

    def needs(self, number: int) -> Sequence[Shard]:
        shards = [] if self.tokens is not None else np.unique(self._places(number)[0]).tolist()
        return [self.reader.shards[shard] for shard in shards]


def _empty(*leading: int, size: int) -> Tensor:
    """uint8 [..., 3, size, size], channels last in memory."""
    return torch.empty(*leading, size, size, 3, dtype=torch.uint8).movedim(-1, -3)
