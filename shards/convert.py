"""Convert a whole source: shards by several processes, continued where an earlier conversion was killed."""

import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout

from shards.plan import Planned, Settings, fingerprint, plan
from shards.source import Item, Source, SourceError
from shards.writer import Written, file_sha256, index_name, skipped_of, write_shard
from sptnet.data.manifest import KINDS, MANIFEST, Manifest, Shard, write_manifest

UNFINISHED = "conversion.json"  # names what is being converted; gone when the manifest is there
LOCK = "conversion.lock"
LOCK_WAIT = 10  # seconds; the workers of a killed conversion end within moments


class Progress(Protocol):
    """What is told while shards are written."""

    def begin(self, shards: int, images: int) -> None:
        """How much there is to do."""

    def advance(self, written: Written, continued: bool) -> None:
        """A shard is done; `continued`: by an earlier conversion."""


def convert(source: Source, out: Path, settings: Settings, workers: int, progress: Progress) -> Manifest:
    """Write the whole dataset; the manifest comes last, so that a folder with one is complete.

    Whole shards that an earlier, killed conversion of the same source with the same settings left are kept. The bytes
    of every file are the same for any number of workers, and whether or not it was killed on the way.

    Raises:
        SourceError: `out` holds another dataset or conversion, an image cannot be read or does not decode, or the disk
            is full.
    """
    planned = plan(source, settings)
    try:
        _claim(out, fingerprint(source, settings))
        with FileLock(out / LOCK, timeout=LOCK_WAIT):
            written = _write_missing(out, planned, source, settings, workers, progress)
            manifest = _manifest(source, settings, planned, written)
            write_manifest(out, manifest)
            (out / UNFINISHED).unlink()
        (out / LOCK).unlink(missing_ok=True)
    except Timeout:
        raise SourceError(f"{out} is being written by another conversion: wait for it or stop it") from None
    except OSError as error:
        raise SourceError(f"{error.filename or out} cannot be written: {error.strerror}") from None
    return manifest


def _claim(out: Path, wanted: str) -> None:
    """Make the folder ours, or find that it is ours already."""
    if (out / MANIFEST).exists():
        raise SourceError(f"{out} holds a dataset already: remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    mark = out / UNFINISHED
    if not mark.exists():
        temporary = mark.with_name("." + mark.name)
        if strange := next((path for path in sorted(out.iterdir()) if path != temporary), None):
            raise SourceError(f"{out} is not empty ({strange.name}): choose another folder")
        temporary.write_text(json.dumps({"fingerprint": wanted}) + "\n")
        temporary.replace(mark)
        return
    try:
        found = json.loads(mark.read_text())["fingerprint"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != wanted:
        raise SourceError(
            f"{out} holds an unfinished conversion of something else, or with other settings: remove it or choose "
            "another folder"
        )


def _write_missing(
    out: Path, planned: list[Planned], source: Source, settings: Settings, workers: int, progress: Progress
) -> dict[str, Written]:
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    progress.begin(len(planned), sum(len(shard.samples) for shard in planned))
    written: dict[str, Written] = {}
    for shard in planned:
        if (found := _look(out, shard)) is not None:
            written[shard.file] = found
            progress.advance(found, continued=True)
    missing = [number for number, shard in enumerate(planned) if shard.file not in written]
    for result in _write_all(missing, (out, planned, source, settings), workers):
        written[result.shard.file] = result
        progress.advance(result, continued=False)
    return written


def _look(out: Path, planned: Planned) -> Written | None:
    """A shard that an earlier conversion finished, if it did."""
    path, index_path = out / planned.file, out / index_name(planned.file)
    if not (path.exists() and index_path.exists()):
        return None
    index = np.load(index_path, allow_pickle=False)
    shard = Shard(
        path.name, index_path.name, planned.kind, len(index), path.stat().st_size,
        file_sha256(path), file_sha256(index_path),
    )  # fmt: skip
    return Written(shard, skipped_of(planned, index))


_job: tuple[Any, ...] = ()  # of a worker process: what it was started with


def _start(*job: Any) -> None:
    global _job
    _job = job
    torch.set_num_threads(1)  # one process per core; and OpenMP's own threads do not survive a fork
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write(number: int) -> Written:
    out, planned, source, settings = _job
    return write_shard(out, planned[number], source, settings)


def _write_all(numbers: list[int], job: tuple[Any, ...], workers: int) -> Iterator[Written]:
    # forked, so that a list of a million images is neither pickled nor copied
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=job) as pool:
        futures = [pool.submit(_write, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise SourceError(
                "a worker was killed (memory?): run the same command again, with fewer --workers"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _manifest(source: Source, settings: Settings, planned: list[Planned], written: dict[str, Written]) -> Manifest:
    shards = [written[shard.file].shard for shard in planned]
    skipped: list[dict[str, Any]] = []
    for shard in planned:
        items: dict[int, Item] = dict(shard.samples)
        part = "test" if shard.kind == "test" else "train"
        skipped += [{"uid": uid, "part": part, "file": items[uid].where} for uid in written[shard.file].skipped]
    counts: dict[str, int] = {kind: sum(shard.samples for shard in shards if shard.kind == kind) for kind in KINDS}
    protocol: dict[str, Any] = {
        "seed": settings.seed,
        "labelled_fraction": settings.labelled_fraction,
        "source": {"train": len(source.train), "test": len(source.test)},
        **counts,
        **source.protocol,
    }
    return Manifest(source.name, source.classes, source.num_old, protocol, shards, settings.recorded(), skipped)
