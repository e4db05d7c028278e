"""Deal a source's samples to shards and write them; the same source gives the same bytes."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from webdataset import TarWriter

from shards.protocol import labelled_positions
from shards.source import Item, Source, SourceError
from sptnet.data.keyed import DEAL, permutation
from sptnet.data.manifest import INDEX_DTYPE, KINDS, MANIFEST, Kind, Manifest, Shard, index_path, write_manifest

SHARD_BYTES = 256 * 2**20
TRAIN_SHARDS = 16  # at least, so that small datasets can be streamed and shuffled too
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
PREFIX: dict[Kind, str] = {"labelled": "train-labelled", "unlabelled": "train-unlabelled", "test": "test"}


class Planned(NamedTuple):
    """A shard that is to be written: its file name, kind, and (uid, item) of its samples in order."""

    file: str
    kind: Kind
    samples: list[tuple[int, Item]]


def plan(source: Source, fraction: float, seed: int, shard_bytes: int = SHARD_BYTES) -> list[Planned]:
    """Deal the samples of every kind to shards of about equal counts, in a seeded random order."""
    labelled = labelled_positions(source, fraction, seed)
    train = list(enumerate(source.train))
    members: dict[Kind, list[tuple[int, Item]]] = {
        "labelled": [pair for pair in train if pair[0] in labelled],
        "unlabelled": [pair for pair in train if pair[0] not in labelled],
        "test": list(enumerate(source.test)),
    }
    planned = []
    for kind in KINDS:
        samples = members[kind]
        if not samples:
            continue
        by_size = -(-sum(item.bytes for _, item in samples) // shard_bytes)
        count = min(len(samples), by_size if kind == "test" else max(TRAIN_SHARDS, by_size))
        order = permutation(seed, DEAL, KINDS.index(kind), 0, 0, len(samples))
        for number, part in enumerate(np.array_split(order, count)):
            planned.append(Planned(f"{PREFIX[kind]}-{number:06d}.tar", kind, [samples[i] for i in part]))
    return planned


def extension(encoded: bytes, where: str) -> str:
    """The file type by content, not by name.

    Raises:
        SourceError: no JPEG, PNG or WebP, or one whose header cannot be read.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            found = FORMATS.get(image.format or "")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise SourceError(f"{where} is no image: {error}") from None
    if found is None:
        raise SourceError(f"{where} is neither JPEG nor PNG nor WebP")
    return found


def write_shard(out: Path, planned: Planned, source: Source) -> Shard:
    """Write one tar and its index, each under a temporary name first.

    Raises:
        SourceError: an image that cannot be read, or a disk that is full.
    """
    targets = {name: target for target, name in enumerate(source.classes)}
    path = out / planned.file
    temporary, temporary_index = out / (planned.file + ".tmp"), out / (planned.file + ".idx.tmp")
    try:
        with open(temporary, "wb") as stream:
            # a fixed time and owner: the bytes depend on the images alone
            with TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
                for uid, item in planned.samples:
                    encoded = source.read(item.where)
                    target = str(targets[item.class_name]).encode()
                    tar.write({"__key__": f"{uid:09d}", extension(encoded, item.where): encoded, "cls": target})
            stream.flush()
            os.fsync(stream.fileno())
        index = index_of(temporary)
        with open(temporary_index, "wb") as stream:
            np.save(stream, index, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        digests = [_sha256(temporary), _sha256(temporary_index)]
        temporary_index.replace(index_path(path))
        temporary.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
        temporary_index.unlink(missing_ok=True)
    return Shard(planned.file, planned.kind, len(index), path.stat().st_size, digests[0], digests[1])


def index_of(path: Path) -> np.ndarray:
    """Index a tar of (<uid>.cls, <uid>.<image>) pairs by reading its headers and labels."""
    targets: dict[str, int] = {}
    images: dict[str, tuple[int, int]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            if kind == "cls":
                label = tar.extractfile(member)
                assert label is not None
                targets[key] = int(label.read())
            else:
                images[key] = (member.offset_data, member.size)
    rows = [(int(key), targets[key], offset, size) for key, (offset, size) in images.items()]
    return np.array(rows, dtype=INDEX_DTYPE)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def convert(
    source: Source, out: Path, fraction: float, seed: int, progress: Callable[[list[Planned]], Iterator[Planned]]
) -> Manifest:
    """Write the whole dataset; the manifest comes last, so that a folder with one is complete.

    Raises:
        SourceError: `out` holds a dataset already, or an image cannot be read.
    """
    if (out / MANIFEST).exists():
        raise SourceError(f"{out} holds a dataset already: remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    shards = [write_shard(out, planned, source) for planned in progress(plan(source, fraction, seed))]
    protocol = {"seed": seed, "labelled_fraction": fraction, **source.protocol}
    manifest = Manifest(source.name, source.classes, source.num_old, protocol, shards)
    write_manifest(out, manifest)
    return manifest
