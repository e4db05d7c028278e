"""Conversion: --keep beside `cp` of the same bytes, --resize beside its work alone; and what --resize costs.

Both sides run in turn, round by round. The last table compares what --resize can store with the resized pixels
themselves: PSNR, size, and time to decode.
"""

import argparse
import io
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from photographs import photographs
from rich.console import Console
from rich.table import Table
from sptnet_shards.conversion.convert import Job, convert
from sptnet_shards.conversion.images import Resize
from sptnet_shards.conversion.plan import Settings
from sptnet_shards.progress import ShardProgress
from sptnet_shards.sources import imagefolder

from sptnet.data.image import decode, resize_short_side

FORMATS = {"png": [0], "jpeg": [100, 95, 90, 80], "webp": [95, 90]}


def seconds_to_convert(images: Path, out: Path, settings: Settings, workers: int) -> float:
    source = imagefolder.source(images, 2)
    job = Job("imagefolder", settings, lambda: source, lambda: source.read)
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    with ShardProgress(Console(file=io.StringIO())) as progress:
        convert(job, out, workers, progress)
    return time.perf_counter() - start


def seconds_to_copy(images: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(images), str(out)], check=True)
    for path in (out, *out.rglob("*")):  # a conversion is on the disk when it ends, so the copy is to be too
        opened = os.open(path, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
    return time.perf_counter() - start


def seconds_of_work(files: list[Path], resize: Resize) -> float:
    """Reading, decoding, resizing and encoding in one process, and nothing else."""
    start = time.perf_counter()
    for path in files:
        resize(path.read_bytes())
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def formats(files: list[Path], size: int) -> Table:
    table = Table(title=f"what --resize {size} stores, over {len(files)} images")
    for column in ("format", "quality", "PSNR, dB", "kB per image", "ms to decode"):
        table.add_column(column, justify="left" if column == "format" else "right")
    kept = [path.read_bytes() for path in files]
    start = time.process_time()
    decoded = [decode(encoded) for encoded in kept]
    each = (time.process_time() - start) / len(files) * 1e3
    table.add_row("--keep", "-", "-", f"{np.mean([len(e) for e in kept]) / 1e3:.1f}", f"{each:.2f}")
    wanted = [resize_short_side(image, size) for image in decoded]
    for name, qualities in FORMATS.items():
        for quality in qualities:
            resize = Resize(size, name, quality)  # type: ignore[arg-type]
            stored = [resize(encoded).encoded for encoded in kept]
            start = time.process_time()
            found = [decode(encoded) for encoded in stored]
            each = (time.process_time() - start) / len(files) * 1e3
            errors = [((a.float() - b.float()) ** 2).mean().item() for a, b in zip(found, wanted, strict=True)]
            psnr = "exact" if max(errors) == 0 else f"{np.mean([10 * np.log10(255**2 / e) for e in errors]):.1f}"
            weight = np.mean([len(encoded) for encoded in stored]) / 1e3
            table.add_row(name, "-" if name == "png" else str(quality), psnr, f"{weight:.1f}", f"{each:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="an ImageFolder (default: generated 500 x 375 JPEGs)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in ("keep", "copy", "resize", "work")}
    with tempfile.TemporaryDirectory() as scratch:
        images, out = photographs(arguments.images, Path(scratch, "images")), Path(scratch, "out")
        files = sorted(images / item.where for item in imagefolder.source(images, 2).train)
        size, resize = sum(path.stat().st_size for path in files), Resize(256, "jpeg", 95)
        for _ in range(arguments.rounds):
            times["copy"].append(seconds_to_copy(images, out))
            times["keep"].append(seconds_to_convert(images, out, Settings(), arguments.workers))
            times["work"].append(seconds_of_work(files, resize))
            times["resize"].append(seconds_to_convert(images, out, Settings(resize=resize), arguments.workers))
        quality = formats(files[:: max(1, len(files) // 200)], 256)
    keep, copy, resized, work = (median(times[name]) for name in ("keep", "copy", "resize", "work"))
    images_per_s = len(files) / resized / arguments.workers
    table = Table(title=f"{len(files)} images, {size / 1e6:.0f} MB, {arguments.workers} workers, "
                  f"medians of {arguments.rounds} rounds")  # fmt: skip
    for column in ("what", "ours", "beside", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("--keep, MB/s; cp", f"{size / keep / 1e6:.0f}", f"{size / copy / 1e6:.0f}", f"{copy / keep:.2f}")
    table.add_row("--resize 256, images/s per worker; decode + resize + encode", f"{images_per_s:.0f}",
                  f"{len(files) / work:.0f}", f"{images_per_s * work / len(files):.2f}")  # fmt: skip
    Console().print(table, quality, sep="\n")


if __name__ == "__main__":
    main()
