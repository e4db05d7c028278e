"""Which images a source has: found by one task, written down, and read by the others.

The file is a line of JSON and the columns of both parts, as `items.Items` has them, little-endian. Its sha256 is the
fingerprint of a conversion: it holds all that decides which image is where, and nothing of where the source lies.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.conversion.record import FAILED, FOLDER, ITEMS, SCANNING
from sptnet_shards.items import Items, are_places
from sptnet_shards.source import Read, Source, SourceError

from sptnet.data.format.files import WRITING, open_regular, read_regular, replacing, write_whole
from sptnet.data.format.temporary import temporary_of, writer_of

COLUMNS = (("classes", "<i4"), ("sizes", "<i8"), ("ends", "<i8"))
LONGEST_HEAD = 2**28  # bytes of the first line
BEAT, SILENT = 5.0, 90.0  # seconds: how often a task that scans says so, and after how many of silence it is given up
LOOK = 0.5  # seconds between two looks at it
KEPT = 4 * LOOK  # for which a reason is left to those that wait, before a new try removes it
CHUNK = 2**24
LONGEST_WHY = 2**11  # bytes of what is said to others


def encoded(source: Source) -> Iterator[bytes | memoryview]:
    """The content of the file, in pieces."""
    head: dict[str, Any] = {
        "name": source.name, "classes": source.classes, "num_old": source.num_old, "num_new": source.num_new,
        "protocol": source.protocol, "encodes": source.encodes,
        "labelled": None if source.labelled is None else len(source.labelled),
        "parts": [[len(items), len(items.names), items.class_names] for items in _parts(source)],
    }  # fmt: skip
    yield json.dumps(head, sort_keys=True).encode() + b"\n"
    columns = [(getattr(items, name), dtype) for items in _parts(source) for name, dtype in COLUMNS]
    if source.labelled is not None:
        columns.append((source.labelled, "<i8"))
    for column, dtype in columns:
        yield np.ascontiguousarray(column.astype(dtype, copy=False)).data.cast("B") if len(column) else b""
    for items in _parts(source):
        yield items.names


def _parts(source: Source) -> tuple[Items, Items]:
    return source.part("train"), source.part("test")


def fingerprint(source: Source) -> str:
    """sha256 of the file."""
    digest = hashlib.sha256()
    for piece in encoded(source):
        digest.update(piece)
    return digest.hexdigest()


def _items_of(out: Path, wanted: str) -> Path:
    """By its fingerprint: a second task that scanned, and found other images, must not write over it."""
    return out / FOLDER / f"{wanted[:16]}-{ITEMS}"


def write_items(out: Path, source: Source, wanted: str) -> None:
    """Write the file of the fingerprint `wanted`; raises OSError."""
    with replacing(_items_of(out, wanted)) as file:
        for piece in encoded(source):
            file.write(piece)


def read_items(out: Path, wanted: str, read: Read) -> Source | None:
    """The source that another task found; None where its file is not there, or is not of the fingerprint `wanted`."""
    for place in (_items_of(out, wanted), out / FOLDER / ITEMS):  # the latter of the version before
        with (
            suppress(OSError, ValueError, KeyError, TypeError, RecursionError),
            os.fdopen(open_regular(place), "rb") as file,
        ):
            if (found := _parsed(_Digesting(file), wanted, read)) is not None:
                return found
    return None


class _Digesting:
    """A file that is read once, with the sha256 of what was read."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest, self.left = file, hashlib.sha256(), os.fstat(file.fileno()).st_size

    def line(self) -> bytes:
        found = self._file.readline(LONGEST_HEAD)
        self.digest.update(found)
        self.left -= len(found)
        return found

    def array(self, count: int, dtype: str) -> NDArray[Any]:
        """The next numbers; ValueError where the file has less."""
        size = count * np.dtype(dtype).itemsize
        if not 0 <= size <= self.left:
            raise ValueError(f"{size} bytes of {self.left}")
        found = np.empty(count, dtype)
        view = found.data.cast("B") if size else memoryview(b"")
        for begin in range(0, size, CHUNK):
            piece = view[begin : begin + CHUNK]
            if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError("it ends too early")
            self.digest.update(piece)
        self.left -= size
        return found


