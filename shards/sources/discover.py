"""Images whose classes nobody knows: some folders are named, the rest is to be sorted."""

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import UNKNOWN, Item, Items
from sptnet_shards.source import Read, Source, SourceCommand, SourceError
from sptnet_shards.whole_numbers import positive

from sptnet.data.format.files import local

LABELLED, UNLABELLED, TEST = "labelled", "unlabelled", "test"  # before a path, where folders lie apart


def of_unknown(name: str, train: Items, test: Items, read: Read, num_new: int | None) -> Source:
    """A source whose training images are labelled, of old classes, or of a class that nobody knows.

    Classes that only test images have are new, and known there.

    Raises:
        SourceError: nothing is labelled, or nothing is unlabelled.
    """
    old = sorted(train.counts().keys() - {UNKNOWN})
    new = sorted(test.counts().keys() - set(old))
    labelled = train.of_classes(old)
    if not len(labelled):
        raise SourceError(f"{name} has no labelled image: sptnet needs some classes with names to learn from")
    if len(labelled) == len(train):
        raise SourceError(f"{name} has no unlabelled image: there is nothing to be sorted")
    if num_new is not None and num_new < len(new):
        raise SourceError(f"--new is {num_new}, and the test images alone have {len(new)} classes that are not old")
    remarks = []
    if num_new is None:
        remarks.append(
            "how many new classes there are is not known yet: give --new N here, model.num_new=N when training, or "
            "estimate it by `sptnet estimate-k`"
        )
    return Source(name, [*old, *new], len(old), train, test, read, remarks=remarks, labelled=labelled, num_new=num_new)


class _Apart:
    """Reads `labelled/...`, `unlabelled/...` and `test/...` below folders that may lie anywhere."""

    def __init__(self, folders: dict[str, Folder]):
        self.folders = folders

    def __call__(self, where: str) -> bytes:
        part, _, path = where.partition("/")
        return self.folders[part](path)


def _classes(part: str, files: Folder) -> Iterator[Item]:
    names = files.class_folders("")
    if not names:
        raise SourceError(f"{files.root} has no class folders: every folder in it is a class, named by the folder")
    for name in names:
        found = files.images(name, name)
        if not found:
            raise SourceError(f"{files.root / name} holds no image: remove it, or put some there{_others(files)}")
        yield from _in_part(part, found)


def _others(files: Folder) -> str:
    """The end of a sentence: what lies there instead of images."""
    return "".join(f" ({told}: convert those that are images too)" for told in files.other_suffixes())


def _in_part(part: str, items: Iterable[Item]) -> Iterator[Item]:
    return (item._replace(where=f"{part}/{item.where}") for item in items)


def source(
    labelled: Path, unlabelled: Path, num_new: int | None, test: Path | None, name: str | None, lenient: bool = False
) -> Source:  # fmt: skip
    """Class folders, all of them old and all their images labelled, and a tree of images of any depth.

    Args:
        lenient: see `Folder`.

    Raises:
        SourceError: a folder that is missing, empty, or inside of another one.
    """
    roots = {LABELLED: labelled, UNLABELLED: unlabelled} | ({} if test is None else {TEST: test})
    real = {part: os.path.realpath(need_folder(root)) for part, root in roots.items()}
    for part, path in real.items():
        for other, above in real.items():
            if part != other and (path == above or path.startswith(os.path.join(above, ""))):
                raise SourceError(f"{roots[part]} lies inside of {roots[other]}: its images would be there twice")
    folders = {part: Folder(root, lenient=lenient) for part, root in roots.items()}
    named = Items.of(_classes(LABELLED, folders[LABELLED]))
    rest = folders[UNLABELLED].images(UNKNOWN, "")
    if not rest:
        raise SourceError(f"{unlabelled} holds no image: there is nothing to be sorted{_others(folders[UNLABELLED])}")
    train = Items.of(chain(named, _in_part(UNLABELLED, rest)))
    tested = Items.of(() if test is None else _classes(TEST, folders[TEST]))
    found = of_unknown(name or labelled.resolve().name, train, tested, _Apart(folders), num_new)
    left_out = [told for part, files in folders.items() if part != UNLABELLED for told in files.loose_images("")]
    left_out += [told for files in folders.values() for told in files.other_suffixes()]
    return replace(found, remarks=[*left_out, *found.remarks])


def add_new(command: argparse.ArgumentParser) -> None:
    """How many new classes there are, where somebody knows it."""
    command.add_argument(
        "--new", type=positive, metavar="N", help="how many new classes there are; it may be said later, or estimated"
    )


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("labelled", type=local, help="class folders: all of them are old, all their images labelled")
    command.add_argument("unlabelled", type=local, help="the images to be sorted, in folders of any depth")
    command.add_argument("--test", type=local, help="class folders to measure on; new classes may be among them")
    command.add_argument("--name", help="name of the dataset (default: that of LABELLED)")
    add_new(command)


def _build(arguments: argparse.Namespace) -> Source:
    # first, for the output may be there already: among the images it would be one of their folders
    for folder in (arguments.labelled, arguments.unlabelled, arguments.test):
        if folder is not None and arguments.out.resolve().is_relative_to(need_folder(folder).resolve()):
            raise SourceError(f"{arguments.out} lies among the images of {folder}: choose a folder outside of it")
    lenient = arguments.on_error == "skip"
    return source(arguments.labelled, arguments.unlabelled, arguments.new, arguments.test, arguments.name, lenient)


def _read(arguments: argparse.Namespace) -> Read:
    roots = {LABELLED: arguments.labelled, UNLABELLED: arguments.unlabelled, TEST: arguments.test}
    return _Apart({part: Folder(need_folder(root)) for part, root in roots.items() if root is not None})


COMMANDS = [
    SourceCommand(
        "discover",
        "images to be sorted, and named examples of some classes",
        "Expects a folder with a folder of images for each class that is known, and a folder with all images that are "
        "to be sorted into these classes and new ones. Nobody needs to know what is in it.",
        _add_arguments,
        _build,
        _read,
    )
]
