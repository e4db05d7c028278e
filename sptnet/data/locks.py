"""Locks between processes, and what a disk says that has none."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock

NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


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
