"""What a source dataset is to the rest of this folder."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.items import Item, Items
from sptnet_shards.whole_numbers import positive

from sptnet.data.format.files import local, read_regular
from sptnet.errors import SptnetError

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


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that the dataset must have, without empty ones."""
    try:
        return [line for line in read_regular(path, LARGEST_LIST).decode("utf-8-sig").splitlines() if line.strip()]
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
