"""Lists of image files on disk: of a folder of any depth, or named by a CSV file.

    listing.bin   the paths as the file system has them, each ended by a zero byte, in order
    listing.npy   int64: how many paths there are, where in listing.bin every 256th begins, and where the last one ends

Written once, so that a run that is killed and goes on means the same images by the same numbers; read by parts, so that
memory does not grow with their number.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import numpy as np

from sptnet.data.blocks import Sample
from sptnet.data.format.faults import UnreachableError
from sptnet.data.format.files import IMAGE_SUFFIXES, LARGEST_IMAGE, NO_IMAGES, is_folder, read_regular, replacing
from sptnet.data.format.manifest import UNKNOWN
from sptnet.errors import SptnetError, outcome_of_reading

PATHS, STARTS = "listing.bin", "listing.npy"
COLUMN = "image"
SMALLEST, LARGEST = 256, 4096  # images of a part
LOOKED_AT = 2000  # files, and about as many more, to see whether they are what was listed
LARGEST_STARTS = 2**28  # bytes of listing.npy: of 10^9 images it has 31 MB


class ListingError(SptnetError, ValueError):
    """Images that cannot be listed; the message says where."""

    on_all_ranks = True


def images_below(root: Path, passed_over: Counter[str] | None = None) -> Iterator[bytes]:
    """Paths, relative to `root`, of files that are images by their suffix: sorted within every folder, its own first.

    Names that begin with a dot are left out.

    Args:
        passed_over: counts files of other suffixes, by suffix, when all paths were taken.

    Raises:
        ListingError: a folder that cannot be read, or a link to one, which is not followed.
    """
    pending = [b""]
    while pending:
        below = pending.pop()
        folder = os.path.join(os.fsencode(root), below)
        try:
            with os.scandir(folder) as entries:
                there = sorted((e.name, is_folder(e)) for e in entries if not e.name.startswith(b"."))
        except OSError as error:
            raise ListingError(f"{os.fsdecode(folder)} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ListingError(str(error)) from None
        pending += [os.path.join(below, name) for name, below_it in reversed(there) if below_it]
        for name, below_it in there:
            suffix = os.path.splitext(os.fsdecode(name))[1].lower()
            if not below_it and suffix in IMAGE_SUFFIXES:
                yield os.path.join(below, name)
            elif not below_it and passed_over is not None and os.fsdecode(name).lower() not in NO_IMAGES:
                passed_over[suffix] += 1


def images_named_by(path: Path) -> Iterator[bytes]:
    """The column `image` of a CSV file with a header, row by row: paths relative to its folder, or absolute.

    Raises:
        ListingError: not such a file, or a row without an image.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ListingError(f"{path} is an image: name the folder that it is in, or a CSV file with a column {COLUMN!r}")
    try:
        # names that are no UTF-8 come through as the bytes they are
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if COLUMN not in (reader.fieldnames or ()):
                told = ", ".join(repr(name) for name in reader.fieldnames or ())[:200]
                raise ListingError(
                    f"{path} has no column {COLUMN!r}: it needs a header with one, between commas, and a path in each "
                    f"row; its first line has {told or 'nothing'}"
                )
            for row in reader:
                if not row[COLUMN] or "\0" in row[COLUMN]:
                    raise ListingError(f"{path}, line {reader.line_num}: the column {COLUMN} holds no path")
                yield os.fsencode(row[COLUMN])
    except (OSError, csv.Error) as error:
        raise ListingError(f"{path} cannot be read: {error}") from None


def write_listing(folder: Path, names: Iterator[bytes]) -> None:
    """Write both files of a listing; `listing.npy`, by which it counts as there, last. Raises OSError, ListingError."""
    starts, count = [], 0
    with replacing(folder / PATHS) as file:
        for name in names:
            if count % SMALLEST == 0:
                starts.append(file.tell())
            file.write(name + b"\0")
            count += 1
        starts.append(file.tell())
    with replacing(folder / STARTS) as file:
        np.save(file, np.array([count, *starts], np.int64))


