"""Your own images: one folder per class, with or without `train/` and `test/` above them."""

import argparse
import os
from pathlib import Path

from sptnet_shards.folder import Folder, has_folder, need_folder
from sptnet_shards.items import Items
from sptnet_shards.source import Source, SourceCommand, SourceError, add_old, need_classes, old_first

from sptnet.data.format.files import IMAGE_SUFFIXES, TAKEN, local

# what parts of a dataset are called elsewhere; beside class folders, and as one, each is a mistake
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}


def _items(files: Folder, part: str, classes: list[str]) -> Items:
    return Items.of(item for name in classes for item in files.images(name, f"{part}/{name}" if part else name))


def _need_no_parts(root: Path, classes: list[str]) -> None:
    """Raise SourceError where what is to be a class is a part of a dataset, by its name."""
    if parts := [name for name in classes if name.casefold() in PARTS]:
        raise SourceError(
            f"{root} has {', '.join(parts)} where class folders belong: call the parts train and test, or rename the "
            "class"
        )


def _left_out(files: Folder, parts: list[str]) -> list[str]:
    """What lies beside the folders that are read, one sentence each."""
    told = [sentence for part in parts for sentence in files.loose_images(part)]
    if parts != [""]:
        root = files.root
        others = [f for f in sorted(root.iterdir()) if f.is_dir() and f.name not in parts and f.name[0] != "."]
        told += [
            f"{folder} is left out with its {images:,} images: only {' and '.join(parts)} are read "
            "(--test FOLDER names the folder of the test part)"
            for folder in others
            if (images := _count_images(folder))
        ]
    return [*told, *files.other_suffixes()]


def _count_images(folder: Path) -> int:
    """Images anywhere below a folder, by their suffixes."""
    names = (name for _, _, files in os.walk(folder) for name in files if not name.startswith("."))
    return sum(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in names)


def source(
    root: Path, num_old: int | None, name: str | None = None, test: str | None = None, old_names: str | None = None,
    lenient: bool = False,
) -> Source:  # fmt: skip
    """The first `num_old` classes, by folder name, are old, or those of `old_names` (see `old_first`).

    Args:
        test: the folder beside train/ that is the test part; by default test/, if there is one.
        lenient: see `Folder`.

    Raises:
        SourceError: no folders, no images, a test class that training lacks, or an impossible `num_old`.
    """
    files = Folder(need_folder(root), lenient=lenient)
    part = "train" if has_folder(root / "train") else ""
    classes = files.class_folders(part)
    if test is not None:
        _need_test(root, test)
    tests = [test or "test"] if part and has_folder(root / (test or "test")) else []
    tested = [name for folder in tests for name in files.class_folders(folder)]
    _need_no_parts(root / part, classes)
    if old_names is not None:
        classes, num_old = old_first(classes, old_names, root)
    assert num_old is not None  # one of the two is always said
    need_classes(root, classes, tested, num_old)
    train = _items(files, part, classes)
    if lacking := sorted(set(classes) - train.counts().keys()):
        raise SourceError(f"{root / part / lacking[0]} holds no image ({TAKEN})")
    test_items = Items.of(item for folder in tests for item in _items(files, folder, tested))
    remarks = _left_out(files, [part, *tests])
    name = root.resolve().name if name is None else name
    return Source(name, classes, num_old, train, test_items, files, remarks=remarks)


def _need_test(root: Path, test: str) -> None:
    if not (root / "train").is_dir() or test in ("", ".", "..", "train") or "/" in test or not (root / test).is_dir():
        raise SourceError(f"--test {test!a} must be a folder beside {root / 'train'}")


def _need_apart(root: Path, out: Path, test: str | None) -> None:
    """Raise SourceError for an output among the images: the same command, run again, would take it for a class."""
    parts = [root / "train", root / (test or "test")] if (root / "train").is_dir() else [root]
    if any(out.resolve().is_relative_to(part.resolve()) for part in parts):
        raise SourceError(f"{out} lies among the images of {root}: choose a folder outside of it")


def _build(arguments: argparse.Namespace) -> Source:
    # first, for the output may be there already: among the images it would be a class
    root = need_folder(arguments.root)
    if arguments.test is not None:
        _need_test(root, arguments.test)
    _need_apart(root, arguments.out, arguments.test)
    lenient = arguments.on_error == "skip"
    return source(arguments.root, arguments.old, arguments.name, arguments.test, arguments.old_classes, lenient)


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("root", type=local, help="folder of class folders, or of train/ and test/ with class folders")
    add_old(command)
    command.add_argument("--name", help="name of the dataset (default: that of the folder)")
    command.add_argument("--test", metavar="FOLDER", help="folder beside train/ that is the test part (default: test)")


COMMANDS = [
    SourceCommand(
        "imagefolder",
        "your own images, one folder per class",
        "Expects one folder per class, optionally below train/ and test/. Files that are no images by their suffix are "
        "left out, and counted.",
        _add_arguments,
        _build,
        lambda arguments: Folder(need_folder(arguments.root)),
    )
]
