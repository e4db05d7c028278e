"""Sharding at scale: listing and planning of very many images (generated names), and images/s of one and of two tasks.

Every number of images is measured in a process of its own: seconds, and the most memory that it took. What reading a
real folder adds is measured on --files empty files. Tasks are processes with one worker each, on one disk.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from photographs import photographs
from rich.console import Console
from rich.table import Table
from sptnet_shards.conversion.checks import check_source
from sptnet_shards.conversion.plan import Settings, plan, shard_counts
from sptnet_shards.conversion.record import make_folder
from sptnet_shards.conversion.scan import fingerprint, read_items, write_items
from sptnet_shards.folder import Folder
from sptnet_shards.items import Item, Items
from sptnet_shards.source import Source

CLASSES = 1000


def generated(images: int) -> Iterator[Item]:
    """Names such as ImageNet's, about 40 bytes each."""
    each = images // CLASSES
    for number in range(CLASSES):
        name = f"n{number:08d}"
        for i in range(each):
            yield Item(name, f"train/{name}/{name}_{i:08d}.JPEG", 100_000 + i % 5000)


def read_nothing(where: str) -> bytes:
    return b""


def planning(images: int, out: Path, answer: Connection) -> None:
    """What the first task does before its first shard, and what the others do instead of listing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, times, start = time.perf_counter(), [], time.process_time()

    def lap() -> None:
        nonlocal start
        times.append(time.process_time() - start)
        start = time.process_time()

    names = [f"n{number:08d}" for number in range(CLASSES)]
    source = Source("made", names, CLASSES // 2, Items.of(generated(images)), [], read_nothing)
    lap()
    check_source(source)
    digest = fingerprint(source)
    make_folder(out)
    write_items(out, source, digest)
    lap()
    counts: dict[str, int] = {kind: shards for kind, (_, shards) in shard_counts(source, Settings()).items()}
    planned = plan(source, Settings(), counts)
    lap()
    times.append(time.perf_counter() - begun)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_items(out, digest, read_nothing)
    assert found is not None
    assert sum(len(shard.uids) for shard in planned) == len(found.train) == images
    lap()
    answer.send((times, before * 1024 / 1e9, most * 1024 / 1e9, len(planned), len(source.part("train").names) / images))


def measured(images: int, scratch: Path) -> tuple[list[float], float, float, int, float]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=planning, args=(images, scratch / str(images), theirs)
    )
    process.start()
    theirs.close()
    found: tuple[list[float], float, float, int, float] = ours.recv()
    process.join()
    return found


def seconds_a_file(files: int, scratch: Path) -> float:
    """Of listing a real folder, in 100 class folders."""
    for i in range(files):
        path = scratch / "real" / f"{i % 100:03d}" / f"{i:08d}.jpg"
        if i < 100:
            path.parent.mkdir(parents=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    start = time.perf_counter()
    assert len(Folder(scratch / "real").images("x", "")) == files
    return (time.perf_counter() - start) / files


def seconds_of_tasks(images: Path, out: Path, tasks: int) -> float:
    """From the start of all tasks to the end of the last, imports of the programs included."""
    command = [sys.executable, "-m", "sptnet_shards.make_shards", "imagefolder", str(images), str(out), "--old", "2",
               "--resize", "256", "--workers", "1"]  # fmt: skip
    start = time.perf_counter()
    running = [
        subprocess.Popen([*command, "--task", f"{i}/{tasks}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(tasks)
    ]
    assert [process.wait() for process in running] == [0] * tasks
    assert (out / "manifest.json").exists()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="*", default=[10**6, 10**7], help="how many are listed and planned")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3, help="of the tasks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        table = Table(title="before the first shard: seconds of a core, GB of memory (of them the program itself)")
        columns = ("images", "list", "check, write", "plan", "by the clock", "read", "GB", "shards", "bytes of path")
        for column in columns:
            table.add_column(column, justify="right")
        for images in arguments.images:
            times, before, most, shards, path = measured(images, scratch)
            table.add_row(f"{images:,}", *(f"{t:.1f}" for t in times), f"{most:.2f} ({before:.2f})", f"{shards:,}",
                          f"{path:.0f}")  # fmt: skip
        each = seconds_a_file(arguments.files, scratch)
        console = Console()
        console.print(table, f"listing {arguments.files:,} real files: {each * 1e6:.1f} us each", sep="\n")
        photos = photographs(None, scratch / "images")
        count = sum(1 for path in photos.rglob("*") if path.is_file())
        rounds = [[seconds_of_tasks(photos, scratch / f"out-{tasks}-{r}", tasks) for tasks in (1, 2)]
                  for r in range(arguments.rounds)]  # fmt: skip
        one, two = (sorted(times)[len(times) // 2] for times in zip(*rounds, strict=True))
        console.print(f"{count:,} photographs, --resize 256, programs started anew: {count / one:.0f} images/s "
                      f"by 1 task, {count / two:.0f} by 2")  # fmt: skip


if __name__ == "__main__":
    main()
