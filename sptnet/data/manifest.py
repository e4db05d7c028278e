"""The on-disk format: a folder of tar shards, their indexes, and `manifest.json` (more in shards/README.md).

    manifest.json                   name, classes (old ones first), num_old, protocol, transform, shards, skipped
    train-labelled-000000.tar       WebDataset members <uid>.<jpg|png|webp> and <uid>.cls (the target, as text)
    train-labelled-000000.idx.npy   [samples] of (uid, target, offset, size), little-endian int64 each
    train-labelled-000000.paths.jsonl   a line of JSON per sample: its path in the source
    train-unlabelled-000000.tar     the same; targets are there for evaluation only, and -1 where nobody knows them
    test-000000.tar

`offset` and `size` (bytes) are those of the image in its tar. A uid is a sample's position in the source's own order
of training or test images, so it is unique within training (both kinds together) and within test. Two entries of
`shards` may name one tar with two indexes: tars that others made hold labelled and unlabelled samples together.
Nothing here is pickled, and nothing pickled is ever read.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from sptnet.data.fields import STRICT, Count, Digest, Facts, FileName, Name, is_count, short, unique
from sptnet.data.files import read_regular, write_whole
from sptnet.errors import Outcome, SptnetError

SCHEMA, BEFORE = "sptnet-shards/3", "sptnet-shards/2"  # of version 2: no paths, no unknown targets
UNKNOWN = -1  # the target of an image whose class nobody knows; only in unlabelled shards
MANIFEST = "manifest.json"
Kind = Literal["labelled", "unlabelled", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST_MANIFEST = 2**28  # bytes; one of 700,000 shards
MEMBER = 1024  # bytes that a sample takes in a tar at least: a header and a block


class DatasetError(SptnetError, ValueError):
    """A dataset that cannot be read as one; the message names the file."""


class UnreachableError(DatasetError):
    """Shards that could not be read now, and perhaps can later: a network or a disk that fails."""

    outcome: Outcome = "retry"


@dataclass(frozen=True, config=STRICT)
class Shard:
    """One tar file and its index. bytes and sha256 are those of the tar, index_sha256 of the index.

    `paths`, with `paths_sha256`, names the file that says where the samples came from; readers may do without it.
    """

    file: FileName
    index: FileName
    kind: Kind
    samples: Count
    bytes: Count
    sha256: Digest
    index_sha256: Digest
    paths: FileName | None = None
    paths_sha256: Digest | None = None

    @model_validator(mode="after")
    def _holds_its_samples(self) -> "Shard":
        if self.samples * MEMBER > self.bytes:
            raise ValueError(f"{self.samples} samples do not fit into the {self.bytes} bytes of {self.file}")
        if (self.paths is None) != (self.paths_sha256 is None):
            raise ValueError(f"{self.file} has paths without their sha256, or the other way round")
        return self


@with_config(STRICT)
class Skipped(TypedDict):
    """An image that did not decode and was left out. `file`: where it was in the source."""

    uid: Count
    part: Literal["train", "test"]
    file: str


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """What a dataset folder holds. Strict: what has another type, range or form is no manifest, here or on disk.

    Attributes:
        classes: names in the order of targets, old classes first; of new classes those that anybody knows.
        num_new: how many new classes there are, where targets are unknown and somebody said it.
        protocol: how old classes and labelled images were chosen: seed, labelled_fraction, the source's counts, and
            what the source adds.
        transform: what was done to the images at sharding; empty where their bytes are untouched.
        skipped: images that did not decode and were left out.
        unknown: whether the targets of unlabelled images are unknown, all of them.
    """

    name: Name
    classes: Annotated[list[Name], Field(min_length=1), AfterValidator(unique)]
    num_old: int
    protocol: Facts
    shards: Annotated[list[Shard], Field(min_length=1)]
    transform: Facts = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    num_new: Count | None = None
    unknown: bool = False
    schema: str = SCHEMA

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        if not 0 < self.num_old <= len(self.classes):
            raise ValueError(f"it names {self.num_old} old classes of {len(self.classes)}")
        unique([shard.index for shard in self.shards])
        unique([f"{shard.file} ({shard.kind})" for shard in self.shards])
        if self.schema == BEFORE and (self.unknown or self.num_new is not None or self.shards[0].paths is not None):
            raise ValueError(f"it has what {BEFORE} has not")
        if self.num_new is not None and not self.unknown:
            raise ValueError("it has num_new, and targets that say how many new classes there are")
        if both := {shard.file for shard in self.shards} & {shard.index for shard in self.shards}:
            raise ValueError(f"{min(both)!r} is both a tar and an index")
        if len({(shard.file, shard.bytes, shard.sha256) for shard in self.shards}) > len(
            {shard.file for shard in self.shards}
        ):
            raise ValueError("two entries of one tar differ in its bytes or sha256")
        if fault := _protocol_fault(self):
            raise ValueError(f"its protocol {fault}")
        return self

    def of_kind(self, kind: Kind) -> list[Shard]:
        return [shard for shard in self.shards if shard.kind == kind]

    def samples(self, kind: Kind) -> int:
        return sum(shard.samples for shard in self.of_kind(kind))

    def targets(self, kind: Kind) -> int:
        """Targets of samples of this kind are below this number."""
        return self.num_old if kind == "labelled" else len(self.classes)

    def digest(self) -> str:
        """sha256 of all that decides which image a sample is and what its target is; as versions before computed it."""
        told = asdict(self) | {"schema": BEFORE}
        told["shards"] = [{k: v for k, v in shard.items() if not k.startswith("paths")} for shard in told["shards"]]
        if not self.unknown:
            del told["num_new"], told["unknown"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def new_classes(self) -> int | None:
        """How many new classes there are; None where nobody has said it."""
        return self.num_new if self.unknown else len(self.classes) - self.num_old


def _protocol_fault(manifest: Manifest) -> str | None:
    """What a protocol says that cannot be; keys of other names are the source's own."""
    protocol = manifest.protocol
    if "seed" in protocol and not is_count(protocol["seed"]):
        return f"has the seed {short(protocol['seed'])}"
    share = protocol.get("labelled_fraction", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        return f"has the labelled_fraction {short(share)}"
    for kind in KINDS:  # a number, or a text of the source's own
        if isinstance(told := protocol.get(kind, ""), int) and told != manifest.samples(kind):
            return f"has {told} {kind} samples, the shards {manifest.samples(kind)}"
    source = protocol.get("source", {})
    if not isinstance(source, dict) or not all(is_count(count) for count in source.values()):
        return "has a source that is no list of counts"
    there = {"train": manifest.samples("labelled") + manifest.samples("unlabelled"), "test": manifest.samples("test")}
    for part, count in there.items():
        left_out = sum(skipped["part"] == part for skipped in manifest.skipped)
        if part in source and count + left_out != source[part]:
            return f"has a source of {source[part]} {part} images, shards and skipped have {count + left_out}"
    return None


_MANIFEST = TypeAdapter(Manifest)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all; raises OSError."""
    write_whole(root / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check a `manifest.json`; `where` is its path or URL, for messages.

    Raises:
        DatasetError: another schema, or anything that is not as `Manifest` says.
    """
    if len(text) > LARGEST_MANIFEST:
        raise DatasetError(f"{where} has {len(text):,} bytes, and at most {LARGEST_MANIFEST:,} are read")
    try:
        manifest = _MANIFEST.validate_json(text)
        json.loads(text, object_pairs_hook=_no_key_twice)  # pydantic takes the last, other readers the first
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        schema = _schema_of(text)
        if first["type"] == "json_invalid":
            told = f"is not valid JSON ({first['msg']})"
        elif schema not in (SCHEMA, BEFORE):
            told = f"has schema {schema!a}, this version reads {SCHEMA!r}"
        else:
            place = ".".join(map(str, first["loc"]))
            told = f"is malformed ({place}{': ' if place else ''}{first['msg']}; it says {short(first['input'])})"
        raise DatasetError(f"{where} {told}: make the shards again") from None
    except _KeyTwice as error:
        raise DatasetError(f"{where} is malformed ({error}): make the shards again") from None
    if manifest.schema not in (SCHEMA, BEFORE):
        found = ascii(manifest.schema)
        raise DatasetError(f"{where} has schema {found}, this version reads {SCHEMA!r}: make the shards again")
    return manifest


class _KeyTwice(ValueError):
    """A JSON object that says two things of one key."""


def _no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _KeyTwice("one of its objects has a key twice")
    return found


def _schema_of(text: bytes) -> Any:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return SCHEMA  # no JSON: this is what is told
    return raw.get("schema") if isinstance(raw, dict) else type(raw).__name__


def read_manifest(root: Path, look: bool = True) -> Manifest:
    """Read and check `manifest.json` and that all files it names are there with their sizes.

    Args:
        look: for the files; one process of a node is enough, and a look at 10^6 of them on a shared disk takes minutes.

    Raises:
        DatasetError: no dataset, another schema, a malformed entry, or a missing or resized shard.
    """
    path = root / MANIFEST
    try:
        manifest = parse_manifest(read_regular(path, LARGEST_MANIFEST), str(path))
    except FileNotFoundError:
        raise DatasetError(
            f"{root} holds no dataset ({MANIFEST} is missing): make one with shards/make_shards.py"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    if look:
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
