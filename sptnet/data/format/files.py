"""Files that others put there: read only where they are regular and of a sane size, written only as new ones.

A folder of shards or images may have been made to harm: a FIFO or a device in the place of a file would hang a reader
or fill its memory, and a link under the name that a tool is about to write would lead its bytes elsewhere.
"""

import argparse
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sptnet.data.format.temporary import temporary_of

LARGEST_IMAGE = 2**29  # bytes of an encoded image; the largest that is decoded has fewer, as a TIFF without compression
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # of what image.FORMATS reads
TAKEN = ", ".join(sorted(IMAGE_SUFFIXES))
NO_IMAGES = {"thumbs.db", "desktop.ini"}  # what Windows puts into folders
# without O_NONBLOCK the opening of a FIFO waits for somebody who writes into it
READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)  # of folders: some of SMB and FUSE
# what file systems say that have no hard links
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


PASSWORD, IN_BRACKETS = re.compile(r"://[^/@\s]*:[^/@\s]*@"), re.compile(r"\[[0-9A-Fa-f:.]*\]")  # an IPv6 address
# where a dataset may be, of all that fsspec has
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "http", "https", "hdfs", "webhdfs", "sftp",
             "ssh", "file", "memory")  # fmt: skip


def is_url(text: str) -> bool:
    """Whether a place is behind a URL, and not on a disk."""
    return "://" in text


def check_url(url: str) -> None:
    """Raise ValueError for a URL that nobody should be led to by a file from elsewhere; the message says why.

    fsspec's other filesystems open files inside of files, by rules that the URL's options bring along, and some of its
    versions have executed those.
    """
    protocol, _, rest = url.partition("://")
    if "::" in IN_BRACKETS.sub("", url):
        raise ValueError("joins several places by ::, which is not followed")
    if protocol not in PROTOCOLS:
        raise ValueError(f"is behind {protocol}://, where no dataset is looked for: use {', '.join(PROTOCOLS)}")
    if "@" in (place := rest.partition("/")[0]) and ":" in place.rpartition("@")[0]:
        raise ValueError(
            "has a password in it, which would be written wherever the place is told: leave it to fsspec's own "
            "settings or the environment"
        )


def without_password(text: str) -> str:
    """A URL, or what one is in, as it may be told."""
    return PASSWORD.sub("://...@", text)


def local(text: str) -> Path:
    """An argument of a command that is a path; a URL would be a folder of such a name.

    Raises:
        argparse.ArgumentTypeError: it is a URL, or empty, as of a variable that is not set.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: name a folder on a disk")
    return Path(text)


def told_by_suffix(passed_over: Mapping[str, int]) -> str:
    """How many files of which suffix, for a sentence; empty where there are none."""
    return ", ".join(f"{count:,} {suffix or 'without one'}" for suffix, count in sorted(passed_over.items()))


def folders_in(path: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones left out, sorted as strings.

    Raises:
        OSError: it cannot be listed, or a link in it leads nowhere, as to a disk that is not there: what lies behind it
            would be left out without a word. Of links that are named as images it is not asked.
    """
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_one = stat.S_ISDIR(entry.stat().st_mode)
            except OSError:
                if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                    raise
                continue
            if is_one:
                found.append(entry.name)
    return sorted(found)


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """Whether an entry is a folder; a link in a circle is none, and whoever reads it says so.

    Raises:
        ValueError: a link to one, which is not followed: what lies there would be left out, or listed for ever.
    """
    try:
        found = entry.is_dir()
    except OSError:
        return False
    if found and entry.is_symlink():
        where = os.fsdecode(entry.path)
        raise ValueError(f"{where} is a link to a folder, which is not followed: put the folder there")
    return found


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


def check_regular(path: Path | str) -> None:
    """Raise OSError as `open_regular` does: for what opens a path itself, and would wait for a FIFO."""
    os.close(open_regular(path))


def is_utf8(path: Path | str) -> bool:
    """Whether a path can be named in a file of text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def create(path: Path) -> IO[bytes]:
    """A new file, open for writing. What had its name is removed: of a link the link, never what it points to.

    Raises:
        OSError: it cannot be made, or a folder has its name.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, WRITING, 0o666), "wb")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, open for writing, that takes the place of `path` when it is whole and on the disk.

    It has a name of its own until then, so that several processes may write the same path; where something goes wrong
    it is removed, and `path` stays what it was.

    Raises:
        OSError: it cannot be written, or a folder has the name.
    """
    temporary = temporary_of(path)
    try:
        with os.fdopen(os.open(temporary, WRITING, 0o666), "wb") as file:
            yield file
            to_disk(file)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, bring it to the disk, and give it its name; raises OSError."""
    with replacing(path) as file:
        file.write(content)


def write_once(path: Path, content: bytes) -> bool:
    """Write a whole file unless one of the name is there, and say whether it was written; raises OSError.

    By a hard link, which is made by one of several at once on network file systems too. Where there are none, the file
    is made under its own name, and whoever reads it in that moment finds a part of it.
    """
    temporary = temporary_of(path)
    try:
        with os.fdopen(os.open(temporary, WRITING, 0o666), "wb") as file:
            file.write(content)
            to_disk(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # NFS may have made the link and lost its answer: open(2)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _written_in_place(path, content)
        sync_folder(path.parent)
        return True
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _written_in_place(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, WRITING, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        to_disk(file)
    return True


def write_through(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk; raises OSError."""
    with create(path) as file:
        file.write(content)
        to_disk(file)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can say so of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def to_disk(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
