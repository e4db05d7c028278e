"""Caltech-UCSD Birds 200-2011."""

from pathlib import Path

from shards.protocol import class_split
from shards.source import Folder, Source, SourceCommand, SourceError, by_split, takes_root, text_lines


def _table(path: Path) -> dict[str, str]:
    rows = [line.split(maxsplit=1) for line in text_lines(path)]
    if bad := next((row for row in rows if len(row) != 2), None):
        raise SourceError(f"{path} has a line that is not two columns: {' '.join(bad)!r}")
    return {key: value.strip() for key, value in rows}


def source(root: Path) -> Source:
    """The official split, old classes of the Semantic Shift Benchmark; in the order of images.txt."""
    paths = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    in_train = _table(root / "train_test_split.txt")
    if not paths.keys() == labels.keys() == in_train.keys():
        raise SourceError(f"{root}: images.txt, image_class_labels.txt and train_test_split.txt name other images")
    names = {int(labels[image]): Path(path).parts[0] for image, path in paths.items()}
    classes = [names[number] for number in sorted(names)]
    ordered, num_old = by_split(classes, *class_split("cub"))
    files = Folder(root / "images")
    items = {True: [], False: []}  # type: ignore[var-annotated]
    for image, path in paths.items():
        items[in_train[image] == "1"].append(files.item(names[int(labels[image])], path))
    return Source("cub", ordered, num_old, items[True], items[False], files)


COMMANDS = [
    SourceCommand(
        "cub",
        "CUB_200_2011/, 100 old classes",
        "Expects CUB_200_2011/ with images/, images.txt, image_class_labels.txt and train_test_split.txt, from "
        "https://www.vision.caltech.edu/datasets/cub_200_2011/.",
        takes_root("the folder CUB_200_2011"),
        lambda arguments: source(arguments.root),
    )
]
