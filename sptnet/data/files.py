"""Files that others put there: read only where they are regular and of a sane size, written only as new ones.

A folder of shards or images may have been made to harm: a FIFO or a device in the place of a file would hang a reader
or fill its memory, and a link under the name that a tool is about to write would lead its bytes elsewhere.
"""

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

LARGEST_IMAGE = 2**29  # bytes of an encoded image; the largest that is decoded has fewer, as a TIFF without compression
CHUNK = 2**20
# without O_NONBLOCK the opening of a FIFO waits for somebody who writes into it
READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, for reading; links to one are followed.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device, a folder; or its name cannot be one (NUL, surrogates).
    """
    try:
        descriptor = os.open(path, READING)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", ascii(str(path))) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def read_regular(path: Path | str, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; raises OSError."""
    # by descriptor: a conversion reads every image so, and a file object takes as long as a read
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
        found = os.read(descriptor, size)
        while len(found) < size and (more := os.read(descriptor, size - len(found))):
            found += more
        return found
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a regular file's content; raises OSError."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def create(path: Path) -> IO[bytes]:
    """A new file, open for writing. What had its name is removed: of a link the link, never what it points to.

    Raises:
        OSError: it cannot be made, or a folder has its name.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, WRITING, 0o666), "wb")


def append(path: Path) -> IO[bytes]:
    """A regular file, open for writing behind its end, made if need be; never one that a link leads to.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "ab")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, bring it to the disk, and give it its name; raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with create(temporary) as file:
            file.write(content)
            to_disk(file)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_through(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk; raises OSError."""
    with create(path) as file:
        file.write(content)
        to_disk(file)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_disk(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
