"""Stanford Cars."""

from pathlib import Path
from typing import Any

from scipy.io import loadmat

from shards.protocol import class_split
from shards.source import Folder, Item, Source, SourceCommand, SourceError, by_split, takes_root

TEST_LABELS = "cars_test_annos_withlabels.mat"


def _struct(path: Path, key: str) -> Any:
    try:
        return loadmat(path, squeeze_me=True)[key]
    except FileNotFoundError:
        raise SourceError(f"{path} is missing: give the folder with cars_train/, cars_test/ and devkit/") from None
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise SourceError(f"{path} is not the devkit's file ({type(error).__name__}: {error})") from None


def _test_annotations(root: Path) -> Path:
    for path in (root / TEST_LABELS, root / "devkit" / TEST_LABELS):
        if path.is_file():
            return path
    raise SourceError(
        f"{root / 'devkit' / TEST_LABELS} is missing: the test labels are no longer distributed by Stanford, a copy of "
        "the file from a mirror is needed (the devkit's cars_test_annos.mat has no classes)"
    )


def _items(files: Folder, folder: str, annotations: Path, names: list[str]) -> list[Item]:
    rows = _struct(annotations, "annotations")
    return [
        files.item(names[int(number) - 1], f"{folder}/{name}")
        for number, name in zip(rows["class"].tolist(), rows["fname"].tolist(), strict=True)
    ]


def source(root: Path) -> Source:
    """The official split, old classes of the Semantic Shift Benchmark; in the order of the annotations."""
    names = [str(name) for name in _struct(root / "devkit" / "cars_meta.mat", "class_names").tolist()]
    ordered, num_old = by_split(names, *class_split("scars"))
    files = Folder(root)
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
    )
]
