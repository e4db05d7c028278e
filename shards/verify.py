"""Check a dataset against its own manifest: digests, counts, indexes against the tars, and, if asked, every image."""

import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.source import SourceError
from shards.tar_members import IMAGE_MEMBERS, BoundedReads, plain_members
from shards.writer import file_sha256
from sptnet.data.image import DecodeError, decode
from sptnet.data.manifest import DatasetError, Manifest, Shard, parse_index, read_manifest

LONGEST_LABEL = 20  # digits of an int64


class Checked(NamedTuple):
    """One shard: the uids of its index, and what is wrong with it."""

    shard: Shard
    uids: NDArray[np.int64]
    problems: list[str]


def check_shard(root: Path, manifest: Manifest, decode_images: bool, number: int) -> Checked:
    """Check one shard of a dataset."""
    shard = manifest.shards[number]
    path = root / shard.file
    problems = []
    if (found := file_sha256(path)) != shard.sha256:
        problems.append(f"{path}: its sha256 is {found}, the manifest says {shard.sha256}")
    try:
        index = parse_index((root / shard.index).read_bytes(), shard, str(root / shard.index))
    except (OSError, DatasetError) as error:
        return Checked(shard, np.zeros(0, np.int64), [*problems, str(error)])
    limit = manifest.num_old if shard.kind == "labelled" else len(manifest.classes)
    if len(index) and not (index["target"].min() >= 0 and index["target"].max() < limit):
        problems.append(f"{root / shard.index}: a target is not one of the {limit} that {shard.kind} shards may have")
    problems += _against_tar(path, index)
    if decode_images:
        problems += _decoding(path, index)
    return Checked(shard, np.array(index["uid"]), problems)


def _against_tar(path: Path, index: NDArray[np.void]) -> list[str]:
    """Every entry must be a whole image member whose .cls, if the tar has one, is the target."""
    images: dict[tuple[int, int], str] = {}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            stream = BoundedReads(file)
            for member in plain_members(stream, str(path)):
                key, _, suffix = member.name.partition(".")
                if suffix.lower() in IMAGE_MEMBERS:
                    images[member.offset_data, member.size] = key
                elif suffix == "cls" and member.size <= LONGEST_LABEL:
                    label = os.pread(file.fileno(), member.size, member.offset_data)
                    labels[key] = int(label) if label.strip().isdigit() else -1
    except (OSError, tarfile.TarError) as error:
        return [f"{path} cannot be read as a tar: {error}"]
    problems = []
    for uid, target, offset, size in index.tolist():
        image = images.get((offset, size))
        if image is None:
            problems.append(f"{path}: no image lies where the index has sample {uid}")
        elif labels.get(image, target) != target:
            problems.append(f"{path}: sample {uid} has target {target} in the index and {labels[image]} in the tar")
    return problems


def _decoding(path: Path, index: NDArray[np.void]) -> list[str]:
    problems = []
    with open(path, "rb") as file:
        for uid, _, offset, size in index.tolist():
            try:
                decode(os.pread(file.fileno(), size, offset))
            except DecodeError as error:
                problems.append(f"{path}: sample {uid} does not decode: {error}")
    return problems


def verify(root: Path, decode_images: bool, workers: int) -> Iterator[Checked]:
    """Check shard after shard; the last thing yielded may be about uids that two shards share.

    Raises:
        DatasetError: no dataset, or files that are missing or of another size.
    """
    manifest = read_manifest(root)
    seen: dict[str, list[NDArray[np.int64]]] = {"train": [], "test": []}
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        check = partial(check_shard, root, manifest, decode_images)
        for checked in pool.map(check, range(len(manifest.shards))):
            seen["test" if checked.shard.kind == "test" else "train"].append(checked.uids)
            yield checked
    for part, uids in seen.items():
        found, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *uids]), return_counts=True)
        if (twice := found[counts > 1]).size:
            raise SourceError(f"{root}: {twice.size} {part} uids are in two shards, the first is {twice[0]}")
