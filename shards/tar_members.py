"""Walking through a tar that may have been made to harm: headers are read, nothing is extracted."""

import io
import tarfile
from collections.abc import Iterator
from typing import IO

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")  # suffixes of the images of a WebDataset tar
LONGEST_READ = 2**20  # bytes; a header with its extensions is far shorter, and tarfile would read whatever one claims


class BoundedReads(io.RawIOBase):
    """A part of a file that hands out no more than LONGEST_READ bytes at a time.

    Args:
        file: open for reading, seekable.
        begin, size: the part, in bytes; by default from `begin` to the end of the file.

    Raises:
        tarfile.ReadError: on a longer read.
    """

    def __init__(self, file: IO[bytes], begin: int = 0, size: int | None = None):
        self._file, self._begin = file, begin
        self._size = file.seek(0, io.SEEK_END) - begin if size is None else size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._position if size < 0 else size
        if wanted > LONGEST_READ:
            raise tarfile.ReadError(f"a header claims {wanted:,} bytes")
        self._file.seek(self._begin + self._position)
        found = self._file.read(max(0, min(wanted, self._size - self._position)))
        self._position += len(found)
        return found


def plain_members(stream: BoundedReads, where: str) -> Iterator[tarfile.TarInfo]:
    """The files of an uncompressed tar, one after the other; folders are passed over.

    Args:
        where: the tar's path, for messages.

    Raises:
        tarfile.TarError: no tar, a truncated one, a link, a device, a sparse file, or an unreasonable header.
    """
    # "r:" is without compression, and members are not kept: memory does not grow with the tar
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]
            if member.isdir():
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise tarfile.ReadError(f"{where}: member {member.name!r} is no plain file")
            if member.offset_data + member.size > stream.seek(0, io.SEEK_END):
                raise tarfile.ReadError(f"{where} ends inside of member {member.name!r}")
            yield member
