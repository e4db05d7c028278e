"""The shards of a dataset as columns: a million of them in 200 MB, where a million objects take ten times as much."""

import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import GetCoreSchemaHandler, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema

from sptnet.data.format.fields import LONGEST_NAME, STRICT, Count, Digest, FileName
from sptnet.data.format.shard_text import json_objects

Kind = Literal["labelled", "unlabelled", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CODES = {kind: code for code, kind in enumerate(KINDS)}
KIND_NAMES = np.array(KINDS, np.bytes_)
MEMBER = 1024  # bytes that a sample takes in a tar at least: a header and a block
BLOCK = 8192  # shards of a block, where they come as objects
KIND_BITS = np.frombuffer(secrets.token_bytes(8 * len(KINDS)), np.uint64)
FACTORS = np.frombuffer(secrets.token_bytes(8 * LONGEST_NAME), np.uint64) | np.uint64(1)


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


class Block(NamedTuple):
    """Some shards: names as bytes [n] (paths: empty where there are none), digests as uint8 [n, 32]."""

    file: NDArray[np.bytes_]
    index_file: NDArray[np.bytes_]
    kind: NDArray[np.int8]
    samples: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    index_sha256: NDArray[np.uint8]
    paths: NDArray[np.bytes_]
    paths_sha256: NDArray[np.uint8]

    def shard(self, row: int) -> Shard:
        paths = self.paths[row].decode() or None
        return Shard(
            self.file[row].decode(), self.index_file[row].decode(), KINDS[self.kind[row]], int(self.samples[row]),
            int(self.bytes[row]), self.sha256[row].tobytes().hex(), self.index_sha256[row].tobytes().hex(), paths,
            None if paths is None else self.paths_sha256[row].tobytes().hex(),
        )  # fmt: skip


class Shards(Sequence[Shard]):
    """Shards in the manifest's order; reading one makes a `Shard`.

    Args:
        blocks: their columns.
        rows: which of them, [n]; None for all.

    Attributes:
        samples, bytes: int64 [n].
        kinds: int8 [n], places in KINDS.
    """

    def __init__(self, blocks: Sequence[Block], rows: NDArray[np.int64] | None = None):
        self._blocks, self._rows = blocks, rows
        self._ends = np.cumsum([len(block.kind) for block in blocks]).tolist()
        self.samples, self.bytes, self.kinds = (
            np.concatenate([getattr(block, name) for block in blocks] or [np.zeros(0, np.int64)])
            for name in ("samples", "bytes", "kind")
        )
        if rows is not None:
            self.samples, self.bytes, self.kinds = self.samples[rows], self.bytes[rows], self.kinds[rows]

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Shards":
        """The columns of shards that are there as objects."""
        if isinstance(shards, Shards):
            return shards
        whole = list(shards)
        return cls([block_of(whole[begin : begin + BLOCK]) for begin in range(0, len(whole), BLOCK)])

    def of_kind(self, kind: Kind) -> "Shards":
        rows = np.flatnonzero(self.kinds == CODES[kind])
        return self._taken(rows)

    def names(self) -> Iterator[tuple[str, str, int]]:
        """(file, index, bytes of the file) of each, without making a `Shard`."""
        for block, rows in self._parts():
            columns = (column[rows].tolist() for column in (block.file, block.index_file, block.bytes))
            for file, index, size in zip(*columns, strict=True):
                yield file.decode(), index.decode(), size

    def digest_records(self) -> Iterator[bytes]:
        """Blocks of them as `json.dumps(..., sort_keys=True)` writes a list of what decides which image a sample is."""
        for block, rows in self._parts():
            if len(rows):
                yield json_objects({
                    "bytes": block.bytes[rows], "file": block.file[rows], "index": block.index_file[rows],
                    "index_sha256": block.index_sha256[rows], "kind": KIND_NAMES[block.kind[rows]],
                    "samples": block.samples[rows], "sha256": block.sha256[rows],
                })  # fmt: skip

    def fault(self) -> str | None:
        """What shards together must not be: an index, or a tar with one kind, that is there twice, or is both; or None.

        By hashes of 64 bits that no file can foresee; what they find is looked at by name.
        """
        files, indexes = self._hashes("file"), self._hashes("index_file")
        if not _repeated(files, indexes):
            return None
        order = np.argsort(files, kind="stable")
        same_file = files[order][1:] == files[order][:-1]
        differ = [column[order][1:] != column[order][:-1] for column in (self.bytes, self._hashes("sha256"))]
        suspected = (
            _repeated(indexes)
            or _repeated(files ^ KIND_BITS[self.kinds])
            or _repeated(files[order][np.append(True, ~same_file)], indexes)
            or bool((same_file & (differ[0] | differ[1])).any())
        )
        return self._fault_by_name() if suspected else None

    def _fault_by_name(self) -> str | None:
        for names in ([s.index for s in self], [f"{s.file} ({s.kind})" for s in self]):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    return f"{name!r} is there {names.count(name)} times"
                seen.add(name)
        if both := {s.file for s in self} & {s.index for s in self}:
            return f"{min(both)!r} is both a tar and an index"
        if len({(s.file, s.bytes, s.sha256) for s in self}) > len({s.file for s in self}):
            return "two entries of one tar differ in its bytes or sha256"
        return None

    def _hashes(self, column: str) -> NDArray[np.uint64]:
        return np.concatenate([_hashed(getattr(block, column))[rows] for block, rows in self._parts()])

    def _parts(self) -> Iterator[tuple[Block, NDArray[np.int64]]]:
        """Every block with the rows of it that are meant."""
        begin = 0
        for block, end in zip(self._blocks, self._ends, strict=True):
            if self._rows is None:
                yield block, np.arange(end - begin)
            else:
                first, last = np.searchsorted(self._rows, [begin, end])
                yield block, self._rows[first:last] - begin
            begin = end

    def _taken(self, rows: NDArray[np.int64]) -> "Shards":
        return Shards(self._blocks, rows if self._rows is None else self._rows[rows])

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> "Shards": ...
    def __getitem__(self, number: int | slice) -> "Shard | Shards":
        if isinstance(number, slice):
            return self._taken(np.arange(len(self))[number])
        row = range(len(self))[number] if self._rows is None else int(self._rows[number])
        block = bisect_right(self._ends, row)
        return self._blocks[block].shard(row - (self._ends[block - 1] if block else 0))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Shard.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        made = core_schema.no_info_after_validator_function(cls.of, handler(list[Shard]))
        python = core_schema.no_info_wrap_validator_function(
            lambda value, inner: value if isinstance(value, cls) else inner(value), made
        )
        return core_schema.json_or_python_schema(made, python)


def _hashed(values: NDArray[Any]) -> NDArray[np.uint64]:
    """64 bits of every row, of names ([n]) or digests ([n, 32]): the same however many zeros stand behind a name."""
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    words = np.zeros((len(rows), -(-rows.shape[1] // 4)), np.uint32)  # multilinear: collisions have a chance of 2^-32
    words.view(np.uint8)[:, : rows.shape[1]] = rows
    return words.astype(np.uint64) @ FACTORS[: words.shape[1]]


def _repeated(*values: NDArray[np.uint64]) -> bool:
    ordered = np.concatenate(values)
    ordered.sort()
    return bool((ordered[1:] == ordered[:-1]).any())


def block_of(shards: Sequence[Shard]) -> Block:
    rows = [
        (s.file.encode(), s.index.encode(), CODES[s.kind], s.samples, s.bytes, s.sha256, s.index_sha256,
         (s.paths or "").encode(), s.paths_sha256 or "0" * 64)
        for s in shards
    ]  # fmt: skip
    file, index, kind, samples, size, sha256, index_sha256, paths, paths_sha256 = zip(*rows, strict=True)
    return Block(
        np.array(file, np.bytes_), np.array(index, np.bytes_), np.array(kind, np.int8), np.array(samples, np.int64),
        np.array(size, np.int64), _digests(sha256), _digests(index_sha256), np.array(paths, np.bytes_),
        _digests(paths_sha256),
    )  # fmt: skip


def _digests(hexadecimal: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), np.uint8).reshape(-1, 32)
