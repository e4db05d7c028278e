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
import io
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from sptnet.data.format.faults import DatasetError, unreadable
from sptnet.data.format.fields import STRICT, Count, Facts, Name, is_count, short, unique
from sptnet.data.format.files import open_regular, replacing
from sptnet.data.format.presence import check_files
from sptnet.data.format.shard_lines import BEGIN, split_manifest
from sptnet.data.format.shard_list import CODES
from sptnet.data.format.shard_list import KINDS as KINDS
from sptnet.data.format.shard_list import Kind as Kind
from sptnet.data.format.shard_list import Shard as Shard
from sptnet.data.format.shard_list import Shards as Shards

SCHEMA, BEFORE = "sptnet-shards/3", "sptnet-shards/2"  # of version 2: no paths, no unknown targets
UNKNOWN = -1  # the target of an image whose class nobody knows; only in unlabelled shards
MANIFEST = "manifest.json"
END = 2**16  # bytes at either end of it, in which its schema is: `write_manifest` writes it last
LARGEST_MANIFEST = 2**30  # bytes; one of 2,300,000 shards
LARGEST_FREE = 2**28  # bytes of one that is not laid out as `write_manifest` does it


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
    shards: Shards
    transform: Facts = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    num_new: Count | None = None
    unknown: bool = False
    schema: str = SCHEMA

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> "Manifest":
        if isinstance(info.context, _Standing) and [shard.file for shard in self.shards] == [info.context.file]:
            object.__setattr__(self, "shards", info.context.shards)
        if not len(self.shards):
            raise ValueError("it has no shards")
        if not 0 < self.num_old <= len(self.classes):
            raise ValueError(f"it names {self.num_old} old classes of {len(self.classes)}")
        if self.schema == BEFORE and (self.unknown or self.num_new is not None or self.shards[0].paths is not None):
            raise ValueError(f"it has what {BEFORE} has not")
        if self.num_new is not None and not self.unknown:
            raise ValueError("it has num_new, and targets that say how many new classes there are")
        if fault := self.shards.fault():
            raise ValueError(fault)
        if fault := _protocol_fault(self):
            raise ValueError(f"its protocol {fault}")
        return self

    def of_kind(self, kind: Kind) -> Shards:
        return self.shards.of_kind(kind)

    def samples(self, kind: Kind) -> int:
        return int(self.shards.samples[self.shards.kinds == CODES[kind]].sum())

    def targets(self, kind: Kind) -> int:
        """Targets of samples of this kind are below this number."""
        return self.num_old if kind == "labelled" else len(self.classes)

    def digest(self) -> str:
        """sha256 of all that decides which image a sample is and what its target is; as versions before computed it."""
        told = self._facts() | {"schema": BEFORE}
        if not self.unknown:
            del told["num_new"], told["unknown"]
        before, after = ({k: v for k, v in told.items() if (k < "shards") == first} for first in (True, False))
        digest = hashlib.sha256(f'{json.dumps(before, sort_keys=True)[:-1]}, "shards": ['.encode())
        for number, record in enumerate(self.shards.digest_records()):
            digest.update((b", " if number else b"") + record)
        digest.update(f"], {json.dumps(after, sort_keys=True)[1:]}".encode())
        return digest.hexdigest()

    def _facts(self) -> dict[str, Any]:
        """What it says beside its shards, as JSON has it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shards"}

    def encoded(self) -> Iterator[bytes]:
        """The text of a `manifest.json`, in pieces; `split_manifest` reads what is laid out so."""
        facts, names = self._facts(), [f.name for f in fields(self)]
        first = names[: names.index("shards")]
        yield json.dumps({name: facts.pop(name) for name in first}, indent=1)[: -len("\n}")].encode() + b"," + BEGIN
        for number, shard in enumerate(self.shards):
            record = json.dumps(asdict(shard), indent=1).replace("\n", "\n  ")
            yield f"{',' + chr(10) if number else ''}  {record}".encode()
        yield f"\n ],{json.dumps(facts, indent=1)[1:]}\n".encode()

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


class _Standing(NamedTuple):
    """What a shard of a name that nothing else has stands for while the rest of a manifest is checked."""

    file: str
    shards: Shards


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all; raises OSError."""
    with replacing(root / MANIFEST) as file:
        for piece in manifest.encoded():
            file.write(piece)


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check a `manifest.json`; `where` is its path or URL, for messages.

    Raises:
        DatasetError: another schema, or anything that is not as `Manifest` says.
    """
    return load_manifest(io.BytesIO(text), where)


def load_manifest(file: IO[bytes], where: str) -> Manifest:
    """`parse_manifest` of a file, a piece at a time: of a million shards it takes 2 to 3 s and 265 MB.

    Raises:
        DatasetError: as `parse_manifest`.
        OSError: it cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    if size > LARGEST_MANIFEST:
        raise DatasetError(f"{where} has {size:,} bytes, and at most {LARGEST_MANIFEST:,} are read")
    file.seek(0)
    if (split := split_manifest(file)) is not None:
        standing = _Standing(f"{secrets.token_hex(16)}.tar", split.shards)
        record = asdict(Shard(standing.file, f"{standing.file}.npy", "test", 0, 0, "0" * 64, "0" * 64))
        if split.shards[0].paths is None:
            del record["paths"], record["paths_sha256"]
        text = split.before + json.dumps(record).encode() + split.after
        try:
            manifest = _checked(text, where, standing)
        except DatasetError:
            if size > LARGEST_FREE:
                raise
        else:
            if manifest.shards is split.shards:
                return manifest
    if size > LARGEST_FREE:
        raise DatasetError(
            f"{where} has {size:,} bytes, and of one that is not laid out as make_shards does it {LARGEST_FREE:,} are "
            "read: make the shards again"
        )
    file.seek(0)
    return _checked(file.read(), where, None)


def _checked(text: bytes, where: str, standing: _Standing | None) -> Manifest:
    try:
        manifest = _MANIFEST.validate_json(text, context=standing)
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


def is_dataset(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, be it damaged: the name is not ours alone."""
    try:
        with open(open_regular(folder / MANIFEST), "rb") as file:
            mark, size = b'"sptnet-shards/', os.fstat(file.fileno()).st_size
            return mark in file.read(END) or mark in os.pread(file.fileno(), END, max(0, size - END))
    except OSError:
        return False


def read_manifest(root: Path, look: bool = True) -> Manifest:
    """Read and check `manifest.json` and that all files it names are there with their sizes.

    Args:
        look: for the files; one process of a node is enough, and a look at 10^6 of them on a shared disk takes minutes.

    Raises:
        DatasetError: no dataset, another schema, a malformed entry, or a missing or resized shard.
    """
    path = root / MANIFEST
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            manifest = load_manifest(file, str(path))
    except FileNotFoundError:
        raise DatasetError(f"{root} holds no dataset ({MANIFEST} is missing): make one with sptnet-shards") from None
    except OSError as error:
        raise unreadable(f"{path} cannot be read", error) from None
    if look:
        check_files(root, manifest.shards)
    return manifest
