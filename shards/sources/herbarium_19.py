"""Herbarium 19 (FGVC6), its small images."""

from pathlib import Path

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import Items
from sptnet_shards.protocol import class_split
from sptnet_shards.source import Source, SourceCommand, SourceError, by_split, takes_root


def source(root: Path) -> Source:
    """small-train and, as the test part, small-validation.

    Class folders are numbers but sorted as strings, as ImageFolder sorts them: the class split counts in that order.
    """
    files = Folder(root)
    classes = files.class_folders("small-train")
    ordered, num_old = by_split(classes, *class_split("herbarium_19"))
    tested = files.class_folders("small-validation")
    if strange := sorted(set(tested) - set(classes)):
        raise SourceError(f"{root} has a class in small-validation that is not in small-train: {strange[0]}")
    train, test = (
        Items.of(item for name in names for item in files.images(name, f"{part}/{name}"))
        for part, names in (("small-train", classes), ("small-validation", tested))
    )
    return Source("herbarium_19", ordered, num_old, train, test, files)


COMMANDS = [
    SourceCommand(
        "herbarium_19",
        "small-train/ and small-validation/, 341 old classes",
        "Expects small-train/ and small-validation/ with one folder per class, from the challenge's page, "
        "https://www.kaggle.com/c/herbarium-2019-fgvc6 and https://github.com/visipedia/herbarium_comp.",
        takes_root("the folder that holds small-train/ and small-validation/"),
        lambda arguments: source(arguments.root),
        lambda arguments: Folder(need_folder(arguments.root)),
    )
]
