"""Write one shard: a tar and its index, both under temporary names until they are whole."""

import hashlib
import os
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from shards.images import BadImage
from shards.plan import Planned, Settings
from shards.source import Source, SourceError
from sptnet.data.manifest import INDEX_DTYPE, Shard

TAR_BLOCK = 512


class Written(NamedTuple):
    """A shard on disk, and the uids of planned samples that are not in it."""

    shard: Shard
    skipped: list[int]


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
    """Write a planned shard.

    Raises:
        SourceError: an image that cannot be read or does not decode, or a disk that is full.
    """
    path, index_path = out / planned.file, out / index_name(planned.file)
    temporary, temporary_index = path.with_name(path.name + ".tmp"), index_path.with_name(index_path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            stream = _Hashing(file)
            index = _write_samples(stream, planned, source, settings)
            _to_disk(file)
        sha256 = write_index(temporary_index, index)
        temporary_index.replace(index_path)
        temporary.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary_index.unlink(missing_ok=True)
    shard = Shard(
        planned.file, index_path.name, planned.kind, len(index), stream.written, stream.sha256(), sha256
    )  # fmt: skip
    return Written(shard, skipped_of(planned, index))


def skipped_of(planned: Planned, index: NDArray[np.void]) -> list[int]:
    """The planned uids that an index does not have."""
    return sorted({uid for uid, _ in planned.samples} - set(index["uid"].tolist()))


def write_index(path: Path, index: NDArray[np.void]) -> str:
    """Write an index to disk; returns its sha256."""
    with open(path, "wb") as file:
        stream = _Hashing(file)
        np.lib.format.write_array(stream, index, allow_pickle=False)
        _to_disk(file)
    return stream.sha256()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_samples(stream: _Hashing, planned: Planned, source: Source, settings: Settings) -> NDArray[np.void]:
    targets = {name: target for target, name in enumerate(source.classes)}
    transform = settings.transform()
    rows = []
    # a fixed time and owner: the bytes depend on the images alone
    with TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
        for uid, item in planned.samples:
            try:
                suffix, encoded = transform(source.read(item.where))
            except BadImage as error:
                if settings.on_error == "skip":
                    continue
                raise SourceError(f"{item.where} {error}; --on-error skip leaves such images out") from None
            target = targets[item.class_name]
            # TarWriter sorts by suffix: the class comes first, so now the tar ends with the image, padded
            tar.write({"__key__": f"{uid:09d}", "cls": str(target).encode(), suffix: encoded})
            padding = -len(encoded) % TAR_BLOCK
            rows.append((uid, target, tar.tarstream.offset - padding - len(encoded), len(encoded)))
    return np.array(rows, dtype=INDEX_DTYPE)
