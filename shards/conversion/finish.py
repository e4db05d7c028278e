"""The end of a conversion: the manifest, a pure function of what every shard's record says."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sptnet_shards.conversion import record
from sptnet_shards.conversion.checks import near_duplicates
from sptnet_shards.conversion.duplicates import duplicates
from sptnet_shards.conversion.plan import Planned, Settings
from sptnet_shards.conversion.record import Conversion
from sptnet_shards.conversion.writer import Written
from sptnet_shards.source import Source, SourceError

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import KINDS, MANIFEST, Manifest, Shards, Skipped, read_manifest, write_manifest

T = TypeVar("T")
LOOK = 1.0  # seconds between two looks for files that a disk may show late


class Converted(NamedTuple):
    """The manifest, and sentences on what whoever asked for the conversion should know."""

    manifest: Manifest
    remarks: list[str]


@dataclass(frozen=True)
class Unfinished:
    """Tars that are not there yet, or not whole, of how many."""

    missing: list[str]
    total: int


def look(
    read: Callable[[str], T | None], listed: Callable[[], Iterable[str]], files: list[str], late: float
) -> tuple[dict[str, T], list[str]]:
    """What is recorded of files, and which lack a whole record; looked for again for `late` seconds, since a network
    disk may show new files late.

    Args:
        listed: of which files something is recorded, by one look. Where it is not all of them nothing is read: every
            task that ends looks, and all but the last find something missing.
    """
    found: dict[str, T] = {}
    end, told = time.monotonic() + late, False
    while True:
        there = set(listed())
        if not (missing := [file for file in files if file not in there]):
            found |= {file: written for file in files if file not in found and (written := read(file)) is not None}
            missing = [file for file in files if file not in found]
        if not missing or time.monotonic() >= end:
            return found, missing
        if not told:
            told = True
            print(f"{len(missing)} of {len(files)} are not there: looking again for {late:.0f} seconds",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(LOOK)


def finish(
    out: Path, conversion: Conversion, source: Source, planned: list[Planned], settings: Settings, late: float = 0.0
) -> Converted | Unfinished:
    """Write the manifest, if every shard is there with its size; nothing is hashed again.

    Raises:
        SourceError: nothing is left of a kind. OSError: it cannot be written.
    """
    files = [shard.file for shard in planned]
    found, missing = look(lambda file: record.read_record(out, file), lambda: record.recorded(out), files, late)
    if missing:
        return _by_another(out) or Unfinished(missing, len(files))
    written = [found[file] for file in files]
    _need_images(out, written)
    manifest = _manifest(source, settings, planned, written)
    write_manifest(out, manifest)
    record.clean_up(out, complete=True)
    told = [*near_duplicates(source.classes), *duplicates(planned, written, source)]
    return Converted(manifest, [*conversion.remarks, *told])


def _by_another(out: Path) -> Converted | None:
    """The manifest that another task has written meanwhile; records are gone then."""
    if not (out / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(out)
    except DatasetError:
        return None
    record.clean_up(out, complete=True)
    return Converted(manifest, [])


def _need_images(out: Path, written: list[Written]) -> None:
    """Raise SourceError where bad images were left out until nothing was left of a kind."""
    left = {done.shard.kind: 0 for done in written}
    for done in written:
        left[done.shard.kind] += done.shard.samples
    if empty := next((kind for kind, images in left.items() if not images), None):
        raise SourceError(f"{out} would have no {empty} image: all of them are bad, none decodes or can be stored")


def _manifest(source: Source, settings: Settings, planned: list[Planned], written: list[Written]) -> Manifest:
    shards = [done.shard for done in written]
    skipped = [
        Skipped(uid=uid, part="test" if shard.kind == "test" else "train", file=source.part(shard.kind).where(uid))
        for shard, done in zip(planned, written, strict=True)
        for uid in done.skipped
    ]
    counts: dict[str, int] = {kind: sum(shard.samples for shard in shards if shard.kind == kind) for kind in KINDS}
    protocol: dict[str, Any] = {
        "seed": settings.seed,
        "labelled_fraction": settings.labelled_fraction,
        "source": {"train": len(source.train), "test": len(source.test)},
        **counts,
        **source.protocol,
    }
    return Manifest(
        source.name, source.classes, source.num_old, protocol, Shards.of(shards), settings.recorded(), skipped,
        source.num_new, source.unknown,
    )  # fmt: skip
