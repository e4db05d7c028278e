"""What a source dataset is to the rest of this folder."""

import argparse
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.items import Item, Items
from sptnet_shards.numbers import positive
from sptnet_shards.progress import Scan

from sptnet.data.format.files import (
    IMAGE_SUFFIXES,
    LARGEST_IMAGE,
    NO_IMAGES,
    TAKEN,
    is_folder,
    local,
    read_regular,
    told_by_suffix,
)
from sptnet.errors import SptnetError, outcome_of_reading

LARGEST_LIST = 2**30  # bytes of a text file that lists images
Counts = Mapping[str, int]  # images per class
Read = Callable[[str], bytes]


class SourceError(SptnetError, ValueError):
    """A source that cannot be converted; the message names the file and what to do."""


class UnreadableError(SourceError):
    """A single file that is none, or that nobody may read; trying again will not help."""


@dataclass(frozen=True)
class Source:
    """A dataset in its own order.

    Attributes:
        train, test: the images of the two official parts, in the source's own order; `test` may be empty. Kept as
            columns, whatever sequence of items they are given as.
        classes: in target order, old ones first.
        read: gives the encoded image of an item's `where`; raises SourceError.
        protocol: what the source adds to the manifest's protocol.
        whole: images per class, for training and for testing, of the published dataset that this one was chosen from.
        remarks: what was left out on the way here, and other things that whoever converts it should know.
        labelled: int64, positions in `train` of the labelled images, ascending, where the source itself says them; None
            draws them.
        num_new: how many new classes there are, where images of unknown classes leave that open and somebody said it.
        encodes: whether `read` encodes the images, so that their bytes depend on the version of an encoder.
    """

    name: str
    classes: list[str]
    num_old: int
    train: Sequence[Item]
    test: Sequence[Item]
    read: Read
    protocol: dict[str, Any] = field(default_factory=dict)
    whole: tuple[Counts, Counts] | None = None
    remarks: list[str] = field(default_factory=list)
    labelled: NDArray[np.int64] | None = None
    num_new: int | None = None
    encodes: bool = False

    def part(self, kind: str) -> Items:
        """The images that those of a kind of shard are chosen from."""
        return Items.of(self.test if kind == "test" else self.train)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Items.of(self.train))
        object.__setattr__(self, "test", Items.of(self.test))

    @property
    def unknown(self) -> bool:
        """Whether nobody knows the classes of the unlabelled images."""
        return self.labelled is not None


