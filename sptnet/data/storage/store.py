"""Where a dataset lies: in a local folder, or behind a URL with a cache on the node."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.faults import DatasetError, unreadable
from sptnet.data.format.files import is_url, open_regular, read_regular
from sptnet.data.format.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, Shard, load_manifest, read_manifest
from sptnet.data.format.paths import largest_paths, parse_paths
from sptnet.data.format.shard_index import index_size, parse_index, read_index, target_range
from sptnet.data.locks import network_file_system
from sptnet.data.storage.cache import Fetch, NodeCache, check_content
from sptnet.data.storage.fetch_ahead import FetchAhead
from sptnet.data.storage.pieces import Wanted, read_pieces
from sptnet.data.storage.remote import Remote

ASKING = 2  # threads that ask for shards of a network disk: the kernel may let them wait
REMEMBERED = 4096  # shards that were asked for


class Store(Protocol):
    """A dataset that shards can be opened from.

    Attributes:
        manifest: what the dataset holds.
        remote: whether opening a shard may have to fetch it.
        asks_ahead: whether it pays to say what will be opened soon.
    """

    manifest: Manifest
    remote: bool
    asks_ahead: bool

    def where(self, file: str) -> str:
        """Path or URL of a file, for messages."""

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard's tar, to be closed by the caller; raises DatasetError."""

    def entries(self, shard: Shard, keep: bool = True) -> NDArray[np.void]:
        """The shard's index, [samples] of INDEX_DTYPE; raises DatasetError.

        Args:
            keep: in a cache, where there is one: not where all shards are gone through once.
        """

    def paths(self, shard: Shard) -> list[str] | None:
        """Where the shard's samples came from, [samples], or None where it is not kept; raises DatasetError."""

    def fetch_ahead(self, shards: Iterable[Shard]) -> None:
        """Begin to fetch what will be opened soon; returns at once."""

    def cancel_ahead(self) -> None:
        """Leave out what has not been begun."""

    def is_here(self, shard: Shard) -> bool:
        """Whether a shard can be opened without being fetched."""

    def pieces(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        """Encoded images of shards that are not here, by their bytes; None for those that have to be opened."""


class LocalStore:
    """A dataset in a folder."""

    remote = False

    def __init__(self, root: Path, look: bool = True):
        self.root = root
        self.manifest = read_manifest(root, look)
        self.asks_ahead = network_file_system(root) is not None
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._ahead = FetchAhead(ASKING)

    def where(self, file: str) -> str:
        return str(self.root / file)

    def open(self, shard: Shard) -> int:
        try:
            return open_regular(self.root / shard.file)
        except OSError as error:
            raise unreadable(f"{self.where(shard.file)} cannot be opened", error) from None

    def entries(self, shard: Shard, keep: bool = True) -> NDArray[np.void]:
        return read_index(self.root, self.manifest, shard)

    def paths(self, shard: Shard) -> list[str] | None:
        if shard.paths is None:
            return None
        try:
            encoded = read_regular(self.root / shard.paths, largest_paths(shard))
        except OSError as error:
            raise unreadable(f"{self.where(shard.paths)} cannot be read", error) from None
        return parse_paths(encoded, shard, self.where(shard.paths))

    def fetch_ahead(self, shards: Iterable[Shard]) -> None:
        """Ask the kernel to read shards into its cache; each once, until many others were asked for."""
        for shard in shards:
            if shard.file not in self._asked:
                self._asked[shard.file] = None
                self._ahead.add(shard.file, partial(_will_need, self.root / shard.file))
        while len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)

    def cancel_ahead(self) -> None:
        self._ahead.clear()

    def is_here(self, shard: Shard) -> bool:
        return True

    def pieces(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        return [None] * len(wanted)


def _will_need(path: Path) -> None:
    descriptor = open_regular(path)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


class RemoteStore:
    """A dataset behind an fsspec URL; its shards are fetched whole into the node's cache and read there, or by piece
    until they are.
    """

    remote = asks_ahead = True

    def __init__(self, remote: Remote, cache: NodeCache):
        self._remote, self._cache = remote, cache
        with remote.opened(MANIFEST, LARGEST_MANIFEST) as file:
            self.manifest = load_manifest(file, remote.where(MANIFEST))
        largest = int(self.manifest.shards.bytes.max())
        if largest > cache.limit:
            raise DatasetError(
                f"the cache {cache.folder} may hold {cache.limit:,} bytes, the largest shard of {remote.url} has "
                f"{largest:,}: raise data.remote.cache_gb"
            )

    def where(self, file: str) -> str:
        return self._remote.where(file)

    def _fetch(self, file: str, most: int) -> Fetch:
        return partial(self._remote.fetch, file, most)

    def open(self, shard: Shard) -> int:
        return self._cache.open(shard.sha256, shard.bytes, self._fetch(shard.file, shard.bytes))

    def entries(self, shard: Shard, keep: bool = True) -> NDArray[np.void]:
        size = index_size(shard)
        if keep or self._cache.has(shard.index_sha256):
            descriptor = self._cache.open(shard.index_sha256, size, self._fetch(shard.index, size))
            with os.fdopen(descriptor, "rb") as file:
                encoded = file.read(size + 1)
        else:
            encoded = self._remote.read(shard.index, size, partial(check_content, sha256=shard.index_sha256))
        return parse_index(encoded, shard, target_range(self.manifest, shard.kind), self.where(shard.index))

    def paths(self, shard: Shard) -> list[str] | None:
        if shard.paths is None:
            return None
        return parse_paths(self._remote.read(shard.paths, largest_paths(shard)), shard, self.where(shard.paths))

    def fetch_ahead(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self._cache.fetch_ahead(shard.sha256, shard.bytes, self._fetch(shard.file, shard.bytes))

    def cancel_ahead(self) -> None:
        self._cache.close()

    def is_here(self, shard: Shard) -> bool:
        return self._cache.has(shard.sha256)

    def pieces(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        return read_pieces(self._remote, wanted)


def open_store(
    root: str,
    *,
    cache: str,
    cache_gb: float,
    attempts: int,
    timeout_s: float,
    options: dict[str, Any],
    look: bool = True,
) -> Store:
    """The dataset at a path or fsspec URL.

    Args:
        root: a folder, or s3://, gs://, https:// ... of one.
        cache, cache_gb: folder on the node for fetched shards, and how much it may hold (10^9 bytes).
        attempts, timeout_s: how often a fetch is tried, and how long it may go without a byte.
        options: further arguments of the fsspec filesystem.
        look: whether all files of a folder are there, with their sizes.

    Raises:
        DatasetError: no dataset there, or one that cannot be read.
    """
    if not is_url(root):
        return LocalStore(Path(root), look)
    if "\0" in cache:
        raise DatasetError(f"the cache {cache!a} has a NUL in its path, which no path can have")
    return RemoteStore(Remote(root, attempts, timeout_s, options), NodeCache(Path(cache), int(cache_gb * 1e9)))
