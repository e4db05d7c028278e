"""Your own images: one folder per class, with or without `train/` and `test/` above them."""

import argparse
from pathlib import Path

from shards.source import IMAGE_SUFFIXES, Folder, Item, Source, SourceCommand, SourceError, need_classes, need_folder


def _items(files: Folder, part: str, classes: list[str]) -> list[Item]:
    return [item for name in classes for item in files.images(name, f"{part}/{name}" if part else name)]


def source(root: Path, num_old: int, name: str | None = None) -> Source:
    """The first `num_old` classes, by folder name, are old.

    Raises:
        SourceError: no folders, no images, a test class that training lacks, or an impossible `num_old`.
    """
    files = Folder(need_folder(root))
    part = "train" if (root / "train").is_dir() else ""
    classes = files.class_folders(part)
    tested = files.class_folders("test") if part and (root / "test").is_dir() else []
    need_classes(root, classes, tested, num_old)
    train = _items(files, part, classes)
    if lacking := sorted(set(classes) - {item.class_name for item in train}):
        raise SourceError(f"{root / part / lacking[0]} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Source(name or root.resolve().name, classes, num_old, train, _items(files, "test", tested), files)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("root", type=Path, help="folder of class folders, or of train/ and test/ with class folders")
    command.add_argument("--old", type=int, required=True, help="how many classes, the first by name, are old")
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")


COMMANDS = [
    SourceCommand(
        "imagefolder",
        "your own images, one folder per class",
        "Expects one folder per class, optionally below train/ and test/. Files that are no images by their suffix are "
        "left alone.",
        _add_arguments,
        lambda arguments: source(arguments.root, arguments.old, arguments.name),
    )
]
