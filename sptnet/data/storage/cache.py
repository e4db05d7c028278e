"""Fetched files on a node: one copy for all its processes, named by content, the least recently used leave first.

CACHE/ab/abcd...          a file, named by its sha256
CACHE/ab/abcd....N.part   one that is being fetched; its N bytes count from its beginning
CACHE/locks/ab.lock       held while a file whose name begins so is fetched; CACHE/locks/room.lock while room is made
"""

import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.files import file_sha256
from sptnet.data.locks import NO_FLOCK, lock_at, network_file_system
from sptnet.data.storage.fetch_ahead import FetchAhead

FETCHES = 4  # at a time and process, ahead of need
PART = ".part"
WAIT_FOR_ROOM = 0.1  # seconds
log = logging.getLogger(__name__)
Fetch = Callable[[Callable[[Path], None], Path], None]


def in_user_cache(path: Path) -> Path:
    """A path, `~` written out; what is below `~/.cache` is below XDG_CACHE_HOME where a site has set that.

    Raises RuntimeError where nobody says where this user's home is.
    """
    told = os.environ.get("XDG_CACHE_HOME", "")  # one that is not absolute is none, by its specification
    if told.startswith("/") and path.parts[:2] == ("~", ".cache"):
        return Path(told, *path.parts[2:])
    return path.expanduser()


class NodeCache:
    """A folder of fetched files, shared by all processes of a node.

    Args:
        folder: on a disk of the node.
        limit: bytes that the files may take together, those being fetched too; no file may be larger. Open ones that
            left keep their room until they are closed, which their readers do within a second of reading on.

    Raises:
        DatasetError: the folder belongs to another user, or anybody may write into it.
    """

    def __init__(self, folder: Path, limit: int):
        try:
            self.folder, self.limit = in_user_cache(folder), limit
        except RuntimeError:
            raise DatasetError(f"the home folder of the cache {folder} does not exist: set data.remote.cache") from None
        self._ahead = FetchAhead(FETCHES)
        self._check_owner()
        if shared := network_file_system(self.folder):
            log.warning("the cache %s lies on %s, not on the node's own disk: set data.remote.cache", folder, shared)

    def _check_owner(self) -> None:
        """What is in the folder is believed: raise DatasetError where somebody else has made it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            told = os.stat(self.folder)
            owners = {told.st_uid, os.lstat(self.folder).st_uid}
        except OSError:
            return  # `open` says why it cannot be used
        if told.st_mode & stat.S_IWOTH:
            raise DatasetError(
                f"anybody may write into the cache {self.folder}, and what is in it is believed: set data.remote.cache "
                f"to a folder of your own, {self.folder / 'sptnet'} for example"
            )
        if os.geteuid() != 0 and owners - {os.geteuid(), 0}:
            raise DatasetError(
                f"the cache {self.folder} belongs to another user, who may put anything into it: set data.remote.cache"
            )

    def open(self, sha256: str, size: int, fetch: Fetch) -> int:
        """A descriptor of the file with this content, fetched if need be: `fetch(check, path)` writes it to `path`.

        Raises:
            DatasetError: it cannot be fetched, or the cache cannot be written.
        """
        path = self.folder / sha256[:2] / sha256
        try:
            if (there := _used(path)) is not None:  # a file has its name when it is whole: no lock is needed
                return there
            with self._lock(sha256[:2]):
                while True:
                    if not path.exists():
                        self._fetch(path, size, fetch)
                    if (there := _used(path)) is not None:  # else it left meanwhile, to make room for another
                        return there
        except OSError as error:
            told = f"the cache {self.folder} cannot be used: {error.strerror or error}"
            if error.errno in NO_FLOCK:
                told += "; its disk has no locks: set data.remote.cache to a folder on the node's own disk"
            raise DatasetError(told) from None

    def fetch_ahead(self, sha256: str, size: int, fetch: Fetch) -> None:
        """Fetch in the background; what fails is left to `open`, which tries again and tells."""
        if not self.has(sha256):
            self._ahead.add(sha256, lambda: os.close(self.open(sha256, size, fetch)))

    def has(self, sha256: str) -> bool:
        """Whether the file with this content is there."""
        return (self.folder / sha256[:2] / sha256).exists()

    def close(self) -> None:
        """Forget what was to be fetched ahead."""
        self._ahead.clear()

    def _lock(self, name: str) -> FileLock:
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        return lock_at(self.folder / "locks" / f"{name}.lock")

    def _fetch(self, path: Path, size: int, fetch: Fetch) -> None:
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.{size}{PART}")
        while not self._reserve(part, size):
            time.sleep(WAIT_FOR_ROOM)
        try:
            fetch(lambda written: check_content(written, path.name), part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            with self._lock("room"):  # whoever counts sees it under one of its names
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> bool:
        """Make room and begin the file; False where others fetch into all there is: their files may leave later.

        Raises:
            OSError: the disk is full of other things.
        """
        with self._lock("room"):
            part.unlink(missing_ok=True)  # of a process that was killed: whoever fetches it holds its lock
            there = sorted(self._files())
            used = sum(length for _, length, _, _ in there)
            free = shutil.disk_usage(self.folder).free
            room = min(self.limit, free + sum(on_disk for _, _, on_disk, _ in there))
            leaving, others_fetch = [], False
            for _, length, _, path in there:
                if used + size <= room:
                    break
                if path.suffix != PART or path.parent == part.parent or self._is_abandoned(path):
                    leaving.append(path)
                    used -= length
                else:
                    others_fetch = True
            if used + size > room:
                if others_fetch:
                    return False
                told = f"its disk has {free / 1e9:.2f} GB free, a file takes {size / 1e9:.2f} GB, and nothing can leave"
                raise OSError(errno.ENOSPC, f"{told}: set data.remote.cache to a folder on another disk")
            for path in leaving:
                path.unlink(missing_ok=True)
            part.touch()
            return True

    def _files(self) -> Iterator[tuple[float, int, int, Path]]:
        """Time of the last use, bytes, those of them that are on the disk yet, and path of what takes room."""
        for entry in (entry for folder in self.folder.glob("[0-9a-f][0-9a-f]") for entry in os.scandir(folder)):
            path = Path(entry.path)
            try:
                told = entry.stat()
            except FileNotFoundError:
                continue  # a fetch that failed meanwhile
            reserved = path.stem.rpartition(".")[2] if path.suffix == PART else ""
            yield told.st_mtime, int(reserved) if reserved.isdigit() else told.st_size, told.st_size, path

    def _is_abandoned(self, part: Path) -> bool:
        """Whether nobody fetches into a file; asked of the folders whose lock this fetch does not hold itself."""
        lock = self._lock(part.parent.name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        return True  # and nobody begins it again while this process holds the room's lock


def _used(path: Path) -> int | None:
    """A descriptor of a file that is there, as the one that was used last."""
    try:
        os.utime(path)
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def check_content(path: Path, sha256: str) -> None:
    """Raise OSError unless a file has this content."""
    if file_sha256(path) != sha256:
        raise OSError(errno.EIO, f"{path.stat().st_size} bytes came, and their sha256 is not the manifest's")
