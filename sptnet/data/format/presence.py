"""Whether the files that a manifest names are there, with their sizes."""

import errno
import os
import stat
from pathlib import Path

from sptnet.data.format.faults import DatasetError, unreadable
from sptnet.data.format.shard_list import Shards


def check_files(root: Path, shards: Shards) -> None:
    """Look whether all tars and indexes are there, tars with their sizes; raises DatasetError."""
    for file, index, size in shards.names():
        found = _size_of(root / file)
        _size_of(root / index)
        if found != size:
            raise DatasetError(f"{root / file} has {found} bytes, the manifest says {size}: copy it again")


def _size_of(path: Path) -> int:
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise unreadable(f"{path} cannot be looked at", error) from None
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{path} is missing: make the shards again or copy it here")
    return found.st_size
