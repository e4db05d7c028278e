"""Indexes and a manifest for WebDataset tars that others made; the tars stay as they are.

A tar of training samples usually holds labelled and unlabelled ones together, so it gets two indexes, one per kind.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.plan import Settings
from shards.protocol import labelled_positions
from shards.source import Item, Source, SourceError, need_classes
from shards.tar_members import IMAGE_MEMBERS, BoundedReads, plain_members
from shards.writer import file_sha256, write_index
from sptnet.data.manifest import INDEX_DTYPE, KINDS, MANIFEST, Kind, Manifest, Shard, write_manifest

LONGEST_LABEL = 2**20  # bytes of a .cls or .json


class Found(NamedTuple):
    """A sample in a tar: its class as the tar has it, and where its image lies (bytes)."""

    tar: str
    label: str
    offset: int
    size: int


def _samples(path: Path, json_key: str) -> Iterator[Found]:
    """The samples of a tar, in its order; members that are neither image nor label are passed over."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with open(path, "rb") as file:
            for member in plain_members(BoundedReads(file), str(path)):
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                key, suffix = os.path.join(folder, stem), suffix.lower()
                if suffix in IMAGE_MEMBERS:
                    if key in images:
                        raise SourceError(f"{path}: two images of the name {key!r}")
                    images[key] = (member.offset_data, member.size)
                elif suffix in ("cls", "json"):
                    if member.size > LONGEST_LABEL:
                        raise SourceError(f"{path}: {member.name!r} is {member.size:,} bytes long, no label is")
                    text = os.pread(file.fileno(), member.size, member.offset_data)
                    if suffix == "cls" or key not in labels:
                        labels[key] = _label(text, suffix, json_key, f"{path}: {member.name!r}")
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{path} cannot be read as a tar: {error}") from None
    if lacking := next((key for key in images if key not in labels), None):
        raise SourceError(f"{path}: image {lacking!r} has neither .cls nor .json")
    for key, (offset, size) in images.items():
        yield Found(path.name, labels[key], offset, size)


def _label(text: bytes, suffix: str, json_key: str, where: str) -> str:
    try:
        value: Any = text.decode().strip() if suffix == "cls" else json.loads(text)[json_key]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise SourceError(f"{where} holds no label ({type(error).__name__}: {error}); is --json-key right?") from None
    return str(value)


def _class_order(labels: set[str]) -> list[str]:
    """By number where all labels are numbers, else by name."""
    return sorted(labels, key=int) if all(label.isdigit() for label in labels) else sorted(labels)


def index(
    root: Path, train: Sequence[Path], test: Sequence[Path], num_old: int, settings: Settings, name: str, json_key: str
) -> Manifest:
    """Write indexes and a manifest beside tars.

    The uid of a sample is its position in the tars, taken by name; its class is what its .cls says, else the key
    `json_key` of its .json. The first `num_old` classes, by number or name, are old.

    Raises:
        SourceError: a tar outside of `root`, no tar or a hostile one, a sample without label, an impossible `num_old`.
    """
    if (root / MANIFEST).exists():
        raise SourceError(f"{root} has a {MANIFEST} already: remove it to index again")
    for path in (*train, *test):
        if path.resolve().parent != root.resolve():
            raise SourceError(f"{path} does not lie in {root}, where its index is to stand")
    found = {
        part: [sample for path in sorted(tars) for sample in _samples(path, json_key)]
        for part, tars in (("train", train), ("test", test))
    }
    classes = _class_order({sample.label for sample in found["train"]})
    need_classes(root, classes, (sample.label for sample in found["test"]), num_old)
    items = {part: [Item(s.label, s.tar, s.size) for s in samples] for part, samples in found.items()}
    source = Source(name, classes, num_old, items["train"], items["test"], lambda where: b"")
    labelled = labelled_positions(source, settings.labelled_fraction, settings.seed)
    rows: dict[tuple[str, Kind], list[tuple[int, int, int, int]]] = {}
    targets = {label: target for target, label in enumerate(classes)}
    for part, samples in found.items():
        for uid, sample in enumerate(samples):
            kind: Kind = "test" if part == "test" else "labelled" if uid in labelled else "unlabelled"
            rows.setdefault((sample.tar, kind), []).append((uid, targets[sample.label], sample.offset, sample.size))
    manifest = Manifest(name, classes, num_old, _protocol(settings, found), _write(root, rows))
    write_manifest(root, manifest)
    return manifest


def _protocol(settings: Settings, found: dict[str, list[Found]]) -> dict[str, Any]:
    counts = {part: len(samples) for part, samples in found.items()}
    return {"seed": settings.seed, "labelled_fraction": settings.labelled_fraction, "source": counts}


def _write(root: Path, rows: dict[tuple[str, Kind], list[tuple[int, int, int, int]]]) -> list[Shard]:
    digests = {tar: file_sha256(root / tar) for tar in {tar for tar, _ in rows}}
    shards = []
    for tar, kind in sorted(rows, key=lambda pair: (KINDS.index(pair[1]), pair[0])):
        index_file = f"{tar.removesuffix('.tar')}.{kind}.idx.npy"
        entries = np.array(rows[tar, kind], INDEX_DTYPE)
        try:
            digest = write_index(root / index_file, entries)
        except OSError as error:
            raise SourceError(f"{root / index_file} cannot be written: {error.strerror}") from None
        size = (root / tar).stat().st_size
        shards.append(Shard(tar, index_file, kind, len(entries), size, digests[tar], digest))
    return shards
