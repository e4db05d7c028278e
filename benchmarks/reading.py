"""Encoded samples/s out of tars on one core: ours (index and pread, in training order), webdataset's iterator, tarfile.

Every way reads the same shards in turn, round by round, in this one process; nothing is decoded.
"""

import argparse
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset
from photographs import photographs
from rich.console import Console
from rich.table import Table
from sptnet_shards.make_shards import main as make_shards

from sptnet.data.order import StreamOrder
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import LocalStore


def ours(root: Path) -> Callable[[], int]:
    store = LocalStore(root)
    shards = store.manifest.of_kind("unlabelled")
    reader, order = ShardReader(store, shards), StreamOrder([s.samples for s in shards], 1, 4, seed=0, split=1)

    def read() -> int:
        for position in range(order.total):
            assert reader.read(*order.at(0, position)).image
        return order.total

    return read


def web_dataset(root: Path) -> Callable[[], int]:
    urls = [str(path) for path in sorted(root.glob("train-unlabelled-*.tar"))]
    return lambda: sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))


def tar_file(root: Path) -> Callable[[], int]:
    def read() -> int:
        images = 0
        for path in sorted(root.glob("train-unlabelled-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    content.read()
                    images += not member.name.endswith(".cls")
        return images

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="an ImageFolder (default: generated 500 x 375 JPEGs)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images, root = photographs(arguments.images, Path(scratch, "images")), Path(scratch, "shards")
        make_shards(["imagefolder", str(images), str(root), "--old", "2"])
        ways = {"ours, shuffled": ours(root), "webdataset, in order": web_dataset(root), "tarfile": tar_file(root)}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):
            for name, way in ways.items():
                start = time.process_time()
                samples = way()
                if turn:  # the first round warms up
                    speeds[name].append(samples / (time.process_time() - start))
    table = Table(title=f"samples/s, one core, medians of {arguments.rounds} rounds")
    table.add_column("way")
    table.add_column("samples/s", justify="right")
    for name, values in speeds.items():
        table.add_row(name, f"{sorted(values)[len(values) // 2]:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
