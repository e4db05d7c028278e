"""Stanford Cars."""

from pathlib import Path

from sptnet_shards.folder import Folder, need_folder
from sptnet_shards.items import Item
from sptnet_shards.protocol import class_split
from sptnet_shards.source import Source, SourceCommand, SourceError, by_split, number, takes_root
from sptnet_shards.sources.mat import Columns, MatError, read_columns

TEST_LABELS = "cars_test_annos_withlabels.mat"


def _columns(path: Path, variable: str, *fields: str) -> Columns:
    try:
        return read_columns(path, variable, fields)
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: give the folder with cars_train/, cars_test/ and devkit/") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    except MatError as error:
        raise SourceError(f"{path} is not the devkit's file ({error})") from None


def _test_annotations(root: Path) -> Path:
    for path in (root / TEST_LABELS, root / "devkit" / TEST_LABELS):
        if path.is_file():
            return path
    raise SourceError(
        f"{root / 'devkit' / TEST_LABELS} is missing: the test labels are no longer distributed by Stanford, a copy of "
        "the file from a mirror is needed (the devkit's cars_test_annos.mat has no classes)"
    )


def _items(files: Folder, folder: str, annotations: Path, names: list[str]) -> list[Item]:
    """The annotated images. Classes count from 1: a mirror that counts from 0 would get every label wrong."""
    columns = _columns(annotations, "annotations", "class", "fname")
    return [
        files.item(names[number(str(label), 1, len(names), str(annotations)) - 1], f"{folder}/{name}")
        for label, name in zip(columns["class"], columns["fname"], strict=True)
    ]


def _files(root: Path) -> Folder:
    return Folder(need_folder(root), listed=True)


def source(root: Path) -> Source:
    """The official split, old classes of the Semantic Shift Benchmark; in the order of the annotations."""
    names = [str(name) for name in _columns(root / "devkit" / "cars_meta.mat", "class_names")[""]]
    ordered, num_old = by_split(names, *class_split("scars"))
    files = _files(root)
    train = _items(files, "cars_train", root / "devkit" / "cars_train_annos.mat", names)
    test = _items(files, "cars_test", _test_annotations(root), names)
    return Source("scars", ordered, num_old, train, test, files)


COMMANDS = [
    SourceCommand(
        "scars",
        "Stanford Cars, 98 old classes",
        "Expects cars_train/, cars_test/ and devkit/ with cars_meta.mat and cars_train_annos.mat; and "
        f"{TEST_LABELS}, beside them or in devkit/. Published at ai.stanford.edu/~jkrause/cars/car_dataset.html, which "
        "no longer distributes them; mirrors do.",
        takes_root("the folder that holds cars_train/, cars_test/ and devkit/"),
        lambda arguments: source(arguments.root),
        lambda arguments: _files(arguments.root),
    )
]
