"""CIFAR-10 and CIFAR-100 in torchvision's files (the "python version")."""

import argparse
import io
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.source import Item, Source, SourceCommand, SourceError

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
TRAIN = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)], "cifar100": ["train"]}
TEST = {"cifar10": "test_batch", "cifar100": "test"}
NAMES = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
NUM_OLD = {"cifar10": 5, "cifar100": 80}

# all that an array needs to be rebuilt; nothing else that a pickle names is looked up, so none of it can run
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in CIFAR")
        return super().find_class(module, name)


def _load(file: IO[bytes]) -> dict[str, Any]:
    loaded = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(loaded, dict):
        raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}")
    return loaded


def _read_batch(path: Path, key: str) -> Any:
    try:
        with open(path, "rb") as file:
            return _load(file)[key]
    except FileNotFoundError:
        raise SourceError(
            f"{path} is missing: download https://www.cs.toronto.edu/~kriz/cifar.html or use --download"
        ) from None
    except (OSError, pickle.UnpicklingError, KeyError, EOFError, ValueError, AttributeError, TypeError) as error:
        raise SourceError(f"{path} is not CIFAR's file ({type(error).__name__}: {error})") from None


class _Pixels:
    """Reads an image of "train:i" or "test:i" as PNG, which loses nothing."""

    def __init__(self, parts: dict[str, NDArray[np.uint8]]):
        self.parts = parts

    def __call__(self, where: str) -> bytes:
        part, _, number = where.partition(":")
        pixels = self.parts[part][int(number)].reshape(3, 32, 32).transpose(1, 2, 0)
        encoded = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(encoded, "PNG")
        return encoded.getvalue()


def source(name: str, root: Path) -> Source:
    """CIFAR-10 (classes 0 to 4 old) or CIFAR-100 (0 to 79 old).

    Args:
        name: cifar10 or cifar100.
        root: the folder that holds `cifar-10-batches-py` or `cifar-100-python`, as for torchvision.
    """
    folder = root / FOLDERS[name]
    classes = [str(c) for c in _read_batch(folder / NAMES[name][0], NAMES[name][1])]
    parts: dict[str, NDArray[np.uint8]] = {}
    items: dict[str, list[Item]] = {}
    for part, files in (("train", TRAIN[name]), ("test", [TEST[name]])):
        pixels = [np.asarray(_read_batch(folder / file, "data"), np.uint8).reshape(-1, 3072) for file in files]
        labels = [int(label) for file in files for label in _read_batch(folder / file, LABELS[name])]
        parts[part] = np.concatenate(pixels)
        if len(labels) != len(parts[part]) or not all(0 <= label < len(classes) for label in labels):
            raise SourceError(f"{folder} has {len(parts[part])} {part} images and labels that do not fit them")
        items[part] = [Item(classes[label], f"{part}:{i}", 3072) for i, label in enumerate(labels)]
    return Source(name, classes, NUM_OLD[name], items["train"], items["test"], _Pixels(parts))


def _download(name: str, root: Path) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    published = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        download_and_extract_archive(published.url, str(root), filename=published.filename, md5=published.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{published.url} cannot be downloaded: {error}") from None


def _command(name: str) -> SourceCommand:
    def add_arguments(command: argparse.ArgumentParser) -> None:
        command.add_argument("root", type=Path, help=f"folder that holds {FOLDERS[name]}/")
        command.add_argument("--download", action="store_true", help="fetch it first, where there is a network")

    def build(arguments: argparse.Namespace) -> Source:
        if arguments.download and not (arguments.root / FOLDERS[name]).is_dir():
            _download(name, arguments.root)
        return source(name, arguments.root)

    return SourceCommand(
        name,
        f"{FOLDERS[name]}/, {NUM_OLD[name]} old classes",
        f"Expects {FOLDERS[name]}/ with {', '.join(TRAIN[name])}, {TEST[name]} and {NAMES[name][0]}, the python "
        "version of https://www.cs.toronto.edu/~kriz/cifar.html. Images are stored as PNG, without loss.",
        add_arguments,
        build,
    )


COMMANDS = [_command(name) for name in FOLDERS]
