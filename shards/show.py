"""Look at a dataset: a table of what it holds, and a contact sheet of random samples of every class."""

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text
from sptnet_shards.conversion.plan import PREFIX
from sptnet_shards.conversion.record import MEMBERS, SUFFIX, read_conversion, recorded

from sptnet.data.format.files import open_regular
from sptnet.data.format.manifest import KINDS, MANIFEST, UNKNOWN, Manifest
from sptnet.data.format.shard_index import read_index
from sptnet.data.format.temporary import writer_of
from sptnet.data.image import DecodeError
from sptnet.data.keyed import SHOW, permutation
from sptnet.data.sheet import Row, crossed_tile, encoded_as, sheet_of, tile_of
from sptnet.errors import visible

TILE, PER_CLASS, CLASSES, CAPTION = 64, 8, 100, 14  # pixels, samples, classes at most, pixels


class Sheet(NamedTuple):
    """A contact sheet as PNG, and what is wrong with images that it shows as a cross."""

    png: bytes
    bad: list[str]


class _Sample(NamedTuple):
    """Where an image lies; offset and size in bytes."""

    file: str
    uid: int
    offset: int
    size: int


def table(manifest: Manifest) -> Table:
    """Splits, classes, shards and bytes. What a manifest says is text, never markup."""
    told = Table(title=Text(f"{manifest.name}: {classes_told(manifest)}"))
    for column in ("split", "samples", "shards", "MB", "kB per sample"):
        told.add_column(column, justify="left" if column == "split" else "right")
    for kind in KINDS:
        shards = manifest.of_kind(kind)
        size, samples = sum(shard.bytes for shard in shards), manifest.samples(kind)
        each = f"{size / samples / 1e3:.1f}" if samples else "-"
        told.add_row(kind, f"{samples:,}", str(len(shards)), f"{size / 1e6:,.1f}", each)
    facts = [f"{name}: {value}" for name, value in {**manifest.protocol, **manifest.transform}.items()]
    if manifest.skipped:
        facts.append(f"skipped: {len(manifest.skipped)} images")
    told.caption = Text(visible("  ".join(facts)))
    return told


def under_way(root: Path) -> Table | None:
    """How far a dataset is that is being written, by all tasks; None where its manifest is there, or nothing begun."""
    conversion = read_conversion(root)
    if os.path.lexists(root / MANIFEST) or conversion is None or not conversion.shards:
        return None
    told = Table(title=Text(visible(f"{root} is being written ({conversion.command})")))
    for column in ("split", "shards", "of", "MB", "images of the whole"):
        told.add_column(column, justify="left" if column == "split" else "right")
    prefixes = {str(kind): prefix for kind, prefix in PREFIX.items()}
    there = recorded(root, MEMBERS if conversion.command == "index" else SUFFIX)
    for kind in conversion.shards:
        files = [file for file in there if file.startswith(prefixes.get(kind, ""))]
        size = 0
        for file in files:
            with suppress(OSError):
                size += os.stat(root / file).st_size
        told.add_row(Text(visible(kind)), f"{len(files):,}", f"{conversion.shards[kind]:,}", f"{size / 1e6:,.1f}",
                     f"{conversion.samples.get(kind, 0):,}")  # fmt: skip
    told.caption = Text(visible(_writers_told(root)))
    return told


def _writers_told(root: Path) -> str:
    """Which hosts have a file open in a folder, as far as its temporary names say it."""
    writers = {writer for name in os.listdir(root) if (writer := writer_of(name)) is not None and not writer.is_dead()}
    tasks = Counter(host for host, _, _ in {writer[1:] for writer in writers})
    return "writing: " + (", ".join(f"{host} ({count})" for host, count in sorted(tasks.items())) or "nobody")


def classes_told(manifest: Manifest) -> str:
    """How many classes are old and new, as far as anybody knows."""
    new = manifest.new_classes()
    if not manifest.unknown:
        return f"{manifest.num_old} old classes of {len(manifest.classes)}"
    return f"{manifest.num_old} old classes, {'an unknown number of' if new is None else new} new ones"


def _samples_by_class(root: Path, manifest: Manifest) -> dict[int, list[_Sample]]:
    """A few samples per class, from shards in a random order until every class has some."""
    targets = [*range(len(manifest.classes)), *([UNKNOWN] if manifest.unknown else [])]
    chosen: dict[int, list[_Sample]] = {target: [] for target in targets}
    for number in permutation(0, SHOW, 0, 0, 0, len(manifest.shards)):
        shard = manifest.shards[number]
        index = read_index(root, manifest, shard)
        for i in permutation(0, SHOW, 1, int(number), 0, len(index)):
            uid, target, offset, size = index[i].item()
            if len(chosen.setdefault(target, [])) < PER_CLASS:
                chosen[target].append(_Sample(shard.file, uid, offset, size))
        if all(len(samples) == PER_CLASS for samples in chosen.values()):
            break
    return chosen


def contact_sheet(root: Path, manifest: Manifest) -> Sheet:
    """One row per class, old ones first, with its name; the first classes only where there are very many.

    Raises:
        DatasetError: an index that is damaged. OSError: a shard that cannot be read.
    """
    chosen = _samples_by_class(root, manifest)
    shown = list(chosen)[: CLASSES - manifest.unknown] + ([UNKNOWN] if manifest.unknown else [])
    shown = list(dict.fromkeys(shown))
    bad: list[str] = []
    rows = [
        Row([_tile(root, sample, bad) for sample in chosen[target]], _caption(manifest, target)) for target in shown
    ]
    return Sheet(encoded_as(sheet_of(rows, PER_CLASS, TILE, CAPTION), "PNG"), bad)


def _caption(manifest: Manifest, target: int) -> str:
    if target == UNKNOWN:
        return "to be sorted"
    return f"{target} {manifest.classes[target]} ({'old' if target < manifest.num_old else 'new'})"


def _tile(root: Path, sample: _Sample, bad: list[str]) -> Image.Image:
    """The centre of an image; what does not decode is a cross, and a line in `bad`."""
    descriptor = open_regular(root / sample.file)
    try:
        encoded = os.pread(descriptor, sample.size, sample.offset)
    finally:
        os.close(descriptor)
    try:
        return tile_of(encoded, TILE)
    except DecodeError as error:
        bad.append(f"{root / sample.file}: sample {sample.uid} does not decode: {error}")
        return crossed_tile(TILE)


def classes_without_samples(root: Path, manifest: Manifest) -> list[str]:
    """Names of classes that no shard has a sample of."""
    found = set()
    for shard in manifest.shards:
        found |= set(np.unique(read_index(root, manifest, shard)["target"]).tolist())
    return [name for target, name in enumerate(manifest.classes) if target not in found]