class SourceCommand(NamedTuple):
    """One subcommand of make_shards.py.

    Attributes:
        help: one line; `description`: which files it expects and where they are published.
        add_arguments: adds what the source needs beyond the output folder.
        build: the source that parsed arguments ask for; raises SourceError.
        read: its `Source.read` alone, for tasks that know from another one which images there are; raises SourceError.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    build: Callable[[argparse.Namespace], Source]
    read: Callable[[argparse.Namespace], Read]


def takes_root(text: str) -> Callable[[argparse.ArgumentParser], None]:
    """The arguments of a source that is one folder."""

    def add_arguments(command: argparse.ArgumentParser) -> None:
        command.add_argument("root", type=local, help=text)

    return add_arguments


class Folder:
    """Files below a folder, read by their relative path. Callable, so that it serves as `Source.read`.

    Args:
        listed: the paths come out of a list that somebody else wrote: links that lead out of the folder are refused
            too. Whoever fills folders of classes with links to images elsewhere knows what they do.
        lenient: a file that is none is an item all the same, of no bytes: whoever reads it is told why not.
    """

    def __init__(self, root: Path, listed: bool = False, lenient: bool = False):
        self.root, self.listed, self.lenient = root, listed, lenient
        self._prefix = str(root)
        self.passed_over: Counter[str] = Counter()  # suffixes of files that were no images by them
        self._scan = Scan("files")
        self._real = lru_cache(maxsize=1024)(os.path.realpath)

    def __call__(self, where: str) -> bytes:
        try:
            return read_regular(self._path(where), LARGEST_IMAGE)
        except OSError as error:
            self._unreadable(where, error)

    def item(self, class_name: str, where: str) -> Item:
        """An item of a file that must be there; raises SourceError."""
        self._scan.count()
        if self.listed and where:
            where = posixpath.normpath(where)  # one name for a file that a list calls a.jpg and ./a.jpg
        return self._image(class_name, where)

    def _image(self, class_name: str, where: str) -> Item:
        try:
            return Item(class_name, where, self._size(where))
        except UnreadableError:
            if not self.lenient:
                raise
            return Item(class_name, where, 0)

    def _size(self, where: str) -> int:
        """Bytes of a file. Raises SourceError."""
        try:
            told = os.stat(self._path(where))
        except OSError as error:
            self._unreadable(where, error)
        if not stat.S_ISREG(told.st_mode):
            raise UnreadableError(f"{self.root / where} is no regular file: remove it")
        if told.st_size > LARGEST_IMAGE:
            raise UnreadableError(f"{self.root / where} has {told.st_size:,} bytes: no image has, remove it")
        return told.st_size

    def images(self, class_name: str, folder: str) -> Items:
        """The images anywhere below a folder, by path; other files are left alone."""
        return Items.of(self._images_below(class_name, folder))

    def _images_below(self, class_name: str, folder: str) -> Iterator[Item]:
        # all paths come sorted, and only the names of the folders on the way are held
        waiting = [(folder, iter(self._names(folder)))]
        while waiting:
            above, names = waiting[-1]
            for name in names:
                where = os.path.join(above, name)
                if name.endswith("/"):
                    waiting.append((where[:-1], iter(self._names(where[:-1]))))
                    break
                suffix = os.path.splitext(name)[1].lower()
                if suffix in IMAGE_SUFFIXES:
                    self._scan.count()
                    yield self._image(class_name, where)
                elif name.lower() not in NO_IMAGES:
                    self.passed_over[suffix] += 1
            else:
                waiting.pop()

    def _names(self, folder: str) -> list[str]:
        """What is not hidden in a folder, folders with a slash behind their names; so sorted, whole paths are too."""
        names = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    names.append(f"{entry.name}/" if is_folder(entry) else entry.name)
        except OSError as error:
            _cannot_be_listed(error)
        except ValueError as error:
            raise SourceError(str(error)) from None
        names.sort()
        return names

    def loose_images(self, folder: str) -> list[str]:
        """A sentence where images lie in a folder of class folders, outside of these."""
        path = self.root / folder
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        loose = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        told = f"{path} has {len(loose)} images outside of class folders, left out: the first is {(loose or [''])[0]}"
        return [told] if loose else []

    def other_suffixes(self) -> list[str]:
        """A sentence where `images` has passed files over for their suffix."""
        kinds = told_by_suffix(self.passed_over)
        told = f"{self.root} has files that are left out for their suffix: {kinds}; images are {TAKEN}"
        return [told] if kinds else []

    def class_folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted as strings, as torchvision's ImageFolder numbers classes."""
        path = need_folder(self.root / folder)
        try:
            return sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
        except OSError as error:
            _cannot_be_listed(error)

    def _path(self, where: str) -> str:
        """The file that `where` names, below the folder; raises SourceError, and OSError where it cannot be found."""
        if where.startswith("/") or ".." in where.split("/") or "\0" in where:
            raise SourceError(f"{where!r} is not a path below {self.root}: the list that names it is not to be trusted")
        path = os.path.join(self._prefix, where)  # as text: this is asked for every image
        if self.listed:
            # the folders' links are looked up once, the file's own each time
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if os.path.islink(path) else os.path.join(self._real(folder), name)
            if not real.startswith(os.path.join(self._real(self.root), "")):
                raise SourceError(f"{path} is a link that leads out of {self.root}: put the image itself there")
        return path

    def _unreadable(self, where: str, error: OSError) -> NoReturn:
        told = f"{self.root / where} cannot be read: {error.strerror}"
        # where its folder is gone too, a disk is, and with it every other image
        alone = outcome_of_reading(error) == "final" and os.path.isdir((self.root / where).parent)
        raise (UnreadableError if alone else SourceError)(told) from None


