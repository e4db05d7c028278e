"""CIFAR-10 and CIFAR-100 in torchvision's files (the "python version")."""

import argparse
import hashlib
import http.client
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sptnet_shards.items import Item
from sptnet_shards.published import FORCED
from sptnet_shards.source import Source, SourceCommand, SourceError
from sptnet_shards.sources import arrays

from sptnet.data.format.files import local, read_regular

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
TRAIN = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)], "cifar100": ["train"]}
TEST = {"cifar10": "test_batch", "cifar100": "test"}
NAMES = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
NUM_OLD = {"cifar10": 5, "cifar100": 80}

# md5 of the published files (torchvision checks the same ones)
PUBLISHED_MD5 = {
    "cifar10": {
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    "cifar100": {
        "meta": "7973b15100ade9c7d40fb424638fde48",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
}
LARGEST_BATCH = 2**28  # bytes; the largest published one has 155 million


class _Batch(NamedTuple):
    """One of CIFAR's files, unpickled: pixels uint8 [N, 3072] and labels, or class names."""

    content: dict[str, Any]
    path: Path

    def texts(self, key: str) -> list[str]:
        return [str(name) for name in self._list(key, str)]

    def labels(self, key: str, classes: int) -> list[int]:
        labels = self._list(key, int)
        if not all(0 <= label < classes for label in labels):
            raise SourceError(f"{self.path} has a label that is not one of its {classes} classes")
        return labels

    def pixels(self) -> NDArray[np.uint8]:
        found = self.content.get("data")
        if not isinstance(found, arrays.Bytes) or found.shape[1:] != (3072,):
            raise SourceError(f"{self.path} is not CIFAR's file (it has no images of 3,072 bytes)")
        return found.array()

    def _list(self, key: str, kind: type) -> list[Any]:
        found = self.content.get(key)
        if not isinstance(found, list) or not all(type(value) is kind for value in found):
            raise SourceError(f"{self.path} is not CIFAR's file (it has no {key})")
        return found


def _read_batch(path: Path, md5: str | None) -> _Batch:
    """Unpickle a file of the published digest; without one, whatever it is, and then it may hold u1 arrays only."""
    try:
        encoded = read_regular(path, LARGEST_BATCH)
    except FileNotFoundError:
        raise SourceError(
            f"{path} is missing: download https://www.cs.toronto.edu/~kriz/cifar.html or use --download"
        ) from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    if md5 is not None and hashlib.md5(encoded, usedforsecurity=False).hexdigest() != md5:
        raise SourceError(
            f"{path} is not CIFAR's file (its md5 is not the published one): download it, or give {FORCED}"
        )
    try:
        return _Batch(arrays.unpickled(encoded), path)
    except arrays.NotArraysError as error:
        raise SourceError(f"{path} is not CIFAR's file ({error})") from None


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


def source(name: str, root: Path, unofficial: bool = False) -> Source:
    """CIFAR-10 (classes 0 to 4 old) or CIFAR-100 (0 to 79 old).

    Args:
        name: cifar10 or cifar100.
        root: the folder that holds `cifar-10-batches-py` or `cifar-100-python`, as for torchvision.
        unofficial: take files that are not the published ones too.
    """
    folder = root / FOLDERS[name]
    digests = {} if unofficial else PUBLISHED_MD5[name]
    meta, key = NAMES[name]
    classes = _read_batch(folder / meta, digests.get(meta)).texts(key)
    if not NUM_OLD[name] < len(classes):
        raise SourceError(
            f"{folder / meta} names {len(classes)} classes, {name} needs more than its {NUM_OLD[name]} old"
        )
    parts: dict[str, NDArray[np.uint8]] = {}
    items: dict[str, list[Item]] = {}
    for part, files in (("train", TRAIN[name]), ("test", [TEST[name]])):
        batches = [_read_batch(folder / file, digests.get(file)) for file in files]
        labels = [label for batch in batches for label in batch.labels(LABELS[name], len(classes))]
        parts[part] = np.concatenate([batch.pixels() for batch in batches])
        if len(labels) != len(parts[part]):
            raise SourceError(f"{folder} has {len(parts[part])} {part} images and {len(labels)} labels")
        items[part] = [Item(classes[label], f"{part}:{i}", 3072) for i, label in enumerate(labels)]
    return Source(name, classes, NUM_OLD[name], items["train"], items["test"], _Pixels(parts), encodes=True)


def _download(name: str, root: Path) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    published = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        download_and_extract_archive(published.url, str(root), filename=published.filename, md5=published.tgz_md5)
    except (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{published.url} cannot be downloaded: {reason}") from None


def _command(name: str) -> SourceCommand:
    def add_arguments(command: argparse.ArgumentParser) -> None:
        command.add_argument("root", type=local, help=f"folder that holds {FOLDERS[name]}/")
        command.add_argument("--download", action="store_true", help="fetch it first, where there is a network")

    def build(arguments: argparse.Namespace) -> Source:
        if arguments.download and not (arguments.root / FOLDERS[name]).is_dir():
            _download(name, arguments.root)
        return source(name, arguments.root, arguments.unofficial)

    return SourceCommand(
        name,
        f"{FOLDERS[name]}/, {NUM_OLD[name]} old classes",
        f"Expects {FOLDERS[name]}/ with {', '.join(TRAIN[name])}, {TEST[name]} and {NAMES[name][0]}, the python "
        "version of https://www.cs.toronto.edu/~kriz/cifar.html. Images are stored as PNG, without loss.",
        add_arguments,
        build,
        lambda arguments: build(arguments).read,
    )


COMMANDS = [_command(name) for name in FOLDERS]
