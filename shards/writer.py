"""Write one shard: a tar and its index, both under temporary names until they are whole."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.images import BadImage
from sptnet_shards.plan import Planned, Settings
from sptnet_shards.source import UNKNOWN as UNKNOWN_CLASS
from sptnet_shards.source import Source, SourceError
from webdataset import TarWriter

from sptnet.data.files import create, to_disk, write_whole
from sptnet.data.manifest import UNKNOWN, Shard
from sptnet.data.paths import encode_paths, paths_name
from sptnet.data.shard_index import INDEX_DTYPE

TAR_BLOCK = 512


class Written(NamedTuple):
    """A shard on disk.

    skipped: the uids of planned samples that are not in it.
    contents: uint64 [samples], equal for equal bytes of an image; from one process and those that it forked only.
    """

    shard: Shard
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
    """Write a planned shard.

    Raises:
        SourceError: an image that cannot be read or does not decode, or a disk that is full.
    """
    path, index_path = out / planned.file, out / index_name(planned.file)
    temporary, temporary_index = path.with_name(path.name + ".tmp"), index_path.with_name(index_path.name + ".tmp")
    paths_path = out / paths_name(planned.file)
    try:
        with create(temporary) as file:
            stream = _Hashing(file)
            index, contents = _write_samples(stream, planned, source, settings)
            to_disk(file)
        sha256 = write_index(temporary_index, index)
        paths = paths_of(planned, index)
        write_whole(paths_path, paths)
        temporary_index.replace(index_path)
        temporary.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        for left in (temporary, temporary_index):
            with suppress(OSError):
                left.unlink(missing_ok=True)
    shard = Shard(
        planned.file, index_path.name, planned.kind, len(index), stream.written, stream.sha256(), sha256,
        paths_path.name, hashlib.sha256(paths).hexdigest(),
    )  # fmt: skip
    return Written(shard, skipped_of(planned, index), contents)


def skipped_of(planned: Planned, index: NDArray[np.void]) -> list[int]:
    """The planned uids that an index does not have."""
    return sorted({uid for uid, _ in planned.samples} - set(index["uid"].tolist()))


def paths_of(planned: Planned, index: NDArray[np.void]) -> bytes:
    """What the file says that tells where the samples of an index came from."""
    where = {uid: item.where for uid, item in planned.samples}
    return encode_paths([where[uid] for uid in index["uid"].tolist()])


def write_index(path: Path, index: NDArray[np.void]) -> str:
    """Write an index to disk; returns its sha256."""
    with create(path) as file:
        stream = _Hashing(file)
        np.lib.format.write_array(stream, index, allow_pickle=False)
        to_disk(file)
    return stream.sha256()


def content_of(encoded: bytes) -> int:
    """A number that is equal for equal bytes, in this process and those that it forked (Python's own hash, unsigned).

    A quarter of what sha256 takes; it serves to find images that are there twice, and nothing is stored.
    """
    return hash(encoded) % 2**64


def _write_samples(
    stream: _Hashing, planned: Planned, source: Source, settings: Settings
) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
    targets = {name: target for target, name in enumerate(source.classes)}
    transform = settings.transform()
    rows, contents = [], []
    # a fixed time and owner: the bytes depend on the images alone
    with TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
        for uid, item in planned.samples:
            try:
                suffix, encoded = transform(source.read(item.where))
            except (BadImage, MemoryError) as error:
                if settings.on_error == "skip":
                    continue
                told = "does not fit into memory" if isinstance(error, MemoryError) else error
                raise SourceError(f"{item.where} {told}; --on-error skip leaves such images out") from None
            target = UNKNOWN if item.class_name == UNKNOWN_CLASS else targets[item.class_name]
            label = {} if target == UNKNOWN else {"cls": str(target).encode()}
            # TarWriter sorts by suffix: the class comes first, so now the tar ends with the image, padded
            tar.write({"__key__": f"{uid:09d}", **label, suffix: encoded})
            padding = -len(encoded) % TAR_BLOCK
            rows.append((uid, target, tar.tarstream.offset - padding - len(encoded), len(encoded)))
            contents.append(content_of(encoded))
    return np.array(rows, dtype=INDEX_DTYPE), np.array(contents, np.uint64)
