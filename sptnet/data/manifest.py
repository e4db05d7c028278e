"""The on-disk format: a folder of tar shards, their indexes, and `manifest.json` (more in shards/README.md).

    manifest.json                   name, classes (old ones first), num_old, protocol, transform, shards, skipped
    train-labelled-000000.tar       WebDataset members <uid>.<jpg|png|webp> and <uid>.cls (the target, as text)
    train-labelled-000000.idx.npy   [samples] of (uid, target, offset, size), little-endian int64 each
    train-unlabelled-000000.tar     the same; targets are there for evaluation only
    test-000000.tar

`offset` and `size` (bytes) are those of the image in its tar. A uid is a sample's position in the source's own order
of training or test images, so it is unique within training (both kinds together) and within test. Two entries of
`shards` may name one tar with two indexes: tars that others made hold labelled and unlabelled samples together.
Nothing here is pickled, and nothing pickled is ever read.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sptnet.errors import Outcome, SptnetError

SCHEMA = "sptnet-shards/2"
MANIFEST = "manifest.json"
Kind = Literal["labelled", "unlabelled", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INDEX_DTYPE = np.dtype([("uid", "<i8"), ("target", "<i8"), ("offset", "<i8"), ("size", "<i8")])
INDEX_HEADER = 4096  # bytes; more than numpy's header of such an array can have


class DatasetError(SptnetError, ValueError):
    """A dataset that cannot be read as one; the message names the file."""


class UnreachableError(DatasetError):
    """Shards that could not be read now, and perhaps can later: a network or a disk that fails."""

    outcome: Outcome = "retry"


@dataclass(frozen=True)
class Shard:
    """One tar file and its index. bytes and sha256 are those of the tar, index_sha256 of the index."""

    file: str
    index: str
    kind: Kind
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds.

    Attributes:
        classes: names in the order of targets, old classes first.
        protocol: how old classes and labelled images were chosen: seed, labelled_fraction, the source's counts, and
            what the source adds.
        transform: what was done to the images at sharding; empty where their bytes are untouched.
        skipped: images that did not decode and were left out: uid, part and file of each.
    """

    name: str
    classes: list[str]
    num_old: int
    protocol: dict[str, Any]
    shards: list[Shard]
    transform: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    schema: str = SCHEMA

    def of_kind(self, kind: Kind) -> list[Shard]:
        return [shard for shard in self.shards if shard.kind == kind]

    def samples(self, kind: Kind) -> int:
        return sum(shard.samples for shard in self.of_kind(kind))

    def digest(self) -> str:
        """sha256 of all that decides which image a sample is and what its target is."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all."""
    temporary = root / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    temporary.replace(root / MANIFEST)


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Parse and check a `manifest.json`; `where` is its path or URL, for messages.

    Raises:
        DatasetError: another schema, or a malformed entry.
    """
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{where} is not valid JSON ({error}): make the shards again") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise DatasetError(f"{where} has schema {found!r}, this version reads {SCHEMA!r}: make the shards again")
    try:
        manifest = Manifest(**{**raw, "shards": [Shard(**shard) for shard in raw["shards"]]})
    except (TypeError, KeyError) as error:
        raise DatasetError(f"{where} is malformed ({error}): make the shards again") from None
    if not 0 < manifest.num_old <= len(manifest.classes):
        raise DatasetError(f"{where} names {manifest.num_old} old classes of {len(manifest.classes)}")
    for shard in manifest.shards:
        if shard.kind not in KINDS or any(Path(file).name != file for file in (shard.file, shard.index)):
            raise DatasetError(f"{where} has a shard entry that is none: {shard.file!r} of kind {shard.kind!r}")
    return manifest


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json` and that all files it names are there with their sizes.

    Raises:
        DatasetError: no dataset, another schema, a malformed entry, or a missing or resized shard.
    """
    path = root / MANIFEST
    try:
        manifest = parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise DatasetError(
            f"{root} holds no dataset ({MANIFEST} is missing): make one with shards/make_shards.py"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    for shard in manifest.shards:
        _check_files(root, shard)
    return manifest


def _check_files(root: Path, shard: Shard) -> None:
    for path in (root / shard.file, root / shard.index):
        if not path.is_file():
            raise DatasetError(f"{path} is missing: make the shards again or copy it here")
    found = (root / shard.file).stat().st_size
    if found != shard.bytes:
        raise DatasetError(f"{root / shard.file} has {found} bytes, the manifest says {shard.bytes}: copy it again")


def parse_index(encoded: bytes, shard: Shard, where: str) -> NDArray[np.void]:
    """The index of a shard: [samples] records of INDEX_DTYPE. `where` is its path or URL, for messages.

    Raises:
        DatasetError: not the index that the manifest means, or one that points outside its tar.
    """
    if hashlib.sha256(encoded).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{where} is not the index that the manifest means (sha256): copy it again")
    if len(encoded) > INDEX_HEADER + shard.samples * INDEX_DTYPE.itemsize:
        raise DatasetError(f"{where} is longer than an index of {shard.samples} samples: make the shards again")
    try:
        index = np.load(io.BytesIO(encoded), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{where} cannot be read ({error}): make the shards again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise DatasetError(f"{where} holds {index.shape} of {index.dtype}, not {shard.samples} index entries")
    if len(index) and (
        index["offset"].min() < 0 or index["size"].min() <= 0 or (index["offset"] + index["size"]).max() > shard.bytes
    ):
        raise DatasetError(f"{where} points outside of {shard.file}: make the shards again")
    return np.asarray(index)
