"""Your own images: one folder per class, with or without `train/` and `test/` above them."""

import argparse
import os
from pathlib import Path

from sptnet_shards.source import (
    IMAGE_SUFFIXES,
    Folder,
    Item,
    Source,
    SourceCommand,
    SourceError,
    add_old,
    need_classes,
    need_folder,
    old_first,
)

# what parts of a dataset are called elsewhere; beside class folders, and as one, each is a mistake
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}


def _items(files: Folder, part: str, classes: list[str]) -> list[Item]:
    return [item for name in classes for item in files.images(name, f"{part}/{name}" if part else name)]


def _need_no_parts(root: Path, classes: list[str]) -> None:
    """Raise SourceError where what is to be a class is a part of a dataset, by its name."""
    if parts := [name for name in classes if name.casefold() in PARTS]:
        raise SourceError(
            f"{root} has {', '.join(parts)} where class folders belong: call the parts train and test, or rename the "
            "class"
        )


def _left_out(root: Path, parts: list[str], tested: bool) -> list[str]:
    """What lies beside the folders that are read, one sentence each."""
    told = []
    for part in parts:
        if loose := [f for f in sorted(os.listdir(root / part)) if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]:
            told.append(
                f"{root / part} has {len(loose)} images outside of class folders, left out: the first is {loose[0]}"
            )
    if parts != [""]:
        read = {"train", "test"} if tested else {"train"}
        others = [f.name for f in sorted(root.iterdir()) if f.is_dir() and f.name not in read and f.name[0] != "."]
        told += [f"{root / name} is left out: only train and test are read" for name in others]
    return told


def source(root: Path, num_old: int | None, name: str | None = None, old_names: str | None = None) -> Source:
    """The first `num_old` classes, by folder name, are old, or those of `old_names` (see `old_first`).

    Raises:
        SourceError: no folders, no images, a test class that training lacks, or an impossible `num_old`.
    """
    files = Folder(need_folder(root))
    part = "train" if (root / "train").is_dir() else ""
    classes = files.class_folders(part)
    has_test = bool(part) and (root / "test").is_dir()
    tested = files.class_folders("test") if has_test else []
    _need_no_parts(root / part, classes)
    if old_names is not None:
        classes, num_old = old_first(classes, old_names, root)
    assert num_old is not None  # one of the two is always said
    need_classes(root, classes, tested, num_old)
    train = _items(files, part, classes)
    if lacking := sorted(set(classes) - {item.class_name for item in train}):
        raise SourceError(f"{root / part / lacking[0]} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    remarks = _left_out(root, [part, "test"] if has_test else [part], has_test)
    test = _items(files, "test", tested)
    return Source(name or root.resolve().name, classes, num_old, train, test, files, remarks=remarks)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("root", type=Path, help="folder of class folders, or of train/ and test/ with class folders")
    add_old(command)
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")


COMMANDS = [
    SourceCommand(
        "imagefolder",
        "your own images, one folder per class",
        "Expects one folder per class, optionally below train/ and test/. Files that are no images by their suffix are "
        "left alone.",
        _add_arguments,
        lambda arguments: source(arguments.root, arguments.old, arguments.name, arguments.old_classes),
    )
]