def _counts(encoded: bytes) -> list[int]:
    """How many images, and where every so many paths begin; ValueError for anything else."""
    try:
        found = np.load(io.BytesIO(encoded), allow_pickle=False)
    except Exception as error:  # numpy raises whatever damage makes of a header
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.int64 or found.ndim != 1 or len(found) < 2:
        raise ValueError("it is no list of numbers")
    count, starts = int(found[0]), found[1:]
    if starts[0] != 0 or (np.diff(starts) < 0).any() or len(starts) != -(-count // SMALLEST) + 1:
        raise ValueError("its numbers are of no list of paths")
    return [int(number) for number in found]


def part_size(count: int) -> int:
    """Images of a part: about 64 parts of few images, so that several processes share them, and at most 4,096 each."""
    return min(LARGEST, max(SMALLEST, -(-count // 64 // SMALLEST) * SMALLEST))


class ListedSource:
    """The files of a listing in `folder`, in parts; relative paths are below `root`; a uid is a place in the list.

    Raises:
        ListingError: no listing there, or half of one.
    """

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        try:
            count, *starts = _counts(read_regular(folder / STARTS, LARGEST_STARTS))
            listed = (folder / PATHS).stat().st_size
        except (OSError, ValueError) as error:
            raise ListingError(f"the listing in {folder} cannot be read ({error}): remove the folder") from None
        if listed != starts[-1]:
            raise ListingError(f"{folder / PATHS} has {listed} bytes, not {starts[-1]}: remove the folder")
        self.count, self.part_size = int(count), part_size(count)
        self._starts: list[int] = [*starts[: -1 : self.part_size // SMALLEST], starts[-1]]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def size(self, part: int) -> int:
        return min(self.part_size, self.count - part * self.part_size)

    def names(self, part: int) -> list[bytes]:
        """The paths of a part as they were listed. Raises ListingError."""
        with open(self.folder / PATHS, "rb") as file:
            file.seek(self._starts[part])
            names = file.read(self._starts[part + 1] - self._starts[part]).split(b"\0")[:-1]
        if len(names) != self.size(part):
            raise ListingError(f"{self.folder / PATHS} is damaged, it lists {len(names)} images of part {part}, not "
                               f"{self.size(part)}: remove the folder")  # fmt: skip
        return names

    def lists(self, names: Iterator[bytes]) -> bool:
        """Whether these are the listed paths, in this order."""
        listed = (name for part in range(len(self)) for name in self.names(part))
        return all(one == other for one, other in zip_longest(listed, names))

    def has_newer(self) -> bool:
        """Whether one of some of the files, all of few, became another, or was written anew, since they were listed."""
        listed = (self.folder / STARTS).stat().st_mtime_ns
        step = max(1, self.count // LOOKED_AT)
        for part in range(len(self)):
            for name in self.names(part)[::step]:
                with suppress(OSError):  # gone: read, and told, one by one
                    if (self.root / os.fsdecode(name)).stat().st_ctime_ns > listed:
                        return True
        return False

    def read(self, part: int, positions: range) -> list[Sample]:
        names = self.names(part)[positions.start : positions.stop]
        first = part * self.part_size + positions.start
        return [self._read(first + i, name) for i, name in enumerate(names)]

    def _read(self, uid: int, name: bytes) -> Sample:
        try:
            encoded, error = read_regular(self.root / os.fsdecode(name), LARGEST_IMAGE), ""
        except OSError as reason:
            if outcome_of_reading(reason) == "retry" or not self.root.exists():
                raise UnreachableError(f"{self.root}: {os.fsdecode(name)} cannot be read: {reason.strerror}") from None
            encoded, error = b"", reason.strerror or str(reason)
        return Sample(os.fsdecode(name), uid, UNKNOWN, encoded, error)

    def fetch_ahead(self, part: int) -> None:
        pass
