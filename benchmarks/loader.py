"""Images/s on one core, two training views each: ours, torchvision ImageFolder, webdataset, decoding alone.

Every way takes the same images in turn, round by round, in this one process without loader workers; images are decoded,
resized to 256, cropped to 224 twice, flipped and batched. The others' transforms end in normalised float tensors, as is
usual; ours are uint8 and normalised on the device, in time that is told beside.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from photographs import photographs
from PIL import Image
from rich.console import Console
from rich.table import Table
from sptnet_shards.make_shards import main as make_shards
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sptnet.data.augment import normalise
from sptnet.data.image import decode
from sptnet.data.loader import train_batches
from sptnet.data.order import BatchOrder
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import LocalStore
from sptnet.method.families import IMAGENET

BATCH, SIZE = 64, 224
Way = Iterator[int]  # loads batch after batch, yields the images in each


class TwoViews:
    """The field's training transform, twice, as its implementations do."""

    def __init__(self) -> None:
        self.transform = transforms.Compose(
            [
                transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [self.transform(image), self.transform(image)]


def order_of(store: LocalStore) -> BatchOrder:
    labelled, unlabelled = (
        [shard.samples for shard in store.manifest.of_kind(kind)] for kind in ("labelled", "unlabelled")
    )
    return BatchOrder(labelled, unlabelled, BATCH, 4, 4, seed=0)


def ours(root: Path) -> Way:
    store = LocalStore(root)
    batches = train_batches(
        store, order_of(store), augment="crop_flip", image_size=SIZE, seed=0, steps=range(10**6)
    )  # fmt: skip
    for batch in batches:
        yield batch.views.shape[1]


def image_folder(root: Path) -> Way:
    dataset = ImageFolder(str(root), TwoViews())
    while True:
        for views, _ in DataLoader(dataset, BATCH, shuffle=True):
            yield len(views[0])


def web_dataset(root: Path) -> Way:
    urls = [str(path) for path in sorted(root.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pil")
    two_views = TwoViews()

    def pair(sample: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
        image = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
        return two_views(image), sample["cls"]

    pairs = dataset.map(pair)
    while True:
        for views, _ in pairs.batched(BATCH, collation_fn=_collate):
            yield len(views[0])


def _collate(samples: list[tuple[list[torch.Tensor], int]]) -> tuple[list[torch.Tensor], list[int]]:
    views, targets = zip(*samples, strict=True)
    return [torch.stack(view) for view in zip(*views, strict=True)], list(targets)


def decoding(root: Path, decoder: Callable[[bytes], object]) -> Way:
    """The images of `ours` in the same order, decoded and dropped."""
    store = LocalStore(root)
    order = order_of(store)
    manifest = store.manifest
    labelled, unlabelled = manifest.of_kind("labelled"), manifest.of_kind("unlabelled")
    readers = {True: ShardReader(store, labelled), False: ShardReader(store, unlabelled)}
    for step in range(10**6):
        for slot in order.batch(step):
            decoder(readers[slot.labelled].read(*slot.place).image)
        yield BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="an ImageFolder (default: generated 500 x 375 JPEGs)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-round", type=int, default=256, help="images of every way in a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        images = photographs(arguments.images, Path(scratch, "images"))
        keep, resized = Path(scratch, "keep"), Path(scratch, "resized")
        source = ["imagefolder", str(images), "--old", "2"]
        make_shards([*source, str(keep)])
        make_shards([*source, str(resized), "--resize", "256"])
        ways = {
            "ours, --keep": ours(keep),
            "ours, --resize 256": ours(resized),
            "torchvision ImageFolder": image_folder(images),
            "webdataset pipeline, --keep": web_dataset(keep),
            "webdataset pipeline, --resize 256": web_dataset(resized),
            "decoding alone (ours), --keep": decoding(keep, decode),
            "decoding alone (ours), --resize 256": decoding(resized, decode),
            "decoding alone (Pillow), --keep": decoding(keep, lambda e: Image.open(io.BytesIO(e)).convert("RGB")),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):
            for name, way in ways.items():
                start, loaded = time.process_time(), 0
                while loaded < arguments.per_round:
                    loaded += next(way)
                if turn:  # the first round warms up
                    speeds[name].append(loaded / (time.process_time() - start))
    batch = torch.zeros(2, BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    start = time.process_time()
    normalise(batch, IMAGENET)
    per_image = (time.process_time() - start) / BATCH * 1e3
    medians = {name: sorted(values)[len(values) // 2] for name, values in speeds.items()}
    table = Table(title=f"two views of each image, one core, medians of {arguments.rounds} rounds")
    for column in ("way", "images/s", "of ImageFolder"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, speed in medians.items():
        table.add_row(name, f"{speed:.0f}", f"{speed / medians['torchvision ImageFolder']:.2f}")
    Console().print(table, f"normalising both views on this CPU: {per_image:.2f} ms per image", sep="\n")


if __name__ == "__main__":
    main()
