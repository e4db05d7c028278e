"""What a rank pays in a world of R ranks, one rank's share computed alone; prints a table.

The objective: time, and the most memory that is alive at once, of rank 0's share of a global batch, with torch's fake
process group in the place of the other ranks: its collectives move nothing, so their time is not in it and their bytes
are counted from the shapes. `before` is the whole batch's objective on every rank, as it was computed until then.

Checkpoints: files of a sharded strategy, and how often they are opened when a run continues. Evaluation: the check that
every uid is there once, and the time of the sets that it used to make. Start-up: reading a manifest.
"""

import argparse
import resource
import sys
import time
import weakref
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sptnet.evaluate import exactly_once
from sptnet.method.losses import GCDLoss
from sptnet.objective import share_of
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
    return seconds(work), alive


def objective(batches: list[int], width: int, classes: int, console: Console) -> None:
    table = Table(title=f"objective of one rank, {width} wide, {classes} classes, {torch.get_num_threads()} thread(s)")
    for column in ("batch", "ranks", "s", "MB", "collectives", "MB of a collective", "before: s", "MB"):
        table.add_column(column, justify="right")
    for batch in batches:
        took, alive = whole(batch, width, classes)
        before = f"{took:.3f}", f"{alive.most / 1e6:,.0f}"
        for ranks in WORLDS:
            if batch // ranks < 2:
                continue
            took, alive = share(batch, ranks, width, classes)
            largest = alive.sent / max(alive.collectives, 1) / 1e6
            table.add_row(f"{batch:,}", str(ranks), f"{took:.3f}", f"{alive.most / 1e6:,.1f}", str(alive.collectives),
                          f"{largest:,.2f}", *before)  # fmt: skip
    console.print(table)


def checkpoints(console: Console) -> None:
    table = Table(title="checkpoint of a sharded strategy")
    for column in ("ranks", "files", "opens on continuing", "before: files", "opens"):
        table.add_column(column, justify="right")
    for ranks in WORLDS:
        files = len(writers_of(True, ranks))
        table.add_row(*(f"{n:,}" for n in (ranks, files, files, ranks, ranks * ranks)))
    console.print(table)


def evaluation(samples: list[int], console: Console) -> None:
    table = Table(title="every uid there once, on rank 0")
    for column in ("samples", "s", "before: s"):
        table.add_column(column, justify="right")
    for count in samples:
        uids = np.random.default_rng(0).permutation(count)
        rows, expected = np.stack([uids, uids % 100, uids % 100, uids % 7], axis=1), np.arange(count)

        def sets(rows: np.ndarray = rows, expected: np.ndarray = expected) -> None:
            found, _ = np.unique(rows[np.argsort(rows[:, 0], kind="stable")][:, 0], return_counts=True)
            np.setdiff1d(expected, found)
            np.setdiff1d(found, expected)

        ours = seconds(lambda rows=rows, expected=expected: exactly_once(rows, expected))  # type: ignore[misc]
        table.add_row(f"{count:,}", f"{ours:.2f}", f"{seconds(sets):.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096], help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the projections (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[10**6], help="of an evaluation (default: %(default)s)"
    )
    arguments = parser.parse_args()
    console = Console(width=110)
    objective(arguments.batches, arguments.width, arguments.classes, console)
    checkpoints(console)
    evaluation(arguments.samples, console)
    console.print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
