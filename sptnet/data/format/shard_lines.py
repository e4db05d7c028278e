"""The shards of a manifest read line by line, as `make_shards` writes them: 1.7 us and 200 bytes a shard.

A block of lines is compared with the lines that it must have, and its values with what `Shard` allows; nothing that
pydantic would refuse passes. Whatever differs, in its form or in a value, is no block: it is left to pydantic, which
takes any form and says what is wrong.
"""

from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.fields import LONGEST_NAME, MOST
from sptnet.data.format.shard_list import CODES, MEMBER, Block, Shards
from sptnet.data.format.shard_text import PLAIN

CHUNK = 2**20  # bytes that are read at a time
LARGEST_REST = 2**28  # bytes before or behind the shards
BEGIN, END, LAST = b'\n "shards": [\n', b"\n  }\n ]", b"  },"
NAMES, COUNTS, DIGESTS = ("file", "index"), ("samples", "bytes"), ("sha256", "index_sha256")
KEYS = ("file", "index", "kind", "samples", "bytes", "sha256", "index_sha256")  # as `Shard` declares them
LONG = len(str(MOST))  # digits
LONGEST_LINE = LONGEST_NAME + 64  # bytes of a key, a name and what is around them, or of a digest
_HEX, _DIGITS = b"0123456789abcdef", b"\0" + b"0123456789"  # zeros stand behind what is shorter than others


class Split(NamedTuple):
    """A manifest's text before and after its shards, with the brackets of their list, and the shards."""

    before: bytes
    shards: Shards
    after: bytes


def split_manifest(file: IO[bytes]) -> Split | None:
    """Read a manifest from its beginning; None where its shards are not as `make_shards` writes them."""
    text = bytearray()
    while (begin := text.find(BEGIN, max(0, len(text) - CHUNK - len(BEGIN)))) < 0:
        if not (more := file.read(CHUNK)) or len(text) > LARGEST_REST:
            return None
        text += more
    before, rest = bytes(text[:begin]), bytes(text[begin + len(BEGIN) :])
    del text
    blocks: list[Block] = []
    while True:
        lines = _lines_of(rest)
        # a shard is taken when a line has begun behind it: with the comma in its last line
        whole = len(lines.begins) // (each := _lines_of_a_shard(lines)) * each
        block = _block_of(_compared(lines.part(0, whole), each), each) if whole else None
        if block is not None:
            blocks.append(block)
            rest = rest[lines.begins[whole - 1] + lines.lengths[whole - 1] + 1 :]
        elif (end := rest.find(END)) >= 0:
            last = _block_of(_lines_of(rest[:end] + b"\n" + LAST + b"\n"), each)
            return None if last is None else _split(before, [*blocks, last], rest[end:] + file.read(LARGEST_REST))
        elif len(rest) > 2 * CHUNK:
            return None
        if not (more := file.read(CHUNK)):
            return None
        rest += more


def _split(before: bytes, blocks: list[Block], rest: bytes) -> Split:
    return Split(before + BEGIN, Shards(blocks), rest[rest.index(b"]") - 1 :])


class _Lines(NamedTuple):
    """Lines of a text, [n]: where they begin in its bytes, and how long they are without their ends.

    LONGEST_LINE zeros stand behind the text. `same`, where its shards are equally long: of every byte of the first one
    whether all of them have it.
    """

    text: NDArray[np.uint8]
    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    same: NDArray[np.bool_] | None = None

    def part(self, first: int, end: int | None = None, step: int = 1) -> "_Lines":
        return self._replace(begins=self.begins[first:end:step], lengths=self.lengths[first:end:step])

    def rows(self, length: int) -> NDArray[np.uint8]:
        """So many bytes of each, [n, length]: behind a shorter line what follows it in the text."""
        if self.same is not None:  # of the same line of every shard: nothing is copied
            return np.ndarray((len(self.begins), length), np.uint8, self.text, self.begins[0], (len(self.same), 1))
        return np.ndarray((len(self.text) - length + 1, length), np.uint8, self.text, 0, (1, 1))[self.begins]

    def have(self, value: bytes, at: int = 0) -> bool:
        """Whether all of them have `value`, so many bytes behind their beginning."""
        first = self.begins[0] + at
        if self.same is not None:
            meant = slice(first, first + len(value))
            return bool(self.same[meant].all()) and self.text[meant].tobytes() == value
        return bool((self.rows(at + len(value))[:, at:] == np.frombuffer(value, np.uint8)).all())

    def are(self, line: bytes) -> bool:
        """Whether all of them are this one."""
        return bool((self.lengths == len(line)).all()) and self.have(line)


def _lines_of(text: bytes) -> _Lines:
    """Those that have ended."""
    padded = np.frombuffer(text + bytes(LONGEST_LINE), np.uint8)
    ends = np.flatnonzero(padded == ord("\n"))
    begins = np.append(0, ends + 1)[: len(ends)]
    return _Lines(padded, begins, ends - begins)