def _parsed(file: _Digesting, wanted: str, read: Read) -> Source | None:
    head = json.loads(file.line())
    columns = [[file.array(count, dtype) for _, dtype in COLUMNS] for count, _, _ in head["parts"]]
    labelled = None if head["labelled"] is None else file.array(head["labelled"], "<i8")
    names = [file.array(size, "u1") for _, size, _ in head["parts"]]
    if file.left or file.digest.hexdigest() != wanted:
        return None
    train, test = (
        Items(class_names, classes, sizes, ends, name.data)
        for (_, _, class_names), (classes, sizes, ends), name in zip(head["parts"], columns, names, strict=True)
    )
    if not (train.is_sound() and test.is_sound()) or (labelled is not None and not are_places(labelled, len(train))):
        return None
    return Source(
        head["name"], head["classes"], head["num_old"], train, test, read, head["protocol"], labelled=labelled,
        num_new=head["num_new"], encodes=head["encodes"],
    )  # fmt: skip


@contextmanager
def turn_to_scan(out: Path, done: Callable[[], bool], alone: bool) -> Iterator[None]:
    """Wait while another task scans, until `done`; where nobody does, or is silent, others wait for us meanwhile.

    Only to save work: two that scan at once come to the same, and `record.claim` takes one of them.

    Args:
        alone: there are no other tasks, to whom a scan that fails is to say why.

    Raises:
        SourceError: what the task that was waited for found wrong with the source.
    """
    place = out / FOLDER / SCANNING
    seen: tuple[bytes, int] | None = None
    since = time.monotonic()
    told = False
    while not done():
        if _taken(place):
            with _said(place, alone):
                yield
            return
        found = _seen(place)
        if found is not None and found[0].startswith(FAILED):
            if seen is not None and seen != found:  # it was waited for
                raise SourceError(found[0].removeprefix(FAILED).decode(errors="replace"))
            if seen is not None and time.monotonic() - since > KEPT:
                with suppress(OSError):  # of an earlier try: the source may be better now
                    place.unlink()
                seen = None
                continue
        if found != seen:
            seen, since = found, time.monotonic()
        writer = None if found is None else writer_of(found[0].decode(errors="replace"))
        if (writer is not None and writer.is_dead()) or time.monotonic() - since > SILENT:
            with suppress(OSError):
                place.unlink()
            continue
        if not told and found is not None and not found[0].startswith(FAILED):
            told = True
            print(f"waiting for {writer.host if writer else 'another task'}, which scans the source",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(LOOK)
    yield


@contextmanager
def _said(place: Path, alone: bool) -> Iterator[None]:
    """Say that this task scans for as long as it does, and, if it finds the source wrong, why."""
    stop, why = threading.Event(), b""
    beating = threading.Thread(target=_beat, args=(place, stop), daemon=True)
    beating.start()
    try:
        yield
    except SourceError as error:
        why = b"" if alone else FAILED + str(error).encode(errors="replace")[:LONGEST_WHY]
        raise
    finally:
        stop.set()
        beating.join()
        with suppress(OSError):
            write_whole(place, why) if why else place.unlink(missing_ok=True)


def _taken(place: Path) -> bool:
    place.parent.mkdir(parents=True, exist_ok=True)  # another task, whose scan failed, may have removed it
    try:
        descriptor = os.open(place, WRITING, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(temporary_of(place).name.encode())
    return True


def _seen(place: Path) -> tuple[bytes, int] | None:
    """Who scans, and when that was last said; by opening it, since a network disk may answer `stat` from memory."""
    try:
        content = read_regular(place, 2**12)
        return content, place.stat().st_mtime_ns
    except OSError:
        return None


def _beat(place: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(place)


def need_the_same_source(out: Path, wanted: str, source: Source) -> None:
    """Raise SourceError unless a source is what another task found."""
    if fingerprint(source) != wanted:
        raise SourceError(
            f"{out} is a conversion of other images: the source is another one, or has changed since; remove it or "
            "choose another folder"
        )
