"""What a source dataset is to the rest of this folder."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class SourceError(ValueError):
    """A source that cannot be converted; the message names the file and what to do."""


class Item(NamedTuple):
    """One image. `where` is whatever the source's `read` understands; bytes: its size."""

    class_name: str
    where: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """A dataset in its own order.

    Attributes:
        train, test: the images of the two official parts, in the source's own order; `test` may be empty.
        classes: in target order, old ones first.
        read: gives the encoded image of an item's `where`; raises SourceError.
        protocol: what the source adds to the manifest's protocol.
    """

    name: str
    classes: list[str]
    num_old: int
    train: list[Item]
    test: list[Item]
    read: Callable[[str], bytes]
    protocol: dict[str, Any] = field(default_factory=dict)


class SourceCommand(NamedTuple):
    """One subcommand of make_shards.py.

    Attributes:
        help: one line; `description`: which files it expects and where they are published.
        add_arguments: adds what the source needs beyond the output folder.
        build: the source that parsed arguments ask for; raises SourceError.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    build: Callable[[argparse.Namespace], Source]


def takes_root(text: str) -> Callable[[argparse.ArgumentParser], None]:
    """The arguments of a source that is one folder."""

    def add_arguments(command: argparse.ArgumentParser) -> None:
        command.add_argument("root", type=Path, help=text)

    return add_arguments


class Folder:
    """Files below a folder, read by their relative path. Callable, so that it serves as `Source.read`."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, where: str) -> bytes:
        try:
            return (self.root / where).read_bytes()
        except OSError as error:
            raise SourceError(f"{self.root / where} cannot be read: {error.strerror}") from None

    def item(self, class_name: str, where: str) -> Item:
        """An item of a file that must be there."""
        try:
            return Item(class_name, where, (self.root / where).stat().st_size)
        except OSError as error:
            raise SourceError(f"{self.root / where} cannot be read: {error.strerror}") from None

    def images(self, class_name: str, folder: str) -> list[Item]:
        """The images anywhere below a folder, by path; other files are left alone."""
        found = []
        for directory, folders, files in os.walk(self.root / folder):
            folders.sort()
            for name in files:
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    found.append(os.path.relpath(os.path.join(directory, name), self.root))
        return [self.item(class_name, where) for where in sorted(found)]

    def class_folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted as strings, as torchvision's ImageFolder numbers classes."""
        path = need_folder(self.root / folder)
        return sorted(f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def need_folder(path: Path) -> Path:
    """The path, if it is a folder; SourceError if not."""
    if not path.is_dir():
        raise SourceError(f"{path} is missing or not a folder: give the dataset's folder as it was unpacked")
    return path


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that the dataset must have, without empty ones."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: give the dataset's folder as it was unpacked") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def need_classes(where: Path, trained: Sequence[str], tested: Iterable[str], num_old: int) -> None:
    """Raise SourceError unless training has every class of the test images, and old and new classes."""
    if strange := sorted(set(tested) - set(trained)):
        raise SourceError(f"{where} has a class in test that is not in train: {strange[0]}")
    if not 0 < num_old < len(trained):
        raise SourceError(f"--old {num_old} must leave old and new classes: {where} has {len(trained)}")


def by_split(classes: list[str], old: Iterable[int], new: Iterable[int]) -> tuple[list[str], int]:
    """Class names in target order, old + new, and how many are old; old and new are indices into `classes`.

    Raises:
        SourceError: the split is not one of these classes.
    """
    old, new = list(old), list(new)
    if sorted(old + new) != list(range(len(classes))):
        raise SourceError(f"the split has {len(old) + len(new)} classes, the dataset {len(classes)}")
    return [classes[i] for i in old + new], len(old)
