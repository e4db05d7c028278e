"""Check a dataset against its own manifest: digests, counts, indexes against the tars, and, if asked, every image."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.share import ALONE, Share
from sptnet_shards.source import SourceError
from sptnet_shards.tar_members import IMAGE_MEMBERS, OpenTar, TarError
from sptnet_shards.tars.index import index_file
from sptnet_shards.tars.members import LONGEST_LABEL, label_of, split_member
from sptnet_shards.workers import run_all

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.files import file_sha256, open_regular, read_regular
from sptnet.data.format.manifest import KINDS, UNKNOWN, Manifest, Shard, read_manifest
from sptnet.data.format.paths import largest_paths, parse_paths
from sptnet.data.format.shard_index import read_index
from sptnet.data.image import DecodeError, decode

TOLD = 10  # faults of one kind and shard that are told one by one


class Checked(NamedTuple):
    """One shard: the uids of its index, and what is wrong with it."""

    shard: Shard
    uids: NDArray[np.int64]
    problems: list[str]


class _Content(NamedTuple):
    """What a tar holds, by what its headers say. images: key by offset and size, in the tar's order."""

    images: dict[tuple[int, int], str]
    labels: dict[str, str]


def check_shard(root: Path, manifest: Manifest, decode_images: bool, number: int) -> Checked:
    """Check one shard of a dataset."""
    shard = manifest.shards[number]
    path = root / shard.file
    none = np.zeros(0, np.int64)
    try:
        digest = file_sha256(path)
    except OSError as error:
        return Checked(shard, none, [f"{path} cannot be read: {error.strerror}"])
    problems = [] if digest == shard.sha256 else [f"{path}: its sha256 is {digest}, the manifest says {shard.sha256}"]
    try:
        index = read_index(root, manifest, shard)
    except DatasetError as error:
        return Checked(shard, none, [*problems, str(error)])
    problems += _against_tar(path, index, shard, manifest)
    if shard.paths is not None:
        try:
            parse_paths(read_regular(root / shard.paths, largest_paths(shard)), shard, str(root / shard.paths))
        except OSError as error:
            problems.append(f"{root / shard.paths} cannot be read: {error.strerror}")
        except DatasetError as error:
            problems.append(str(error))
    if decode_images:
        problems += _decoding(path, index)
    return Checked(shard, np.array(index["uid"]), problems)


def is_indexed(shard: Shard) -> bool:
    """Whether the tar is somebody else's and the index was made beside it: its keys and labels are not ours."""
    return shard.index == index_file(shard.file, shard.kind)


def _against_tar(path: Path, index: NDArray[np.void], shard: Shard, manifest: Manifest) -> list[str]:
    """Every entry must be a whole image member with the uid and target that its key and its label say."""
    json_key = manifest.protocol.get("json_key", "label")
    try:
        content = _content(path, json_key if isinstance(json_key, str) else "label")
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    except (TarError, ValueError) as error:
        return [f"{path} cannot be read as a tar: {error}"]
    if is_indexed(shard):
        problems = list(_against_others(path, index, content, manifest.classes))
    else:
        problems = list(_against_ours(path, index, content))
        if len(content.images) != len(index):
            problems.append(f"{path} has {len(content.images)} images, its index {len(index)}")
    more = len(problems) - TOLD
    return [*problems[:TOLD], f"{path}: {more} more faults like these"] if more > 0 else problems


def _content(path: Path, json_key: str) -> _Content:
    images: dict[tuple[int, int], str] = {}
    labels: dict[str, str] = {}
    with closing(OpenTar(path)) as tar:
        for member in tar.members():
            key, suffix = split_member(member.name)
            if suffix in IMAGE_MEMBERS:
                images[member.offset, member.size] = key
            elif (suffix == "cls" or (suffix == "json" and key not in labels)) and member.size <= LONGEST_LABEL:
                try:
                    label = label_of(tar.read(member), suffix, json_key)
                except ValueError as error:
                    label = f"what is no label ({error})"
                if label is not None:
                    labels[key] = label
    return _Content(images, labels)


def _against_ours(path: Path, index: NDArray[np.void], content: _Content) -> Iterator[str]:
    """Members are named by their uid, and .cls is the target."""
    for uid, target, offset, size in index.tolist():
        key = content.images.get((offset, size))
        if key is None:
            yield f"{path}: no image lies where the index has sample {uid}"
        elif key.isdecimal() and int(key) != uid:
            yield f"{path}: image {key} lies where the index has sample {uid}"
        elif (label := content.labels.get(key, str(target))) != str(target):
            yield f"{path}: sample {uid} has target {target} in the index and {label} in the tar"


def _against_others(path: Path, index: NDArray[np.void], content: _Content, classes: list[str]) -> Iterator[str]:
    """Uids follow each other as the images do, and the label is the name of the target's class."""
    order = {place: position for position, place in enumerate(content.images)}
    first: int | None = None  # uid of the tar's first image
    for uid, target, offset, size in index.tolist():
        key = content.images.get((offset, size))
        if key is None:
            yield f"{path}: no image lies where the index has sample {uid}"
            continue
        begin = uid - order[offset, size]
        first = begin if first is None else first
        if begin != first:
            yield f"{path}: image {key} lies where the index has sample {uid}"
        elif target == UNKNOWN:
            if key in content.labels:
                yield f"{path}: sample {uid} is unknown in the index, and {content.labels[key]} in the tar"
        elif (label := content.labels.get(key, classes[target])) != classes[target]:
            yield f"{path}: sample {uid} has target {target} in the index, {classes[target]}, and {label} in the tar"


