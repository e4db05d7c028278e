"""Your own images: a CSV file that lists them."""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import UNKNOWN, Columns
from sptnet_shards.source import LARGEST_LIST, Source, SourceCommand, SourceError, add_old, need_classes, old_first
from sptnet_shards.sources.discover import add_new, of_unknown

from sptnet.data.format.files import local, read_regular

COLUMNS = ("image", "class")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line by line, with their numbers: a list of ten million images is not to become as many dictionaries."""
    line = 1
    try:
        encoded = read_regular(path, LARGEST_LIST)
        reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(encoded), "utf-8-sig", newline=""), strict=True)
        _need_columns(path, list(reader.fieldnames or ()))
        for row in reader:
            line = reader.line_num
            if None in row:
                raise SourceError(
                    f"{path}, line {line} has more columns than the first line: quote what has a comma in it"
                )
            if None in row.values():
                raise SourceError(
                    f"{path}, line {line} has fewer columns than the first line: an empty one needs its comma"
                )
            yield line, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if line == 1:
        raise SourceError(f"{path} lists no image")


def _need_columns(path: Path, columns: list[str]) -> None:
    if missing := [column for column in COLUMNS if column not in columns]:
        raise SourceError(f"{path} has no column {missing[0]!r}: it needs image, class and, if there is one, split")
    if len(set(columns)) < len(columns):
        raise SourceError(f"{path} has two columns of one name: {', '.join(columns)}")


def _files(path: Path) -> Folder:
    return Folder(need_folder(path.parent), listed=True)


def source(
    path: Path, num_old: int | None, name: str | None = None, old_names: str | None = None, num_new: int | None = None
) -> Source:
    """Images in the file's order, by paths relative to it; the first `num_old` classes, by name, are old.

    Where the class of a training image is empty, nobody knows the unlabelled images' classes: all classes of training
    are old then, all their images labelled, and `num_old` and `old_names` have nothing to say.

    Raises:
        SourceError: a missing column, a path out of the file's folder, an unknown split, a missing image.
    """
    files = _files(path)
    parts = {"train": Columns(), "test": Columns()}
    for line, row in _rows(path):
        where, label, part = row["image"], row["class"], (row.get("split") or "train").strip()
        if not where or part not in parts or (not label and part == "test"):
            raise SourceError(f"{path}, line {line}: needs an image, a class, and a split that is train or test")
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise SourceError(f"{path}, line {line}: {where} is not a path below {path.parent}")
        parts[part].add(files.item(label, where))
    train, test = (parts[part].items() for part in ("train", "test"))
    classes = sorted(train.counts().keys() - {UNKNOWN})
    if UNKNOWN in train.counts():
        if num_old is not None or old_names is not None:
            raise SourceError(f"{path} has images without a class: all its classes are old, leave --old out")
        return of_unknown(name or path.stem, train, test, files, num_new)
    if num_new is not None:
        raise SourceError(f"{path} has a class for every image: --new is for images without one, give --old")
    if old_names is not None:
        classes, num_old = old_first(classes, old_names, path)
    if num_old is None:
        raise SourceError(f"{path} has a class for every image: say by --old, or --old-classes, which are old")
    need_classes(path, classes, test.counts(), num_old)
    return Source(path.stem if name is None else name, classes, num_old, train, test, files)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=local, help="the CSV file; image paths are relative to its folder")
    add_old(command, required=False)
    add_new(command)
    command.add_argument("--name", help="name of the dataset (default: that of the file)")


COMMANDS = [
    SourceCommand(
        "csv",
        "your own images, listed in a CSV file",
        "Expects a CSV file with a header and the columns image, class and, optionally, split (train or test; train "
        "where it is empty). An image without a class is unlabelled, and its class unknown.",
        _add_arguments,
        lambda arguments: source(arguments.file, arguments.old, arguments.name, arguments.old_classes, arguments.new),
        lambda arguments: _files(arguments.file),
    )
]