def _compared(lines: _Lines, each: int) -> _Lines:
    """These lines, so many a shard, from the text's first byte on: with `same` where the shards are equally long."""
    lengths = lines.lengths.reshape(-1, each)
    if (lengths != lengths[0]).any():
        return lines
    size = int(lengths[0].sum()) + each
    shards = lines.text[: len(lengths) * size].reshape(-1, size)
    return lines._replace(same=(shards == shards[0]).all(0))


def _lines_of_a_shard(lines: _Lines) -> int:
    """Without or with the file that says where its samples came from."""
    start = b'   "paths"'
    with_paths = len(lines.begins) > 8 and lines.part(8, 9).have(start)
    return len(KEYS) + (2 if with_paths else 0) + 2


def _block_of(lines: _Lines, each: int) -> Block | None:
    """The shards of these lines, so many each; None where they are something else."""
    if len(lines.begins) % each:
        return None
    if not (lines.part(0, step=each).are(b"  {") and lines.part(each - 1, step=each).are(LAST)):
        return None
    columns = {key: lines.part(i + 1, step=each) for i, key in enumerate(KEYS)}
    with_paths = each > len(KEYS) + 2
    names = [_names(columns[key], key, b",") for key in NAMES]
    counts = [_counts(columns[key], key) for key in COUNTS]
    digests = [_digests(columns[key], key, b"," if with_paths or key == "sha256" else b"") for key in DIGESTS]
    kinds = _kinds(columns["kind"])
    paths = _paths(lines.part(8, step=each), lines.part(9, step=each)) if with_paths else _no_paths(len(kinds))
    if paths is None or kinds.min() < 0 or any(column is None for column in (*names, *counts, *digests)):
        return None
    block = Block(*names, kinds, *counts, *digests, *paths)  # type: ignore[arg-type, call-arg]
    return None if (block.samples > block.bytes // MEMBER).any() else block


def _kinds(lines: _Lines) -> NDArray[np.int8]:
    """Their codes; -1 for what is none."""
    kinds, found = np.full(len(lines.begins), -1, np.int8), _names(lines, "kind", b",")
    for kind, code in CODES.items() if found is not None else ():
        kinds[found == kind.encode()] = code
    return kinds


def _paths(names: _Lines, digests: _Lines) -> tuple[NDArray[np.bytes_], NDArray[np.uint8]] | None:
    if names.are(b'   "paths": null,') and digests.are(b'   "paths_sha256": null'):
        return _no_paths(len(names.begins))
    found = _names(names, "paths", b","), _digests(digests, "paths_sha256", b"")
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _no_paths(count: int) -> tuple[NDArray[np.bytes_], NDArray[np.uint8]]:
    return np.zeros(count, "S1"), np.broadcast_to(np.uint8(0), (count, 32))


def _values(lines: _Lines, start: bytes, end: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """What stands between `start` and `end` in every line: bytes [n, longest], zeros behind them, and lengths [n]."""
    lengths = lines.lengths - len(start) - len(end)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest <= 0 or longest > LONGEST_NAME:
        return None
    if not lines.have(start):
        return None
    values = lines.rows(len(start) + longest + len(end))[:, len(start) :]
    if shortest == longest:  # the usual case
        whole = lines.have(end, len(start) + longest)
        return (np.ascontiguousarray(values[:, :longest]), lengths) if whole else None
    rows = np.arange(len(lengths))
    if any((values[rows, lengths + i] != byte).any() for i, byte in enumerate(end)):
        return None
    return np.where(np.arange(longest) < lengths[:, None], values[:, :longest], np.uint8(0)), lengths


def _names(lines: _Lines, key: str, comma: bytes) -> NDArray[np.bytes_] | None:
    found = _values(lines, b'   "%s": "' % key.encode(), b'"' + comma)
    if found is None:
        return None
    values, lengths = found
    # with its own zeros a name would have more of them than stand behind it
    if values.tobytes().translate(None, PLAIN) or (values[:, 0] == ord(".")).any():
        return None
    if np.count_nonzero(values) != lengths.sum():
        return None
    return values.view(f"S{values.shape[1]}")[:, 0]


def _counts(lines: _Lines, key: str) -> NDArray[np.int64] | None:
    found = _values(lines, b'   "%s": ' % key.encode(), b",")
    if found is None:
        return None
    values, lengths = found
    leading = (values[:, 0] == ord("0")) & (lengths > 1)
    if values.tobytes().translate(None, _DIGITS) or np.count_nonzero(values) != lengths.sum() or leading.any():
        return None
    if values.shape[1] > LONG:
        return None
    counts = np.zeros(len(values), np.int64)
    for place in range(values.shape[1]):
        counts = np.where(place < lengths, 10 * counts + values[:, place] - ord("0"), counts)
    return None if (counts > MOST).any() else counts


def _digests(lines: _Lines, key: str, comma: bytes) -> NDArray[np.uint8] | None:
    found = _values(lines, b'   "%s": "' % key.encode(), b'"' + comma)
    if found is None or (found[1] != 64).any():
        return None
    text = found[0].tobytes()
    if text.translate(None, _HEX):
        return None
    return np.frombuffer(bytes.fromhex(text.decode("ascii")), np.uint8).reshape(-1, 32)