def _cannot_be_listed(error: OSError) -> NoReturn:
    raise SourceError(f"{error.filename} cannot be listed: {error.strerror}") from None


def need_folder(path: Path) -> Path:
    """The path, if it is a folder; SourceError if not."""
    if not path.is_dir():
        raise SourceError(f"{path} is missing or not a folder: give the dataset's folder as it was unpacked")
    return path


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that the dataset must have, without empty ones."""
    try:
        return [line for line in read_regular(path, LARGEST_LIST).decode().splitlines() if line.strip()]
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: give the dataset's folder as it was unpacked") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def number(text: str, low: int, high: int, where: str) -> int:
    """A whole number that a file says, of ASCII digits and in a range; raises SourceError."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16 and low <= int(digits) <= high):
        raise SourceError(f"{where} says {text!r} where a number from {low} to {high} belongs")
    return int(digits)


def need_classes(where: Path | str, trained: Sequence[str], tested: Iterable[str], num_old: int) -> None:
    """Raise SourceError unless training has every class of the test images, and old and new classes."""
    if strange := sorted(set(tested) - set(trained)):
        raise SourceError(f"{where} has a class in test that is not in train: {strange[0]}")
    if not 0 < num_old < len(trained):
        raise SourceError(f"--old {num_old} must leave old and new classes: {where} has {len(trained)}")


def old_first(classes: Sequence[str], told: str, where: Path) -> tuple[list[str], int]:
    """Class names with those that are told first, and how many these are.

    Args:
        told: a file with a name on each line, or the names themselves, separated by commas.

    Raises:
        SourceError: a name that is no class, one that is told twice, or all of them.
    """
    listed = text_lines(Path(told)) if _is_file(told) else told.split(",")
    names = [name.strip() for name in listed]
    old, known = set(names), set(classes)
    if strange := next((name for name in names if name not in known), None):
        raise SourceError(f"--old-classes names {strange!r}, and {where} has no class of that name")
    if len(old) < len(names) or not names:
        raise SourceError(f"--old-classes {told!r} names a class twice, or none")
    ordered = [name for name in classes if name in old]
    return [*ordered, *(name for name in classes if name not in old)], len(ordered)


def _is_file(told: str) -> bool:
    """Whether what was told is the path of a file; a long list of names is longer than any path may be."""
    try:
        return Path(told).is_file()
    except (OSError, ValueError):
        return False


def add_old(command: argparse.ArgumentParser, required: bool = True) -> None:
    """How old classes are chosen: by number, or by name."""
    old = command.add_mutually_exclusive_group(required=required)
    old.add_argument("--old", type=positive, help="how many classes, the first by name, are old")
    old.add_argument("--old-classes", metavar="NAMES", help="which are: a,b,c or a file with a name on each line")


def by_split(classes: list[str], old: Iterable[int], new: Iterable[int]) -> tuple[list[str], int]:
    """Class names in target order, old + new, and how many are old; old and new are indices into `classes`.

    Raises:
        SourceError: the split is not one of these classes.
    """
    old, new = list(old), list(new)
    if twice := next((name for i, name in enumerate(classes) if name in classes[:i]), None):
        raise SourceError(f"the dataset has two classes of the name {twice!r}")
    if sorted(old + new) != list(range(len(classes))):
        raise SourceError(f"the split has {len(old) + len(new)} classes, the dataset {len(classes)}")
    return [classes[i] for i in old + new], len(old)
