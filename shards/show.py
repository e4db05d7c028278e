"""Look at a dataset: a table of what it holds, and a contact sheet of random samples of every class."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.table import Table

from sptnet.data.image import decode, resize_short_side, to_pillow
from sptnet.data.keyed import permutation
from sptnet.data.manifest import KINDS, Manifest, parse_index

CONTACT_SHEET = "contact_sheet.png"
TILE, PER_CLASS, CLASSES, CAPTION = 64, 8, 100, 14  # pixels, samples, classes at most, pixels
SHOW = 5  # purpose of the random numbers


def table(manifest: Manifest) -> Table:
    """Splits, classes, shards and bytes."""
    told = Table(title=f"{manifest.name}: {manifest.num_old} old classes of {len(manifest.classes)}")
    for column in ("split", "samples", "shards", "MB", "kB per sample"):
        told.add_column(column, justify="left" if column == "split" else "right")
    for kind in KINDS:
        shards = manifest.of_kind(kind)
        size, samples = sum(shard.bytes for shard in shards), manifest.samples(kind)
        each = f"{size / samples / 1e3:.1f}" if samples else "-"
        told.add_row(kind, f"{samples:,}", str(len(shards)), f"{size / 1e6:,.1f}", each)
    for name, value in {**manifest.protocol, **manifest.transform}.items():
        told.caption = f"{told.caption or ''}{name}: {value}  "
    if manifest.skipped:
        told.caption = f"{told.caption or ''}skipped: {len(manifest.skipped)} images"
    return told


def _samples_by_class(root: Path, manifest: Manifest, seed: int) -> dict[int, list[tuple[str, int, int]]]:
    """(tar, offset, size) of a few samples per class, from shards in a random order until every class has some."""
    chosen: dict[int, list[tuple[str, int, int]]] = {target: [] for target in range(len(manifest.classes))}
    for number in permutation(seed, SHOW, 0, 0, 0, len(manifest.shards)):
        shard = manifest.shards[number]
        index = parse_index((root / shard.index).read_bytes(), shard, str(root / shard.index))
        for i in permutation(seed, SHOW, 1, int(number), 0, len(index)):
            _, target, offset, size = index[i].item()
            if len(chosen.get(target, [])) < PER_CLASS:
                chosen[target].append((shard.file, offset, size))
        if all(len(samples) == PER_CLASS for samples in chosen.values()):
            break
    return chosen


def contact_sheet(root: Path, manifest: Manifest, seed: int = 0) -> Image.Image:
    """One row per class, old ones first, with its name; the first classes only where there are very many."""
    chosen = _samples_by_class(root, manifest, seed)
    rows = min(len(manifest.classes), CLASSES)
    sheet = Image.new("RGB", (PER_CLASS * TILE, rows * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = row * (TILE + CAPTION)
        age = "old" if row < manifest.num_old else "new"
        draw.text((2, top), f"{row} {manifest.classes[row]} ({age})", fill="black")
        for column, (file, offset, size) in enumerate(chosen[row]):
            with open(root / file, "rb") as tar:
                tar.seek(offset)
                image = to_pillow(resize_short_side(decode(tar.read(size)), TILE))
            left, upper = (image.width - TILE) // 2, (image.height - TILE) // 2
            tile = image.crop((left, upper, left + TILE, upper + TILE))
            sheet.paste(tile, (column * TILE, top + CAPTION))
    return sheet


def classes_without_samples(root: Path, manifest: Manifest) -> list[str]:
    """Names of classes that no shard has a sample of."""
    found = set()
    for shard in manifest.shards:
        index = parse_index((root / shard.index).read_bytes(), shard, str(root / shard.index))
        found |= set(np.unique(index["target"]).tolist())
    return [name for target, name in enumerate(manifest.classes) if target not in found]
