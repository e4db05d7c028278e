"""Room for a folder of tokens among others like it: the least recently used that nobody uses leave first."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import Timeout

from sptnet.data.locks import lock_at
from sptnet.data.tokens import FINGERPRINT

NAME = re.compile("[0-9a-f]{16}")  # of `tokens.folder_of`: a cache may be in a folder of other things


class InUse:
    """Keeps a folder from being removed while this process, or one that it forked, lives; its time tells of the use."""

    FILE = "used"

    def __init__(self, folder: Path):
        self._descriptor = os.open(folder / self.FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(OSError):  # a disk without locks: then nobody removes anything there either
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        os.utime(folder / self.FILE)

    def release(self) -> None:
        """Let others remove the folder."""
        os.close(self._descriptor)


def lock_of(folder: Path) -> Path:
    """What is locked while somebody begins to use a folder of tokens, or removes it."""
    return folder.with_suffix(".lock")


def make_room(folder: Path, needed: int, limit: int) -> str:
    """Remove folders beside `folder` until `needed` more bytes are within `limit`; why it cannot be, or nothing.

    One process at a time: others would count what this one removes.
    """
    with ExitStack() as held:
        with suppress(OSError):  # somebody else's folder, or a disk without locks
            held.enter_context(lock_at(folder.parent / "room.lock"))
        return _make_room(folder, needed, limit)


def _make_room(folder: Path, needed: int, limit: int) -> str:
    there = sorted(_others(folder))
    used = size_of_folder(folder) + sum(size for _, size, _ in there)
    if why := beyond(size_of_folder(folder) + needed, limit):
        return why
    for _, size, other in there:
        if used + needed <= limit:
            break
        remove(other)
        used -= size - size_of_folder(other)
    if used + needed > limit:
        return f"{folder.parent} holds {used / 1e9:,.1f} GB that other runs use, trunk_cache_gb is {limit / 1e9:g}"
    if needed > (free := shutil.disk_usage(folder).free):
        return f"the tokens need {needed / 1e9:,.1f} GB, and the disk of {folder.parent} has {free / 1e9:,.1f} GB"
    return ""


def beyond(size: int, limit: int) -> str:
    """Why tokens of so many bytes are never kept, "" where they may be."""
    return f"the tokens need {size / 1e9:,.1f} GB, and trunk_cache_gb is {limit / 1e9:g}" if size > limit else ""


def size_of_folder(folder: Path) -> int:
    """Bytes of the files in a folder."""
    size = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_size
    return size


def _others(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of the last use, bytes and path of the folders beside one."""
    for entry in os.scandir(folder.parent):
        path = Path(entry.path)
        used = path / InUse.FILE
        ours = NAME.fullmatch(entry.name) and (path / FINGERPRINT).is_file() and used.is_file()
        if path != folder and ours and not entry.is_symlink():
            with suppress(OSError):
                yield used.stat().st_mtime, size_of_folder(path), path


def remove(folder: Path) -> None:
    """Remove a folder, unless somebody uses it or begins to."""
    with suppress(OSError, Timeout), lock_at(lock_of(folder)).acquire(timeout=0):
        descriptor = os.open(folder / InUse.FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)  # NFS keeps a file that is open, and the folder with it
        shutil.rmtree(folder)
