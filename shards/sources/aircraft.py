"""FGVC-Aircraft (2013b), the 100 variants."""

from pathlib import Path

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import Item
from sptnet_shards.protocol import class_split
from sptnet_shards.source import Source, SourceCommand, SourceError, by_split, takes_root, text_lines


def _items(files: Folder, path: Path, names: set[str]) -> list[Item]:
    items = []
    for line in text_lines(path):
        image, _, name = line.partition(" ")
        if name.strip() not in names:
            raise SourceError(f"{path} has a line with a variant that variants.txt does not have: {line!r}")
        items.append(files.item(name.strip(), f"{image}.jpg"))
    return items


def _files(root: Path) -> Folder:
    return Folder(need_folder(root / "data" / "images"), listed=True)


def source(root: Path) -> Source:
    """Trainval and test, old classes of the Semantic Shift Benchmark; in the order of the lists.

    The class order is that of the sorted variant names, in which the benchmark counts.
    """
    data = root / "data"
    names = sorted(line.strip() for line in text_lines(data / "variants.txt"))
    ordered, num_old = by_split(names, *class_split("aircraft"))
    files = _files(root)
    train = _items(files, data / "images_variant_trainval.txt", set(names))
    test = _items(files, data / "images_variant_test.txt", set(names))
    return Source("aircraft", ordered, num_old, train, test, files)


COMMANDS = [
    SourceCommand(
        "aircraft",
        "fgvc-aircraft-2013b/, 50 old classes",
        "Expects fgvc-aircraft-2013b/ with data/variants.txt, data/images_variant_trainval.txt, "
        "data/images_variant_test.txt and data/images/, from "
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/.",
        takes_root("the folder fgvc-aircraft-2013b"),
        lambda arguments: source(arguments.root),
        lambda arguments: _files(arguments.root),
    )
]
