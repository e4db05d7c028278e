"""Locks between processes, what a disk says that has none, and which disks other nodes see."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock

SHARED = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p", "panfs", "wekafs", "virtiofs"}
NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def network_file_system(folder: Path) -> str | None:
    """The file system of a folder, if other nodes may share it; locks are slow there, or hold on one node only."""
    try:
        mounts = [line.split() for line in os.fsdecode(Path("/proc/self/mounts").read_bytes()).split("\n") if line]
    except OSError:
        return None  # no Linux
    real = str(folder.resolve())
    above = [(len(m[1]), m[2]) for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
    kind = max(above, default=(0, ""))[1]
    return kind if kind in SHARED or kind.startswith("fuse.") else None


def lock_at(path: Path) -> FileLock:
    """A lock that is gone when its process is.

    Acquiring it raises an OSError of `NO_FLOCK` on a disk without such locks: filelock's own way out are files that a
    killed process leaves, and that other nodes wait for without end.
    """
    return FileLock(path, mode=0o666, fallback_to_soft=False)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, where the disk has them: what is done meanwhile must bear a twin where it has none.

    Raises:
        OSError: the lock's file cannot be made.
    """
    with ExitStack() as held:
        try:
            held.enter_context(lock_at(path))
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        yield
