"""Caltech-UCSD Birds 200-2011."""

from pathlib import Path

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import Item
from sptnet_shards.protocol import class_split
from sptnet_shards.source import Source, SourceCommand, SourceError, by_split, number, takes_root, text_lines


def _table(path: Path) -> dict[str, str]:
    rows = [line.split(maxsplit=1) for line in text_lines(path)]
    if bad := next((row for row in rows if len(row) != 2), None):
        raise SourceError(f"{path} has a line that is not two columns: {' '.join(bad)!r}")
    if len({key for key, _ in rows}) < len(rows):
        raise SourceError(f"{path} has two lines for one image")
    return {key: value.strip() for key, value in rows}


def _class_names(root: Path, paths: dict[str, str], labels: dict[str, int]) -> list[str]:
    """The folder names of classes 1, 2, ...: every class has one, and every folder is of one class."""
    names: dict[int, str] = {}
    for image, path in paths.items():
        folder = path.partition("/")[0]
        if names.setdefault(labels[image], folder) != folder:
            raise SourceError(f"{root}: class {labels[image]} has the folders {names[labels[image]]} and {folder}")
    return [names[number] for number in sorted(names)]


def _files(root: Path) -> Folder:
    return Folder(need_folder(root / "images"), listed=True)


def source(root: Path) -> Source:
    """The official split, old classes of the Semantic Shift Benchmark; in the order of images.txt."""
    paths = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    in_train = _table(root / "train_test_split.txt")
    if not paths.keys() == labels.keys() == in_train.keys():
        raise SourceError(f"{root}: images.txt, image_class_labels.txt and train_test_split.txt name other images")
    old, new = class_split("cub")
    numbers = {
        image: number(label, 1, len(old + new), str(root / "image_class_labels.txt")) for image, label in labels.items()
    }
    ordered, num_old = by_split(_class_names(root, paths, numbers), old, new)
    files = _files(root)
    items: dict[int, list[Item]] = {1: [], 0: []}
    for image, path in paths.items():
        part = number(in_train[image], 0, 1, str(root / "train_test_split.txt"))
        items[part].append(files.item(path.partition("/")[0], path))
    return Source("cub", ordered, num_old, items[1], items[0], files)


COMMANDS = [
    SourceCommand(
        "cub",
        "CUB_200_2011/, 100 old classes",
        "Expects CUB_200_2011/ with images/, images.txt, image_class_labels.txt and train_test_split.txt, from "
        "https://www.vision.caltech.edu/datasets/cub_200_2011/.",
        takes_root("the folder CUB_200_2011"),
        lambda arguments: source(arguments.root),
        lambda arguments: _files(arguments.root),
    )
]
