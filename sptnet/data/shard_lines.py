"""The shards of a manifest read line by line, as `make_shards` writes them: 2 us and 200 bytes a shard.

A block of lines is compared with the lines that it must have, and its values with what `Shard` allows; nothing that
pydantic would refuse passes. Whatever differs, in its form or in a value, is no block: it is left to pydantic, which
takes any form and says what is wrong.
"""

from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data.fields import LONGEST_NAME, MOST
from sptnet.data.shard_list import CODES, MEMBER, Block, Shards

CHUNK = 2**20  # bytes that are read at a time
LARGEST_REST = 2**28  # bytes before or behind the shards
BEGIN, END, LAST = b'\n "shards": [\n', b"\n  }\n ]", b"  },"
NAMES, COUNTS, DIGESTS = ("file", "index"), ("samples", "bytes"), ("sha256", "index_sha256")
KEYS = ("file", "index", "kind", "samples", "bytes", "sha256", "index_sha256")  # as `Shard` declares them
KIND_LINES = {b'   "kind": "%s",' % kind.encode(): code for kind, code in CODES.items()}
LONG = len(str(MOST))  # digits
_HEX, _DIGITS = b"0123456789abcdef", b"\0" + b"0123456789"  # zeros stand behind what is shorter than others
_PLAIN = b"\0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."  # of the names that are taken here


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
        lines = rest.split(b"\n")
        # a shard is taken when a line has begun behind it: with the comma in its last line
        whole = (len(lines) - 1) // (each := _lines_of_a_shard(lines)) * each
        block = _block_of(lines[:whole], each) if whole else None
        if block is not None:
            blocks.append(block)
            rest = b"\n".join(lines[whole:])
        elif (end := rest.find(END)) >= 0:
            last = _block_of([*rest[:end].split(b"\n"), LAST], each)
            return None if last is None else _split(before, [*blocks, last], rest[end:] + file.read(LARGEST_REST))
        elif len(rest) > 2 * CHUNK:
            return None
        if not (more := file.read(CHUNK)):
            return None
        rest += more


def _split(before: bytes, blocks: list[Block], rest: bytes) -> Split:
    return Split(before + BEGIN, Shards(blocks), rest[rest.index(b"]") - 1 :])


def _lines_of_a_shard(lines: Sequence[bytes]) -> int:
    """Without or with the file that says where its samples came from."""
    keys = len(KEYS) + (2 if lines[8:9] and lines[8].startswith(b'   "paths"') else 0)
    return keys + 2


def _block_of(lines: Sequence[bytes], each: int) -> Block | None:
    """The shards of these lines, so many each; None where they are something else."""
    if len(lines) % each or set(lines[::each]) != {b"  {"} or set(lines[each - 1 :: each]) != {LAST}:
        return None
    columns = {key: lines[i + 1 :: each] for i, key in enumerate(KEYS)}
    with_paths = each > len(KEYS) + 2
    names = [_names(columns[key], key, b",") for key in NAMES]
    counts = [_counts(columns[key], key) for key in COUNTS]
    digests = [_digests(columns[key], key, b"," if with_paths or key == "sha256" else b"") for key in DIGESTS]
    kinds = [KIND_LINES.get(line, -1) for line in columns["kind"]]
    paths = _paths(lines[8::each], lines[9::each]) if with_paths else _no_paths(len(kinds))
    if paths is None or min(kinds) < 0 or any(column is None for column in (*names, *counts, *digests)):
        return None
    block = Block(*names, np.array(kinds, np.int8), *counts, *digests, *paths)  # type: ignore[arg-type, call-arg]
    return None if (block.samples > block.bytes // MEMBER).any() else block


def _paths(names: Sequence[bytes], digests: Sequence[bytes]) -> tuple[NDArray[np.bytes_], NDArray[np.uint8]] | None:
    if set(names) == {b'   "paths": null,'} and set(digests) == {b'   "paths_sha256": null'}:
        return _no_paths(len(names))
    found = _names(names, "paths", b","), _digests(digests, "paths_sha256", b"")
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _no_paths(count: int) -> tuple[NDArray[np.bytes_], NDArray[np.uint8]]:
    return np.zeros(count, "S1"), np.broadcast_to(np.uint8(0), (count, 32))


def _values(lines: Sequence[bytes], start: bytes, end: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """What stands between `start` and `end` in every line: bytes [n, longest], zeros behind them, and lengths [n]."""
    longest = max(map(len, lines))
    if longest > len(start) + LONGEST_NAME + len(end):
        return None
    text = b"".join(lines)
    if len(text) == len(lines) * longest:  # all of one length: the usual case
        whole = np.frombuffer(text, np.uint8).reshape(len(lines), longest)
        lengths = np.full(len(lines), longest)
    else:
        whole = np.array(lines, f"S{longest}").view(np.uint8).reshape(len(lines), longest)
        lengths = np.fromiter(map(len, lines), np.int64, len(lines))
    lengths = lengths - len(start) - len(end)
    if lengths.min() <= 0 or (whole[:, : len(start)] != np.frombuffer(start, np.uint8)).any():
        return None
    values, rows = whole[:, len(start) :], np.arange(len(lines))
    if any((values[rows, lengths + i] != byte).any() for i, byte in enumerate(end)):
        return None
    values = values[:, : lengths.max()]
    if len(text) != whole.size:
        values = np.where(np.arange(values.shape[1]) < lengths[:, None], values, np.uint8(0))
    return np.ascontiguousarray(values), lengths


def _names(lines: Sequence[bytes], key: str, comma: bytes) -> NDArray[np.bytes_] | None:
    found = _values(lines, b'   "%s": "' % key.encode(), b'"' + comma)
    if found is None:
        return None
    values, lengths = found
    # with its own zeros a name would have more of them than stand behind it
    if values.tobytes().translate(None, _PLAIN) or (values[:, 0] == ord(".")).any():
        return None
    if np.count_nonzero(values) != lengths.sum():
        return None
    return values.view(f"S{values.shape[1]}")[:, 0]


def _counts(lines: Sequence[bytes], key: str) -> NDArray[np.int64] | None:
    found = _values(lines, b'   "%s": ' % key.encode(), b",")
    if found is None:
        return None
    values, lengths = found
    leading = (values[:, 0] == ord("0")) & (lengths > 1)
    if values.tobytes().translate(None, _DIGITS) or np.count_nonzero(values) != lengths.sum() or leading.any():
        return None
    if values.shape[1] > LONG:
        return None
    counts = values.view(f"S{values.shape[1]}")[:, 0].astype(np.int64)
    return None if (counts > MOST).any() else counts


def _digests(lines: Sequence[bytes], key: str, comma: bytes) -> NDArray[np.uint8] | None:
    found = _values(lines, b'   "%s": "' % key.encode(), b'"' + comma)
    if found is None or (found[1] != 64).any():
        return None
    text = found[0].tobytes()
    if text.translate(None, _HEX):
        return None
    return np.frombuffer(bytes.fromhex(text.decode("ascii")), np.uint8).reshape(-1, 32)
