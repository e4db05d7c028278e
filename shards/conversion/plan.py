"""Which samples go into which shard: a pure function of the source, the settings, and how many shards there are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.conversion.images import Resize, Transform, keep
from sptnet_shards.protocol import labelled_positions
from sptnet_shards.source import Source, SourceError

from sptnet.data.format.manifest import KINDS, LARGEST_MANIFEST, Kind
from sptnet.data.keyed import DEAL, permutation

TRAIN_SHARDS = 16  # at least, so that small datasets can be streamed and shuffled too
MOST_SHARDS = LARGEST_MANIFEST // 500  # 475 bytes are said of each, by names as they are given here
SAMPLED = 64  # images that are resized to learn how large the others will be
PREFIX: dict[Kind, str] = {"labelled": "train-labelled", "unlabelled": "train-unlabelled", "test": "test"}


@dataclass(frozen=True)
class Settings:
    """How a source is converted.

    Attributes:
        labelled_fraction: share of the training images of old classes that are labelled.
        seed: of that choice and of the dealing to shards.
        shard_bytes: about how large a shard becomes.
        resize: None keeps the bytes.
        on_error: what happens to an image that cannot be read or does not decode; to leave out all that do not, each is
            decoded.
    """

    labelled_fraction: float = 0.5
    seed: int = 0
    shard_bytes: int = 256 * 10**6
    resize: Resize | None = None
    on_error: Literal["fail", "skip"] = "fail"

    def transform(self) -> Transform:
        return self.resize or partial(keep, decoded=self.on_error == "skip")

    def recorded(self) -> dict[str, Any]:
        """What was done to the images, for the manifest; empty where their bytes are untouched."""
        return {} if self.resize is None else self.resize.recorded()

    def asked(self) -> dict[str, Any]:
        """What two tasks must have in common, by the names of the options.

        What happens to a bad image is no part of it: who is told to leave it out may go on where another one stopped.
        """
        return {
            "--labelled-fraction": self.labelled_fraction,
            "--seed": self.seed,
            "--shard-mb": self.shard_bytes // 10**6,
            "--resize": self.recorded() or None,
        }


class Planned(NamedTuple):
    """A shard that is to be written: its file name, kind, and the uids of its samples in order, int64 [samples]."""

    file: str
    kind: Kind
    uids: NDArray[np.int64]


def plan(source: Source, settings: Settings, shards: Mapping[str, int]) -> list[Planned]:
    """Deal the samples of every kind to shards of about equal counts, in a seeded random order.

    Args:
        shards: how many there are to be of every kind, see `shard_counts`.
    """
    planned = []
    for kind, uids in _members(source, settings).items():
        if not len(uids):
            continue
        order = permutation(settings.seed, DEAL, KINDS.index(kind), 0, 0, len(uids))
        for number, part in enumerate(np.array_split(uids[order], shards[kind])):
            planned.append(Planned(shard_file(kind, number), kind, part))
    return planned


def shard_file(kind: Kind, number: int) -> str:
    """`train-labelled-000000.tar`."""
    return f"{PREFIX[kind]}-{number:06d}.tar"


def shard_counts(source: Source, settings: Settings) -> dict[Kind, tuple[int, int]]:
    """How many samples and shards there are of every kind.

    With `settings.resize` it depends on what a codec makes of a few images, so it is found once and kept.

    Raises:
        SourceError: a fraction that leaves nothing labelled or unlabelled, or no training images, or more shards
            than a manifest holds.
    """
    if not source.train:
        raise SourceError(f"{source.name} has no training images")
    ratio = 1.0 if settings.resize is None else _size_ratio(source, settings)
    counts = {}
    for kind, uids in _members(source, settings).items():
        expected = ratio * int(source.part(kind).sizes[uids].sum())
        by_size = max(1, round(expected / settings.shard_bytes))
        counts[kind] = len(uids), min(len(uids), by_size if kind == "test" else max(TRAIN_SHARDS, by_size))
    if (shards := sum(number for _, number in counts.values())) > MOST_SHARDS:
        enough = -(-settings.shard_bytes * shards // MOST_SHARDS // 10**6) + 1
        raise SourceError(f"{shards:,} shards are more than the {MOST_SHARDS:,} of a dataset: say --shard-mb {enough}")
    return counts


def _members(source: Source, settings: Settings) -> dict[Kind, NDArray[np.int64]]:
    """The uids of every kind, ascending."""
    labelled = source.labelled
    if labelled is None:
        labelled = labelled_positions(source, settings.labelled_fraction, settings.seed)
    is_labelled = np.zeros(len(source.train), bool)
    is_labelled[labelled] = True
    return {
        "labelled": np.flatnonzero(is_labelled),
        "unlabelled": np.flatnonzero(~is_labelled),
        "test": np.arange(len(source.test)),
    }


def _size_ratio(source: Source, settings: Settings) -> float:
    """Bytes after the resize per byte before it, from a few images; damaged ones are left for later."""
    before = after = 0
    for i in permutation(settings.seed, DEAL, len(KINDS), 0, 0, len(source.train))[:SAMPLED]:
        item = source.train[i]
        try:
            after += len(settings.transform()(source.read(item.where)).encoded)
            before += item.bytes
        except (ValueError, MemoryError):
            continue
    return after / before if before else 1.0
