"""The on-disk format: a folder of tar shards, one index beside each shard, and `manifest.json`.

    manifest.json                   schema, name, classes (old ones first), num_old, protocol, transform, shards
    train-labelled-000000.tar       WebDataset members <uid>.<jpg|png|webp> and <uid>.cls (the target, as text)
    train-labelled-000000.idx.npy   [samples] of (uid, target, offset, size), little-endian int64 each
    train-unlabelled-000000.tar     the same; targets are there for evaluation only
    test-000000.tar

`offset` and `size` (bytes) are those of the image in its tar. A uid is a sample's position in the source's own order
of training or test images, so it is unique within training (both kinds together) and within test.
Nothing here is pickled, and nothing pickled is ever read.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

SCHEMA = "sptnet-shards/1"
MANIFEST = "manifest.json"
Kind = Literal["labelled", "unlabelled", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
INDEX_DTYPE = np.dtype([("uid", "<i8"), ("target", "<i8"), ("offset", "<i8"), ("size", "<i8")])


class DatasetError(ValueError):
    """A dataset folder that cannot be read as one; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """One tar file. bytes and sha256 are those of the tar, index_sha256 of the index beside it."""

    file: str
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
        protocol: how old classes and labelled images were chosen: seed, labelled_fraction, and what the source adds.
        transform: what was done to the images at sharding; empty where their bytes are untouched.
    """

    name: str
    classes: list[str]
    num_old: int
    protocol: dict[str, Any]
    shards: list[Shard]
    transform: dict[str, Any] = field(default_factory=dict)
    schema: str = SCHEMA

    def of_kind(self, kind: Kind) -> list[Shard]:
        return [shard for shard in self.shards if shard.kind == kind]

    def samples(self, kind: Kind) -> int:
        return sum(shard.samples for shard in self.of_kind(kind))

    def digest(self) -> str:
        """sha256 of all that decides which image a sample is and what its target is."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def index_path(shard: Path) -> Path:
    """`x/train-labelled-000000.tar` -> `x/train-labelled-000000.idx.npy`."""
    return shard.with_suffix(".idx.npy")


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all."""
    temporary = root / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    temporary.replace(root / MANIFEST)


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json` and that all files it names are there with their sizes.

    Raises:
        DatasetError: no dataset, another schema, a malformed entry, or a missing or resized shard.
    """
    path = root / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise DatasetError(
            f"{root} holds no dataset ({MANIFEST} is missing): make one with shards/make_shards.py"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error}): make the shards again") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise DatasetError(f"{path} has schema {found!r}, this version reads {SCHEMA!r}: make the shards again")
    try:
        manifest = Manifest(**{**raw, "shards": [Shard(**shard) for shard in raw["shards"]]})
    except (TypeError, KeyError) as error:
        raise DatasetError(f"{path} is malformed ({error}): make the shards again") from None
    if not 0 < manifest.num_old <= len(manifest.classes):
        raise DatasetError(f"{path} names {manifest.num_old} old classes of {len(manifest.classes)}")
    for shard in manifest.shards:
        _check_files(root, shard)
    return manifest


def _check_files(root: Path, shard: Shard) -> None:
    if shard.kind not in KINDS or Path(shard.file).name != shard.file:
        raise DatasetError(f"{root / MANIFEST} has a shard entry that is none: {shard.file!r} of kind {shard.kind!r}")
    path = root / shard.file
    if not path.is_file() or not index_path(path).is_file():
        missing = path if not path.is_file() else index_path(path)
        raise DatasetError(f"{missing} is missing: make the shards again or copy it here")
    if path.stat().st_size != shard.bytes:
        raise DatasetError(f"{path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: copy it again")


def read_index(root: Path, shard: Shard) -> NDArray[np.void]:
    """The index of a shard: [samples] records of INDEX_DTYPE.

    Raises:
        DatasetError: not an index, of another length than the manifest says, or pointing outside its tar.
    """
    path = index_path(root / shard.file)
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): make the shards again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise DatasetError(f"{path} holds {index.shape} of {index.dtype}, not {shard.samples} index entries")
    if len(index) and (
        index["offset"].min() < 0 or index["size"].min() <= 0 or (index["offset"] + index["size"]).max() > shard.bytes
    ):
        raise DatasetError(f"{path} points outside of {shard.file}: make the shards again")
    return np.asarray(index)
