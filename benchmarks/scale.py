"""What a rank pays in a world of R ranks, one rank's share computed alone; prints a table.

The objective: time, and the most memory that is alive at once, of rank 0's share of a global batch, with torch's fake
process group in the place of the other ranks: its collectives move nothing, so their time is not in it and their bytes
are counted from the shapes. `before` is the whole batch's objective on every rank, as it was computed until then.

Checkpoints: files of a sharded strategy, and how often they are opened when a run continues. Evaluation: what a rank
does beside its forward passes with its share of the samples, and what rank 0 did with all. Start-up: a manifest.
"""

import argparse
import hashlib
import io
import multiprocessing
import resource
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sptnet.data.format.manifest import Manifest, Shard, Shards, load_manifest, write_manifest
from sptnet.data.format.shard_index import INDEX_DTYPE
from sptnet.data.storage.store import LocalStore
from sptnet.exact_counts import count_once, expected_uids
from sptnet.method.losses import GCDLoss
from sptnet.objective import share_of
from sptnet.run.predictions import PredictionParts
from sptnet.run.saving import writers_of

WORLDS = (1, 8, 64, 512)


class Alive(TorchDispatchMode):
    """The most bytes of tensors made in this context that were alive at once, and the bytes that collectives are given.

    Attributes:
        most, sent: bytes; collectives: how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now, self.most, self.sent, self.collectives = 0, 0, 0, 0
        self._seen = WeakIdKeyDictionary()

    def _freed(self, size: int) -> None:
        self._now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if "c10d" in str(function):
            self.collectives += 1
            self.sent += max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen[storage] = size = storage.nbytes()
                weakref.finalize(storage, self._freed, size)
                self._now += size
                self.most = max(self.most, self._now)
        return result


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def outputs(images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    projections, logits = (torch.randn(2 * images, n, generator=draws) for n in (width, classes))
    return projections, logits / 10, torch.randint(0, classes // 2, (images,), generator=draws)


def share(batch: int, ranks: int, width: int, classes: int) -> tuple[float, Alive]:
    """Seconds and memory of rank 0's share."""
    loss, given = GCDLoss(), outputs(batch // ranks, width, classes)
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)

    def work() -> None:
        share_of(loss, *given, None, 0.05)

    with Alive() as alive:
        work()
    took = min(seconds(work) for _ in range(2))
    if ranks > 1:
        dist.destroy_process_group()
    return took, alive


def whole(batch: int, width: int, classes: int) -> tuple[float, Alive]:
    """The same, as every rank computed it: with all rows, whatever the number of ranks."""
    loss, (projections, logits, targets) = GCDLoss(), outputs(batch, width, classes)
    labelled = torch.arange(batch) % 2 == 0

    def work() -> None:
        leaves = projections.detach().requires_grad_(), logits.detach().requires_grad_()
        torch.autograd.grad(loss(*leaves, targets, labelled, 0.05).total, leaves)

    with Alive() as alive:
        work()
    return min(seconds(work) for _ in range(2)), alive


def objective(batches: list[int], width: int, classes: int, console: Console) -> None:
    table = Table(title=f"objective of one rank, {width} wide, {classes} classes, {torch.get_num_threads()} thread(s)")
    for column in ("batch", "ranks", "s", "MB", "collectives", "MB of one, mean", "before: s", "MB"):
        table.add_column(column, justify="right")
    for batch in batches:
        took, alive = whole(batch, width, classes)
        before = f"{took:.3f}", f"{alive.most / 1e6:,.0f}"
        for ranks in WORLDS:
            if batch // ranks < 2:
                continue
            took, alive = share(batch, ranks, width, classes)
            mean = alive.sent / max(alive.collectives, 1) / 1e6
            table.add_row(f"{batch:,}", str(ranks), f"{took:.3f}", f"{alive.most / 1e6:,.1f}", str(alive.collectives),
                          f"{mean:,.2f}", *before)  # fmt: skip
    console.print(table)


def checkpoints(console: Console) -> None:
    table = Table(title="checkpoint of a sharded strategy")
    for column in ("ranks", "files", "opens on continuing", "before: files", "opens"):
        table.add_column(column, justify="right")
    for ranks in WORLDS:
        files = len(writers_of(True, ranks))
        table.add_row(*(f"{n:,}" for n in (ranks, files, files, ranks, ranks * ranks)))
    console.print(table)


def alone(work: Callable[..., None], *given: object) -> tuple[float, float]:
    """Seconds of CPU and the MB that a process of its own takes more than before it began."""
    pipe = multiprocessing.get_context("fork").SimpleQueue()

    def measured() -> None:
        # what the parent has touched counts for a fork too: from its own mark on
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        work(*given)
        took = time.process_time() - begin
        pipe.put((took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6))

    process = multiprocessing.get_context("fork").Process(target=measured)
    process.start()
    told: tuple[float, float] = pipe.get()
    process.join()
    return told


