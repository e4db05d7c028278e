"""Where tars of others lie: a folder, or one behind an fsspec URL; what is written about them goes beside them."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from sptnet_shards.conversion.record import FOLDER
from sptnet_shards.source import SourceError
from sptnet_shards.tar_members import StreamedTar, TarError

from sptnet.data.format.files import check_url, open_regular, read_regular, without_password, write_once, write_whole
from sptnet.data.format.temporary import remove_leftovers

BUFFER = 2**22  # bytes that are read from a tar at once


class Place(Protocol):
    """A folder of tars. Every method may raise SourceError or OSError."""

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""

    def name(self) -> str:
        """That of the folder."""

    def sizes(self) -> dict[str, int]:
        """The files in it, with their bytes."""

    def states(self) -> dict[str, str]:
        """What tells each file from another of its name: its bytes and when it was written; "" where nothing does."""

    def listed(self) -> list[str]:
        """The names in the folder of what tasks tell each other."""

    def tar(self, name: str) -> Any:
        """A context with the `StreamedTar`."""

    def read(self, name: str, most: int) -> bytes | None:
        """The content of a file; None where it is not there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""

    def write_once(self, name: str, content: bytes) -> bool:
        """Write a file unless one of the name is there, and say whether it was written."""

    def remove(self, names: list[str]) -> None:
        """Remove files, those that are there, and the folder of what tasks tell each other if it is empty then."""


class LocalPlace:
    """A folder on a disk."""

    def __init__(self, root: Path):
        self.root = root

    def where(self, name: str) -> str:
        return str(self.root / name)

    def name(self) -> str:
        return self.root.resolve().name

    def sizes(self) -> dict[str, int]:
        return {name: found.st_size for name, found in self._stats().items()}

    def states(self) -> dict[str, str]:
        return {name: f"{found.st_size} {found.st_mtime_ns}" for name, found in self._stats().items()}

    def _stats(self) -> dict[str, os.stat_result]:
        try:
            with os.scandir(self.root) as entries:
                return {entry.name: found for entry in entries if (found := _stat(entry)) is not None}
        except OSError as error:
            raise SourceError(f"{self.root} cannot be listed: {error.strerror}") from None

    def listed(self) -> list[str]:
        try:
            return sorted(os.listdir(self.root / FOLDER))
        except FileNotFoundError:
            return []

    @contextmanager
    def tar(self, name: str) -> Iterator[StreamedTar]:
        with os.fdopen(open_regular(self.root / name), "rb", BUFFER) as file:
            yield StreamedTar(file, os.fstat(file.fileno()).st_size)

    def read(self, name: str, most: int) -> bytes | None:
        try:
            return read_regular(self.root / name, most)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._make_folder(name)
        write_whole(self.root / name, content)

    def write_once(self, name: str, content: bytes) -> bool:
        self._make_folder(name)
        return write_once(self.root / name, content)

    def _make_folder(self, name: str) -> None:
        folder = (self.root / name).parent
        if folder != self.root:
            if os.path.islink(folder):
                raise SourceError(f"{folder} is a link: remove it")
            folder.mkdir(exist_ok=True)

    def remove(self, names: list[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)
        remove_leftovers(self.root)
        with suppress(OSError):  # somebody else writes into it, or it was never there
            (self.root / FOLDER).rmdir()


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for a link that leads nowhere; SourceError where it is named as a tar, which would be left out."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.name.endswith(".tar"):
            raise SourceError(f"{entry.path} cannot be opened ({error.strerror}): is its disk there?") from None
        return None


class RemotePlace:
    """A folder behind a URL; a tar is fetched once, piece by piece, and never kept."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            check_url(url)
        except ValueError as error:
            raise SourceError(f"{without_password(url)} {error}") from None
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # whatever a backend makes of its arguments
            raise SourceError(
                f"{self.url} cannot be reached: {error} "
                "(in the checkout: pip install -c constraints.txt -e '.[remote]')"
            ) from None

    def where(self, name: str) -> str:
        return self.url if name == "." else f"{self.url}/{name}"

    def name(self) -> str:
        return posixpath.basename(self._root)

    def sizes(self) -> dict[str, int]:
        entries = self._list(self._root).items()
        return {name: entry["size"] for name, entry in entries if entry["size"] is not None}

    def states(self) -> dict[str, str]:
        return {name: _state_of(entry) for name, entry in self._list(self._root).items()}

    def listed(self) -> list[str]:
        return sorted(self._list(f"{self._root}/{FOLDER}"))

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        with self._told(posixpath.relpath(folder, self._root)):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {posixpath.basename(entry["name"]): entry for entry in found if entry["type"] == "file"}

    @contextmanager
    def tar(self, name: str) -> Iterator[StreamedTar]:
        with self._told(name):
            size = self._files.info(f"{self._root}/{name}")["size"]
            with self._files.open(f"{self._root}/{name}", "rb", block_size=BUFFER, cache_type="readahead") as file:
                yield StreamedTar(file, size)

    def read(self, name: str, most: int) -> bytes | None:
        with self._told(name):
            try:
                found: bytes = self._files.cat_file(f"{self._root}/{name}", end=most + 1)
            except FileNotFoundError:
                return None
        if len(found) > most:
            raise SourceError(f"{self.where(name)} has more than {most:,} bytes: remove it")
        return found

    def write(self, name: str, content: bytes) -> None:
        with self._told(name):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def write_once(self, name: str, content: bytes) -> bool:
        with self._told(name):
            try:
                self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, names: list[str]) -> None:
        for name in names:
            with self._told(name), suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what a backend raises, which has no class in common, into one line."""
        try:
            yield
        except (TarError, SourceError, AssertionError, MemoryError):
            raise  # ours: a damaged tar, a bug
        except Exception as error:
            reason = " ".join(str(error).split())
            raise SourceError(
                f"{self.where(name)} cannot be read or written: {type(error).__name__}: {reason}"
            ) from None


def _state_of(entry: dict[str, Any]) -> str:
    """By what a backend says of a file: each has a name of its own for it."""
    names = ("ETag", "etag", "LastModified", "last_modified", "mtime")
    told = next((entry[name] for name in names if entry.get(name)), "")
    return f"{entry['size']} {told}" if told else ""


def place_of(folder: Path | str) -> Place:
    """The place that a path or URL names; raises SourceError where its protocol is unknown."""
    return RemotePlace(folder) if isinstance(folder, str) else LocalPlace(folder)
