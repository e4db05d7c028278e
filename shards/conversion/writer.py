"""Write one shard: a tar, its index and its paths, each under a temporary name until it is whole."""

import hashlib
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.conversion.images import BadImage
from sptnet_shards.conversion.plan import Planned, Settings
from sptnet_shards.items import UNKNOWN as UNKNOWN_CLASS
from sptnet_shards.source import Source, SourceError, UnreadableError
from webdataset import TarWriter

from sptnet.data.format.files import replacing, write_whole
from sptnet.data.format.manifest import UNKNOWN, Shard
from sptnet.data.format.paths import encode_paths, paths_name
from sptnet.data.format.shard_index import INDEX_DTYPE

TAR_BLOCK = 512


class Written(NamedTuple):
    """A shard on disk.

    index_bytes, paths_bytes: sizes of the files beside the tar.
    skipped: the uids of planned samples that are not in it.
    contents: uint64 [samples], equal for equal bytes of an image, see `content_of`.
    """

    shard: Shard
    index_bytes: int
    paths_bytes: int
    skipped: list[int]
    contents: NDArray[np.uint64]


class _Hashing:
    """A file that keeps the sha256 of what goes through it, so that nothing is read twice."""

    def __init__(self, file: IO[bytes]):
        self._file, self._digest, self.written = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.written += len(data)
        return self._file.write(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()


def index_name(tar: str) -> str:
    """`train-labelled-000000.tar` -> `train-labelled-000000.idx.npy`."""
    return tar.removesuffix(".tar") + ".idx.npy"


def write_shard(out: Path, planned: Planned, source: Source, settings: Settings) -> Written:
    """Write a planned shard; what had its names is replaced, file by file, by the same bytes or by whole ones.

    Raises:
        SourceError: an image that cannot be read or does not decode, or a disk that is full.
    """
    path, index_path, paths_path = (out / name for name in _names(planned.file))
    try:
        with replacing(path) as file:
            stream = _Hashing(file)
            index, contents = _write_samples(stream, planned, source, settings)
        index_sha256 = write_index(index_path, index)
        items = source.part(planned.kind)
        paths = encode_paths([items.where(uid) for uid in index["uid"].tolist()])
        write_whole(paths_path, paths)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    shard = Shard(
        path.name, index_path.name, planned.kind, len(index), stream.written, stream.sha256(), index_sha256,
        paths_path.name, hashlib.sha256(paths).hexdigest(),
    )  # fmt: skip
    skipped = np.setdiff1d(planned.uids, index["uid"], assume_unique=True)
    return Written(shard, index_path.stat().st_size, len(paths), sorted(skipped.tolist()), contents)


def _names(tar: str) -> tuple[str, str, str]:
    return tar, index_name(tar), paths_name(tar)


def write_index(path: Path, index: NDArray[np.void]) -> str:
    """Write an index; returns its sha256. Raises OSError."""
    with replacing(path) as file:
        stream = _Hashing(file)
        np.lib.format.write_array(stream, index, allow_pickle=False)
    return stream.sha256()


def content_of(encoded: bytes) -> int:
    """A number that is equal for equal bytes, on any machine: it finds images that are there twice."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _write_samples(
    stream: _Hashing, planned: Planned, source: Source, settings: Settings
) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
    targets = {name: target for target, name in enumerate(source.classes)}
    transform, items = settings.transform(), source.part(planned.kind)
    rows, contents = [], []
    # a fixed time and owner: the bytes depend on the images alone
    with TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
        for uid in planned.uids.tolist():
            item = items[uid]
            try:
                suffix, encoded = transform(source.read(item.where))
            except MemoryError as error:  # which says nothing of the image
                raise SourceError(
                    f"{item.where}: out of memory ({error}): give fewer --workers, or more memory"
                ) from None
            except (BadImage, UnreadableError) as error:
                if settings.on_error == "skip":
                    continue
                told = error if isinstance(error, UnreadableError) else f"{item.where} {error}"
                raise SourceError(f"{told}; --on-error skip leaves such images out") from None
            target = UNKNOWN if item.class_name == UNKNOWN_CLASS else targets[item.class_name]
            label = {} if target == UNKNOWN else {"cls": str(target).encode()}
            # TarWriter sorts by suffix: the class comes first, so now the tar ends with the image, padded
            tar.write({"__key__": f"{uid:09d}", **label, suffix: encoded})
            padding = -len(encoded) % TAR_BLOCK
            rows.append((uid, target, tar.tarstream.offset - padding - len(encoded), len(encoded)))
            contents.append(content_of(encoded))
    return np.array(rows, dtype=INDEX_DTYPE), np.array(contents, np.uint64)
