"""The index of a shard: which sample lies where in its tar.

[samples] records (uid, target, offset, size), little-endian int64 each, in a NumPy `.npy` file of version 1.0. Offset
and size, in bytes, are those of the encoded image in the tar. The file is compared with what it must be, and then its
records are read as they lie: no length, type or offset that it claims is obeyed.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.faults import DatasetError, unreadable
from sptnet.data.format.files import LARGEST_IMAGE, read_regular
from sptnet.data.format.manifest import UNKNOWN, Kind, Manifest, Shard

INDEX_DTYPE = np.dtype([("uid", "<i8"), ("target", "<i8"), ("offset", "<i8"), ("size", "<i8")])
INDEX_HEADER = 4096  # bytes; more than the header of such an array can have
NPY_START = b"\x93NUMPY\x01\x00"  # a .npy file of version 1.0; two bytes with the header's length follow


def index_size(shard: Shard) -> int:
    """Bytes that the index of a shard may have."""
    return INDEX_HEADER + shard.samples * INDEX_DTYPE.itemsize


def read_index(root: Path, manifest: Manifest, shard: Shard) -> NDArray[np.void]:
    """The index of a shard in a folder; raises DatasetError, see `parse_index`."""
    return read_entries(root / shard.index, shard, target_range(manifest, shard.kind))


def read_entries(path: Path, shard: Shard, targets: range) -> NDArray[np.void]:
    """The index of a shard in a file; raises DatasetError, see `parse_index`."""
    try:
        encoded = read_regular(path, index_size(shard))
    except OSError as error:
        raise unreadable(f"{path} cannot be read", error) from None
    return parse_index(encoded, shard, targets, str(path))


def target_range(manifest: Manifest, kind: Kind) -> range:
    """The targets that a kind's samples may have."""
    if kind == "unlabelled" and manifest.unknown:
        return range(UNKNOWN, UNKNOWN + 1)
    return range(manifest.targets(kind))


def parse_index(encoded: bytes, shard: Shard, targets: range, where: str) -> NDArray[np.void]:
    """The index of a shard: [samples] records of INDEX_DTYPE.

    Args:
        targets: those that its samples may have, see `target_range`.
        where: its path or URL, for messages.

    Raises:
        DatasetError: not the index that the manifest means, or one with an entry that none of its samples can have.
    """
    if hashlib.sha256(encoded).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{where} is not the index that the manifest means (sha256): copy it again")
    if fault := _header_fault(encoded, shard.samples):
        raise DatasetError(f"{where} cannot be read ({fault}): make the shards again")
    index = np.frombuffer(encoded, INDEX_DTYPE, offset=len(encoded) - shard.samples * INDEX_DTYPE.itemsize)
    if fault := _entries_fault(index, shard, targets):
        raise DatasetError(f"{where} {fault}: make the shards again")
    return index


def _header_fault(encoded: bytes, samples: int) -> str | None:
    """What keeps bytes from being a .npy file of so many records, by comparison: nothing that they claim is obeyed."""
    if not encoded.startswith(NPY_START) or len(encoded) < len(NPY_START) + 2:
        return "it is no .npy file of version 1.0"
    begin = len(NPY_START) + 2
    header = encoded[begin : begin + int.from_bytes(encoded[begin - 2 : begin], "little")]
    if b"'|O'" in header:
        return "it holds Python objects, which are read nowhere: allow_pickle is off"
    wanted = f"{{'descr': {INDEX_DTYPE.descr}, 'fortran_order': False, 'shape': ({samples},), }}"
    if header.rstrip(b" \n") != wanted.encode():  # padded to a length that depends on the version of numpy
        return f"its header is not that of {samples} entries {INDEX_DTYPE.names}"
    found, size = len(encoded) - begin - len(header), samples * INDEX_DTYPE.itemsize
    return None if found == size else f"it has {found} bytes of entries instead of {size}"


def _entries_fault(index: NDArray[np.void], shard: Shard, targets: range) -> str | None:
    if not len(index):
        return None
    if index["uid"].min() < 0:
        return "has a negative uid"
    if index["target"].min() < targets.start or index["target"].max() >= targets.stop:
        return f"has a target that is none of {targets.start} to {targets.stop - 1}, as {shard.kind} shards have here"
    if index["size"].min() <= 0 or index["size"].max() > LARGEST_IMAGE:
        return f"has an image of no byte, or of more than {LARGEST_IMAGE:,}"
    # compared without a sum, which could overflow
    if index["offset"].min() < 0 or (index["offset"] > shard.bytes - index["size"]).any():
        return f"points outside of {shard.file}"
    if len(np.unique(index["uid"])) < len(index):
        return "has a uid twice"
    return None