def _decoding(path: Path, index: NDArray[np.void]) -> list[str]:
    problems = []
    try:
        descriptor = open_regular(path)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    try:
        for uid, _, offset, size in index.tolist():
            try:
                decode(os.pread(descriptor, size, offset))
            except (DecodeError, OSError) as error:
                problems.append(f"{path}: sample {uid} does not decode: {error}")
    finally:
        os.close(descriptor)
    return problems


def verify(root: Path, decode_images: bool, workers: int, share: Share = ALONE) -> Iterator[Checked]:
    """Check a share of the shards, one after the other; with all of them, what they have in common comes last.

    Raises:
        DatasetError: no dataset, or files that are missing or of another size.
        SourceError: uids in two shards or missing ones, a part without samples, a tar for training and testing.
    """
    manifest = read_manifest(root)
    seen = _Seen(root, manifest)
    faulty = False
    job, numbers = (root, manifest, decode_images), share.of(range(len(manifest.shards)))
    for checked in run_all(check_shard, job, numbers, workers):
        if share.is_all():
            seen.add(checked.shard, checked.uids)
        faulty = faulty or bool(checked.problems)
        yield checked
    if share.is_all():
        _check_parts(root, manifest)
        seen.check(faulty)


def verify_across(root: Path) -> None:
    """Check what goes across shards, from their indexes alone; raises as `verify` does, and for a damaged index."""
    manifest = read_manifest(root)
    seen = _Seen(root, manifest)
    for shard in manifest.shards:
        seen.add(shard, read_index(root, manifest, shard)["uid"])
    _check_parts(root, manifest)
    seen.check(faulty=False)


def _check_parts(root: Path, manifest: Manifest) -> None:
    for kind in KINDS[:2]:  # a dataset without a test part is one
        if not manifest.samples(kind):
            raise SourceError(f"{root} has no {kind} samples: make the shards again")
    tested = {digest for shard in manifest.of_kind("test") for digest in (shard.file, shard.sha256)}
    for shard in manifest.shards:
        if shard.kind != "test" and (shard.file in tested or shard.sha256 in tested):
            raise SourceError(f"{root / shard.file} is for training and for testing: make the shards again")


class _Seen:
    """The uids that were met in both parts: a bit for each where the manifest says how many images there were."""

    def __init__(self, root: Path, manifest: Manifest):
        self._root = root
        source = manifest.protocol.get("source", {})
        self._bits: dict[str, NDArray[np.uint8]] = {}
        self._counts: dict[str, int] = {}
        self._others: dict[str, list[NDArray[np.int64]]] = {"train": [], "test": []}
        for part in self._others:
            left_out = np.array([skipped["uid"] for skipped in manifest.skipped if skipped["part"] == part], np.int64)
            # a manifest may claim any number; of what it has not, nothing is kept
            there = sum(manifest.samples(kind) for kind in KINDS if (kind == "test") == (part == "test"))
            if part in source and source[part] == there + len(left_out):
                self._counts[part] = source[part]
                self._bits[part] = np.zeros(-(-source[part] // 8), np.uint8)
                self._mark(part, left_out)

    def add(self, shard: Shard, uids: NDArray[np.int64]) -> None:
        """Note the uids of a shard; raises SourceError where another one has one of them."""
        part = "test" if shard.kind == "test" else "train"
        uids = np.unique(uids)
        if part in self._bits and (not len(uids) or uids[-1] < self._counts[part]):
            self._mark(part, uids)
        else:
            self._others[part].append(uids)

    def _mark(self, part: str, uids: NDArray[np.int64]) -> None:
        bits, place, bit = self._bits[part], uids >> 3, np.left_shift(1, uids & 7).astype(np.uint8)
        inside = place < len(bits)
        place, bit = place[inside], bit[inside]
        if (twice := uids[inside][(bits[place] & bit) != 0]).size:
            self._twice(part, twice)
        np.bitwise_or.at(bits, place, bit)

    def _twice(self, part: str, uids: NDArray[np.int64]) -> NoReturn:
        raise SourceError(f"{self._root}: {uids.size} {part} uids are in two shards, the first is {uids[0]}")

    def check(self, faulty: bool) -> None:
        """No uid twice, and, where the manifest says how many images the source had, each there or left out."""
        for part, others in self._others.items():
            found, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *others]), return_counts=True)
            if (twice := found[counts > 1]).size:
                self._twice(part, twice)
            if faulty or part not in self._bits:
                continue
            there = int(np.unpackbits(self._bits[part]).sum(dtype=np.int64)) if self._counts[part] else 0
            if found.size or there != self._counts[part]:
                raise SourceError(
                    f"{self._root}: the {part} uids are not those of a source of {self._counts[part]} images, 0 to the "
                    "last"
                )