def split_of(root: Path, samples: int) -> None:
    """A test split of so many samples: indexes of 10,000 without their tars, uids in a random order."""
    uids = np.random.default_rng(0).permutation(samples)
    shards = []
    for number, mine in enumerate(np.array_split(uids, max(1, samples // 10_000))):
        index = np.zeros(len(mine), INDEX_DTYPE)
        index["uid"], index["target"], index["offset"], index["size"] = mine, mine % 1000, 512, 9
        content = io.BytesIO()
        np.save(content, index)
        (root / f"{number}.npy").write_bytes(content.getvalue())
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        shards.append(Shard(f"{number}.tar", f"{number}.npy", "test", len(mine), len(mine) * 2048, "0" * 64, digest))
    write_manifest(root, Manifest("made", [f"c{i}" for i in range(1000)], 500, {}, Shards.of(shards)))


def counted_share(root: Path) -> None:
    """What a rank does beside its forward passes, sending left out: one that has all of these samples."""
    store = LocalStore(root, look=False)
    parts = PredictionParts()

    def predicted() -> Iterator[np.ndarray]:
        for uids in expected_uids(store, "test"):
            yield np.stack([uids, uids % 1000, uids % 997, uids % 10**6], axis=1)

    count_once(
        store, "test", predicted(), 1000, torch.device("cpu"), lambda part, found: parts.add("test", part, found)
    )


def gathered_whole(samples: int) -> None:
    """What rank 0 did with everybody's rows until then: sort, compare, count."""
    uids = np.random.default_rng(0).permutation(samples)
    rows, expected = np.stack([uids, uids % 1000, uids % 997, uids % 10**6], axis=1), np.arange(samples)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    assert np.array_equal(rows[:, 0], expected)
    np.bincount(rows[:, 2] * 1000 + rows[:, 1], minlength=10**6)


def evaluation(samples: list[int], largest: int, console: Console) -> None:
    """A rank's share of the check that every sample is predicted once, and of the counts, by N / R."""
    table = Table(title="evaluation beside its forward passes, a rank's share, CPU seconds (sending left out)")
    for column in ("samples", "ranks", "of a rank", "s", "MB", "rank 0 before: s", "MB"):
        table.add_column(column, justify="right")
    for count in samples:
        before = ("-", "-")
        if count <= largest:
            took, most = alone(gathered_whole, count)
            before = f"{took:.1f}", f"{most:,.0f}"
        for ranks in (1, 8, 64, 512):
            if not 1000 <= count // ranks <= largest:
                continue
            with tempfile.TemporaryDirectory() as folder:
                split_of(Path(folder), count // ranks)
                took, most = alone(counted_share, Path(folder))
            table.add_row(f"{count:,}", str(ranks), f"{count // ranks:,}", f"{took:.1f}", f"{most:,.0f}", *before)
    console.print(table)


def startup(shards: list[int], console: Console) -> None:
    """Reading a manifest, on every rank."""
    table = Table(title="manifest: reading it, and its digest")
    for column in ("shards", "MB on disk", "s", "MB", "digest: s"):
        table.add_column(column, justify="right")
    for count in shards:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "manifest.json")
            alone(manifest_of, path.parent, count)

            def read(path: Path = path) -> None:
                with path.open("rb", buffering=0) as file:
                    load_manifest(file, "manifest.json")

            def read_and_digest(path: Path = path) -> None:
                with path.open("rb", buffering=0) as file:
                    load_manifest(file, "manifest.json").digest()

            took, most = alone(read)
            both = alone(read_and_digest)[0]
            size = path.stat().st_size / 1e6
        table.add_row(f"{count:,}", f"{size:,.0f}", f"{took:.2f}", f"{most:,.0f}", f"{both - took:.2f}")
    console.print(table)


def manifest_of(root: Path, shards: int) -> None:
    draws, found = np.random.default_rng(0), []
    for number in range(shards):
        stem = f"train-labelled-{number:06d}"
        names, digests = (f"{stem}.tar", f"{stem}.idx.npy"), [draws.bytes(32).hex() for _ in range(3)]
        more = (*digests[:2], f"{stem}.paths.jsonl", digests[2])
        found.append(Shard(*names, "labelled", 1000, 10**8 + number, *more))
    write_manifest(root, Manifest("made", ["ant", "bee"], 1, {}, Shards.of(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096], help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the projections (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="of an evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--largest", type=int, default=2 * 10**6, help="samples that a rank is tried with (default: %(default)s)"
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[10**5], help="of a manifest (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console(width=110)
    objective(arguments.batches, arguments.width, arguments.classes, console)
    checkpoints(console)
    evaluation(arguments.samples, arguments.largest, console)
    startup(arguments.shards, console)
    console.print(
        f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
