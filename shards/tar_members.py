"""Walking through a tar that may be damaged or made to harm: headers are read, nothing is extracted.

Stricter than the standard library's tarfile, which takes a damaged header for the end of the archive: here only two
empty blocks end one, with nothing behind them, and whatever else is no header is an error.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sptnet.data.format.files import open_regular

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")  # suffixes of the images of a WebDataset tar
BLOCK = 512
LONGEST_EXTENSION = 2**20  # bytes of a long name or of extended attributes
EMPTY = bytes(BLOCK)
CHUNK = 2**20


class TarError(ValueError):
    """No tar, or a damaged one, or one with members that no dataset has; the message names the place."""


class Member(NamedTuple):
    """A plain file in a tar: its name, and offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


Reading = Callable[[int, int], bytes]  # of position and size, in bytes; fewer come at the end


class OpenTar:
    """A tar that is open for reading; to be closed. Raises OSError where it is no regular file."""

    def __init__(self, path: Path):
        self._descriptor = open_regular(path)

    def close(self) -> None:
        os.close(self._descriptor)

    def members(self, begin: int = 0, size: int | None = None) -> Iterator[Member]:
        """Its plain files, or those of a tar that lies in it at `begin` and is `size` bytes long."""
        end = os.fstat(self._descriptor).st_size if size is None else begin + size
        return plain_members(self._at, begin, end)

    def read(self, member: Member) -> bytes:
        """The content of a member, which the caller found to be of a sane size."""
        return self._at(member.offset, member.size)

    def _at(self, position: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, position)


class StreamedTar:
    """A tar that is read once, from its beginning to its end, with the sha256 of all of it.

    Args:
        file: gives its bytes in order.
        size: how many there are.
    """

    def __init__(self, file: IO[bytes], size: int):
        self._file, self.size, self._position, self._digest = file, size, 0, hashlib.sha256()

    def members(self) -> Iterator[Member]:
        """Its plain files; `read` may be asked for each before the next comes."""
        return plain_members(self._at, 0, self.size)

    def read(self, member: Member) -> bytes:
        """The content of the member that came last, which the caller found to be of a sane size."""
        return self._at(member.offset, member.size)

    def sha256(self) -> str:
        """Of the whole tar, once `members` is at its end; raises TarError where bytes are missing."""
        self._to(self.size)
        return self._digest.hexdigest()

    def _at(self, position: int, size: int) -> bytes:
        self._to(position)
        return self._next(size)

    def _to(self, position: int) -> None:
        assert position >= self._position
        while position > self._position:
            if not self._next(min(CHUNK, position - self._position)):
                raise TarError(f"it ends at byte {self._position:,} of {self.size:,}")

    def _next(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._file.read(size)):
            self._digest.update(piece)
            self._position += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)


def plain_members(read: Reading, begin: int, end: int) -> Iterator[Member]:
    """The files of an uncompressed tar, one after the other; folders are passed over.

    Args:
        read: is asked for ever later positions only.
        begin, end: where the tar lies in what is read, in bytes.

    Raises:
        TarError: no tar, a damaged or truncated one, a link, a device, a sparse file, or an unreasonable header.
    """
    position = begin
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _read(read, position, BLOCK, end)
        if header == EMPTY:
            if long_name is not None or long_size is not None:
                raise TarError(f"an extended header at byte {position - BLOCK} has no member")
            return _need_end(read, position, end)
        _need_checksum(header, position)
        kind, claimed, data = header[156:157], _size(header[124:136], position), position + BLOCK
        if kind in b"Lxg":
            if claimed > LONGEST_EXTENSION:
                raise TarError(f"the extended header at byte {position} claims {claimed:,} bytes")
            text = _read(read, data, claimed, end)
            if kind == b"L":
                long_name = _text(text)
            else:
                path, number = _attributes(text, position)
                if kind == b"g" and (path is not None or number is not None):
                    raise TarError(f"the header at byte {position} gives all members one name or size")
                long_name = path if path is not None else long_name
                long_size = number if number is not None else long_size
        else:
            name = _name(header) if long_name is None else long_name
            claimed = claimed if long_size is None else long_size
            long_name = long_size = None
            if not _is_folder(kind, name, claimed):
                if kind not in (b"0", b"\0", b"7"):
                    raise TarError(f"member {name!r} is no plain file")
                if data + claimed > end:
                    raise TarError(f"it ends inside of member {name!r}")
                yield Member(name, data, claimed)
        position = data + claimed + -claimed % BLOCK


def _read(read: Reading, position: int, size: int, end: int) -> bytes:
    found = read(position, min(size, max(0, end - position)))
    if len(found) < size:
        raise TarError(f"it ends at byte {position + len(found)}, without the two empty blocks that end a tar")
    return found


def _need_end(read: Reading, position: int, end: int) -> None:
    """Two empty blocks, and nothing but padding behind them."""
    if _read(read, position + BLOCK, BLOCK, end) != EMPTY:
        raise TarError(f"it has a damaged header at byte {position}")
    position += 2 * BLOCK
    while position < end:
        found = read(position, min(CHUNK, end - position))
        if not found or found.strip(b"\0"):
            raise TarError(f"it has something behind its end, at byte {position}: is it several tars?")
        position += len(found)


def _need_checksum(header: bytes, position: int) -> None:
    told = header[148:156].strip(b" \0")
    # the field itself counts as eight spaces
    if not _is_octal(told) or int(told, 8) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise TarError(f"it has no sound header at byte {position}: it is damaged, compressed, or no tar")


def _is_octal(digits: bytes) -> bool:
    return bool(digits) and not digits.strip(b"01234567")


def _size(field: bytes, position: int) -> int:
    if field[0] == 0x80:  # a number of more than eleven octal digits
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits and not _is_octal(digits):
        raise TarError(f"the header at byte {position} has a size that is none")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _is_folder(kind: bytes, name: str, size: int) -> bool:
    folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
    if folder and size:
        raise TarError(f"folder {name!r} has {size} bytes")
    return folder


def _attributes(text: bytes, position: int) -> tuple[str | None, int | None]:
    """Name and size in the records `<length> <key>=<value>` of an extended header."""
    name: str | None = None
    size: int | None = None
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = text[len(digits) + 1 : length]
        key, separator, value = record[:-1].partition(b"=")
        if not separator or length > len(text) or record[-1:] != b"\n" or key.startswith(b"GNU.sparse"):
            raise TarError(f"the extended header at byte {position} is damaged, or of a sparse file")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise TarError(f"the extended header at byte {position} has a size that is none")
            size = int(value)
        text = text[length:]
    return name, size
