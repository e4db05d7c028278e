"""Samples of shards that are not on this node yet, by their bytes alone, while the shards are fetched.

A cold start needs some images of very many shards: the first batch of ImageNet-1K on one node, 1,024 images, lies in
355 shards of 91 GB. A piece has no digest of its own, unlike a shard. It is taken where the tar header in front of it
is that of a file of this size; what does not decode all the same is read once more, from its whole shard. What was
taken is compared with the shard when the same process opens that.
"""

import tarfile
from collections.abc import Sequence
from typing import NamedTuple

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import Shard
from sptnet.data.storage.remote import Remote


class PieceError(DatasetError):
    """A piece that was used, and was not what its shard holds."""


class Wanted(NamedTuple):
    """An encoded image: where it lies in its shard's tar, in bytes."""

    shard: Shard
    offset: int
    size: int


def read_pieces(remote: Remote, wanted: Sequence[Wanted]) -> list[bytes | None]:
    """Encoded images, all asked for at once; None for those that are to be read from their whole shards."""
    if not wanted or not remote.sends_parts(wanted[0].shard.index):
        return [None] * len(wanted)
    header = tarfile.BLOCKSIZE
    parts = [(want.shard.file, max(want.offset - header, 0), want.offset + want.size) for want in wanted]
    came = remote.read_parts(parts)
    return [None if part is None else _image(part, want.size) for part, want in zip(came, wanted, strict=True)]


def _image(part: bytes, size: int) -> bytes | None:
    """What follows a tar header, where that announces so many bytes of a file."""
    try:
        member = tarfile.TarInfo.frombuf(part[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return part[tarfile.BLOCKSIZE :] if member.isreg() and member.size == size else None
