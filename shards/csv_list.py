"""Your own images: a CSV file that lists them."""

import argparse
import csv
from pathlib import Path, PurePosixPath

from shards.source import Folder, Item, Source, SourceCommand, SourceError, need_classes

COLUMNS = ("image", "class")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise SourceError(f"{path} has no column {missing[0]!r}: it needs image, class and, if there is one, split")
    return rows


def source(path: Path, num_old: int, name: str | None = None) -> Source:
    """Images in the file's order, by paths relative to it; the first `num_old` classes, by name, are old.

    Raises:
        SourceError: a missing column, a path out of the file's folder, an unknown split, a missing image.
    """
    files = Folder(path.parent)
    parts: dict[str, list[Item]] = {"train": [], "test": []}
    for line, row in enumerate(_rows(path), start=2):
        where, label, part = row["image"], row["class"], (row.get("split") or "train").strip()
        if not where or not label or part not in parts:
            raise SourceError(f"{path}, line {line}: needs an image, a class, and a split that is train or test")
        if PurePosixPath(where).is_absolute() or ".." in PurePosixPath(where).parts:
            raise SourceError(f"{path}, line {line}: {where} is not a path below {path.parent}")
        parts[part].append(files.item(label, where))
    classes = sorted({item.class_name for item in parts["train"]})
    need_classes(path, classes, (item.class_name for item in parts["test"]), num_old)
    return Source(name or path.stem, classes, num_old, parts["train"], parts["test"], files)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="the CSV file; image paths are relative to its folder")
    command.add_argument("--old", type=int, required=True, help="how many classes, the first by name, are old")
    command.add_argument("--name", help="name of the dataset (default: that of the file)")


COMMANDS = [
    SourceCommand(
        "csv",
        "your own images, listed in a CSV file",
        "Expects a CSV file with a header and the columns image, class and, optionally, split (train or test; train "
        "where it is empty).",
        _add_arguments,
        lambda arguments: source(arguments.file, arguments.old, arguments.name),
    )
]
