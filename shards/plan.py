"""Which samples go into which shard: a pure function of the source and the settings."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from sptnet_shards.images import Resize, Transform, keep
from sptnet_shards.protocol import labelled_positions
from sptnet_shards.source import Item, Source, SourceError

from sptnet.data.keyed import DEAL, permutation
from sptnet.data.manifest import KINDS, SCHEMA, Kind

TRAIN_SHARDS = 16  # at least, so that small datasets can be streamed and shuffled too
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
        on_error: what happens to an image that does not decode.
    """

    labelled_fraction: float = 0.5
    seed: int = 0
    shard_bytes: int = 256 * 10**6
    resize: Resize | None = None
    on_error: Literal["fail", "skip"] = "fail"

    def transform(self) -> Transform:
        return keep if self.resize is None else self.resize

    def recorded(self) -> dict[str, Any]:
        """What was done to the images, for the manifest; empty where their bytes are untouched."""
        return {} if self.resize is None else self.resize.recorded()


class Planned(NamedTuple):
    """A shard that is to be written: its file name, kind, and (uid, item) of its samples in order."""

    file: str
    kind: Kind
    samples: list[tuple[int, Item]]


def plan(source: Source, settings: Settings) -> list[Planned]:
    """Deal the samples of every kind to shards of about equal counts, in a seeded random order.

    Raises:
        SourceError: a fraction that leaves nothing labelled or nothing unlabelled, or no training images.
    """
    if not source.train:
        raise SourceError(f"{source.name} has no training images")
    labelled = source.labelled
    if labelled is None:
        labelled = frozenset(labelled_positions(source, settings.labelled_fraction, settings.seed))
    train = list(enumerate(source.train))
    members: dict[Kind, list[tuple[int, Item]]] = {
        "labelled": [pair for pair in train if pair[0] in labelled],
        "unlabelled": [pair for pair in train if pair[0] not in labelled],
        "test": list(enumerate(source.test)),
    }
    ratio = 1.0 if settings.resize is None else _size_ratio(source, settings)
    planned = []
    for kind in KINDS:
        samples = members[kind]
        if not samples:
            continue
        expected = ratio * sum(item.bytes for _, item in samples)
        by_size = max(1, round(expected / settings.shard_bytes))
        count = min(len(samples), by_size if kind == "test" else max(TRAIN_SHARDS, by_size))
        order = permutation(settings.seed, DEAL, KINDS.index(kind), 0, 0, len(samples))
        for number, part in enumerate(np.array_split(order, count)):
            planned.append(Planned(f"{PREFIX[kind]}-{number:06d}.tar", kind, [samples[i] for i in part]))
    return planned


def _size_ratio(source: Source, settings: Settings) -> float:
    """Bytes after the resize per byte before it, from a few images; damaged ones are left for later."""
    before = after = 0
    for i in permutation(settings.seed, DEAL, len(KINDS), 0, 0, len(source.train))[:SAMPLED]:
        item = source.train[i]
        try:
            after += len(settings.transform()(source.read(item.where)).encoded)
            before += item.bytes
        except ValueError:
            continue
    return after / before if before else 1.0


def fingerprint(source: Source, settings: Settings) -> str:
    """What two conversions must have in common for one to continue the other."""
    digest = hashlib.sha256()
    resize = settings.recorded()
    # what happens to a bad image is no part of it: who is told to leave it out may go on where the conversion stopped
    strict = {**asdict(settings), "on_error": "fail"}
    head = {**strict, "resize": resize, "schema": SCHEMA, "name": source.name, "classes": source.classes}
    head |= {"num_new": source.num_new, "labelled": None if source.labelled is None else sorted(source.labelled)}
    digest.update(json.dumps({**head, "num_old": source.num_old}, sort_keys=True).encode())
    for items in (source.train, source.test):
        digest.update(f"{len(items)}\n".encode())
        for item in items:
            digest.update("\0".join(map(str, item)).encode() + b"\n")
    return digest.hexdigest()
