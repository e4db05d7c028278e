"""Convert a whole source: shards by several processes, continued where an earlier conversion was killed."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from sptnet_shards import record
from sptnet_shards.checks import check_source, near_duplicates
from sptnet_shards.duplicates import duplicates
from sptnet_shards.plan import Planned, Settings, fingerprint, plan
from sptnet_shards.source import Item, Source, SourceError
from sptnet_shards.workers import run_all
from sptnet_shards.writer import Written, content_of, index_name, skipped_of, write_shard

from sptnet.data.files import file_sha256, open_regular
from sptnet.data.manifest import KINDS, DatasetError, Manifest, Shard, Skipped, write_manifest
from sptnet.data.paths import paths_name
from sptnet.data.shard_index import read_entries

LOCK_WAIT = 10  # seconds; the workers of a killed conversion end within moments


class Progress(Protocol):
    """What is told while shards are written."""

    def begin(self, shards: int, images: int) -> None:
        """How much there is to do."""

    def advance(self, shard: Shard, continued: bool) -> None:
        """A shard is done; `continued`: by an earlier conversion."""


class Converted(NamedTuple):
    """The manifest, and sentences on what whoever asked for the conversion should know."""

    manifest: Manifest
    remarks: list[str]


def convert(source: Source, out: Path, settings: Settings, workers: int, progress: Progress) -> Converted:
    """Write the whole dataset; the manifest comes last, so that a folder with one is complete.

    Whole shards that an earlier, killed conversion of the same source with the same settings left are kept, if they
    are still what it wrote. The bytes of every file are the same for any number of workers, and whether or not it was
    killed on the way.

    Raises:
        SourceError: `out` holds another dataset or conversion, an image cannot be read or does not decode, or the disk
            is full.
    """
    check_source(source)
    planned = plan(source, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        was_there = os.path.lexists(out / record.LOCK)
        with FileLock(out / record.LOCK, timeout=LOCK_WAIT):
            # claimed under the lock: two conversions that begin in the same moment do not both find it empty
            try:
                record.claim(out, fingerprint(source, settings))
            except SourceError:
                if not was_there:
                    (out / record.LOCK).unlink(missing_ok=True)
                raise
            written = _write_missing(out, planned, source, settings, workers, progress)
            _need_images(out, planned, written)
            manifest = _manifest(source, settings, planned, written)
            write_manifest(out, manifest)
            record.remove(out)
        (out / record.LOCK).unlink(missing_ok=True)
    except Timeout:
        raise SourceError(f"{out} is being written by another conversion: wait for it or stop it") from None
    except OSError as error:
        raise SourceError(f"{error.filename or out} cannot be written: {error.strerror}") from None
    remarks = [*source.remarks, *near_duplicates(source.classes), *duplicates(planned, written, source.classes)]
    return Converted(manifest, remarks)


def _write_missing(
    out: Path, planned: list[Planned], source: Source, settings: Settings, workers: int, progress: Progress
) -> list[Written]:
    """Every planned shard, in their order; those of an earlier conversion are looked for first."""
    _remove_leftovers(out)
    progress.begin(len(planned), sum(len(shard.samples) for shard in planned))
    written: dict[str, Written] = {}
    recorded = record.finished(out)
    for shard in planned:
        if shard.file in recorded and (found := _look(out, shard, recorded[shard.file], source, settings)) is not None:
            written[shard.file] = found
            progress.advance(found.shard, continued=True)
    missing = [shard for shard in planned if shard.file not in written]
    try:
        for result in run_all(_write, (out, missing, source, settings), range(len(missing)), workers):
            record.add(out, result.shard)
            written[result.shard.file] = result
            progress.advance(result.shard, continued=False)
    finally:
        _remove_leftovers(out)  # of workers that were stopped in the middle of a shard
    return [written[shard.file] for shard in planned]


def _write(out: Path, missing: list[Planned], source: Source, settings: Settings, number: int) -> Written:
    return write_shard(out, missing[number], source, settings)


def _remove_leftovers(out: Path) -> None:
    for leftover in out.glob("*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _look(out: Path, planned: Planned, shard: Shard, source: Source, settings: Settings) -> Written | None:
    """A shard that an earlier conversion finished, if it is still what that wrote, and may stay as it is."""
    path, index_path = out / planned.file, out / index_name(planned.file)
    targets = source.num_old if planned.kind == "labelled" else len(source.classes)
    if (shard.index, shard.kind) != (index_path.name, planned.kind):
        return None
    try:
        if file_sha256(path) != shard.sha256:
            return None
        index = read_entries(index_path, shard, targets)
        if file_sha256(out / paths_name(planned.file)) != shard.paths_sha256:
            return None
        contents = _contents(path, index)
    except (OSError, DatasetError):
        return None
    skipped = skipped_of(planned, index)
    if skipped and settings.on_error == "fail":
        return None  # an earlier conversion was told to leave images out, this one was not
    return Written(shard, skipped, contents)


def _contents(path: Path, index: NDArray[np.void]) -> NDArray[np.uint64]:
    descriptor = open_regular(path)
    try:
        return np.array(
            [content_of(os.pread(descriptor, size, offset)) for _, _, offset, size in index.tolist()], np.uint64
        )
    finally:
        os.close(descriptor)


def _need_images(out: Path, planned: list[Planned], written: list[Written]) -> None:
    """Raise SourceError where bad images were left out until nothing was left of a kind."""
    left = {shard.kind: 0 for shard in planned}
    for done in written:
        left[done.shard.kind] += done.shard.samples
    if empty := next((kind for kind, images in left.items() if not images), None):
        raise SourceError(f"{out} would have no {empty} image: all of them are bad, none decodes or can be stored")


def _manifest(source: Source, settings: Settings, planned: list[Planned], written: list[Written]) -> Manifest:
    shards = [done.shard for done in written]
    skipped: list[Skipped] = []
    for shard, done in zip(planned, written, strict=True):
        items: dict[int, Item] = dict(shard.samples)
        for uid in done.skipped:
            skipped.append(Skipped(uid=uid, part="test" if shard.kind == "test" else "train", file=items[uid].where))
    counts: dict[str, int] = {kind: sum(shard.samples for shard in shards if shard.kind == kind) for kind in KINDS}
    protocol: dict[str, Any] = {
        "seed": settings.seed,
        "labelled_fraction": settings.labelled_fraction,
        "source": {"train": len(source.train), "test": len(source.test)},
        **counts,
        **source.protocol,
    }
    return Manifest(
        source.name, source.classes, source.num_old, protocol, shards, settings.recorded(), skipped,
        source.num_new, source.unknown,
    )  # fmt: skip
