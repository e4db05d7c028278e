"""The order of a very large dataset: time to find a batch, set-up and memory; prints a table.

A dataset of 10^9 samples in 10^6 shards is simulated by its shard sizes, which is all that the order reads.
"""

import argparse
import resource
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from sptnet.data.order import BatchOrder, rank_slice


def memory_mb() -> float:
    """The most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--world-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=17)
    arguments = parser.parse_args()

    before = memory_mb()
    sizes = np.full(arguments.shards, arguments.samples // arguments.shards)
    labelled, unlabelled = np.split(sizes, [arguments.shards // 4])
    slots = rank_slice(arguments.batch_size, arguments.rank, arguments.world_size)
    start = time.perf_counter()
    order = BatchOrder(labelled, unlabelled, arguments.batch_size, arguments.streams, arguments.window, seed=0)
    order.batch(0, *slots)  # the permutations of the pass and of the first windows
    set_up = time.perf_counter() - start

    draws = np.random.default_rng(0)
    row, anywhere, next_pass = [], [], []
    first = order.steps_per_epoch // 3
    order.batch(first, *slots)
    for step in range(first + 1, first + 501):
        row.append(_timed(order, step, slots))
    for step in draws.integers(0, order.splits[0].total * 2 // arguments.batch_size, 200).tolist():
        anywhere.append(_timed(order, step, slots))
    for pass_ in range(3, 6):
        next_pass.append(_timed(order, pass_ * order.splits[0].total * 2 // arguments.batch_size + 5, slots))

    table = Table(title=f"{arguments.samples:,} samples in {arguments.shards:,} shards, rank {arguments.rank} of "
                  f"{arguments.world_size}, {slots[1] - slots[0]} of {arguments.batch_size} samples")  # fmt: skip
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("set-up, first batch included", f"{set_up:.2f} s")
    table.add_row("batch of the next step, median / slowest of 500", f"{np.median(row):.2f} / {max(row):.2f} ms")
    table.add_row("batch of any step of this pass, median / slowest of 200",
                  f"{np.median(anywhere):.2f} / {max(anywhere):.2f} ms")  # fmt: skip
    table.add_row("first batch of another pass (its shards are permuted), slowest", f"{max(next_pass):.0f} ms")
    table.add_row("memory of the process, of which before", f"{memory_mb():.0f} MB, {before:.0f} MB")
    Console().print(table)


def _timed(order: BatchOrder, step: int, slots: tuple[int, int]) -> float:
    start = time.perf_counter()
    order.batch(step, *slots)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
