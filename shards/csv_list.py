"""Your own images: a CSV file that lists them."""

import argparse
import csv
import io
from pathlib import Path, PurePosixPath

from sptnet_shards.discover import add_new, of_unknown
from sptnet_shards.source import (
    LARGEST_LIST,
    UNKNOWN,
    Folder,
    Item,
    Source,
    SourceCommand,
    SourceError,
    add_old,
    need_classes,
    old_first,
)

from sptnet.data.files import read_regular

COLUMNS = ("image", "class")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = read_regular(path, LARGEST_LIST).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if missing := [column for column in COLUMNS if column not in columns]:
        raise SourceError(f"{path} has no column {missing[0]!r}: it needs image, class and, if there is one, split")
    if len(set(columns)) < len(columns):
        raise SourceError(f"{path} has two columns of one name: {', '.join(columns)}")
    if not rows:
        raise SourceError(f"{path} lists no image")
    if (long := next((line for line, row in enumerate(rows, start=2) if None in row), None)) is not None:
        raise SourceError(f"{path}, line {long} has more columns than the first line: quote what has a comma in it")
    return rows


def source(
    path: Path, num_old: int | None, name: str | None = None, old_names: str | None = None, num_new: int | None = None
) -> Source:
    """Images in the file's order, by paths relative to it; the first `num_old` classes, by name, are old.

    Where the class of a training image is empty, nobody knows the unlabelled images' classes: all classes of training
    are old then, all their images labelled, and `num_old` and `old_names` have nothing to say.

    Raises:
        SourceError: a missing column, a path out of the file's folder, an unknown split, a missing image.
    """
    files = Folder(path.parent, listed=True)
    parts: dict[str, list[Item]] = {"train": [], "test": []}
    for line, row in enumerate(_rows(path), start=2):
        where, label, part = row["image"], row["class"], (row.get("split") or "train").strip()
        if not where or part not in parts or (not label and part == "test"):
            raise SourceError(f"{path}, line {line}: needs an image, a class, and a split that is train or test")
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise SourceError(f"{path}, line {line}: {where} is not a path below {path.parent}")
        parts[part].append(files.item(label, where))
    classes = sorted({item.class_name for item in parts["train"]} - {UNKNOWN})
    if any(item.class_name == UNKNOWN for item in parts["train"]):
        if num_old is not None or old_names is not None:
            raise SourceError(f"{path} has images without a class: all its classes are old, leave --old out")
        return of_unknown(name or path.stem, parts["train"], parts["test"], files, num_new)
    if num_new is not None:
        raise SourceError(f"{path} has a class for every image: --new is for images without one, give --old")
    if old_names is not None:
        classes, num_old = old_first(classes, old_names, path)
    if num_old is None:
        raise SourceError(f"{path} has a class for every image: say by --old, or --old-classes, which are old")
    need_classes(path, classes, (item.class_name for item in parts["test"]), num_old)
    return Source(path.stem if name is None else name, classes, num_old, parts["train"], parts["test"], files)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="the CSV file; image paths are relative to its folder")
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
    )
]
