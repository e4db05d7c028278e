"""Indexes and a manifest for WebDataset tars that others made; the tars stay as they are.

A tar of training samples usually holds labelled and unlabelled ones together, so it gets two indexes, one per kind.
"""

import os
from collections.abc import Sequence, Set
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic_core import from_json
from sptnet_shards.checks import check_classes, near_duplicates
from sptnet_shards.discover import of_unknown
from sptnet_shards.items import UNKNOWN, Item, Items
from sptnet_shards.plan import Settings
from sptnet_shards.progress import Scan
from sptnet_shards.protocol import labelled_positions
from sptnet_shards.source import Source, SourceError, need_classes
from sptnet_shards.tar_members import IMAGE_MEMBERS, OpenTar, TarError
from sptnet_shards.writer import write_index

from sptnet.data.fields import LONGEST_NAME, is_file_name, name_fault
from sptnet.data.files import LARGEST_IMAGE, file_sha256
from sptnet.data.manifest import KINDS, MANIFEST, Kind, Manifest, Shard, write_manifest
from sptnet.data.manifest import UNKNOWN as UNKNOWN_TARGET
from sptnet.data.shard_index import INDEX_DTYPE

LONGEST_LABEL = 2**20  # bytes of a .cls or .json
Rows = dict[tuple[str, Kind], list[tuple[int, int, int, int]]]


class Found(NamedTuple):
    """A sample in a tar: its class as the tar has it, and where its image lies (bytes)."""

    tar: str
    label: str
    offset: int
    size: int


class Indexed(NamedTuple):
    """The manifest, and sentences on what whoever indexed the tars should know."""

    manifest: Manifest
    remarks: list[str]


def split_member(name: str) -> tuple[str, str]:
    """Key and suffix of a member as WebDataset has them: folders belong to the key, dots in them too."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def label_of(text: bytes, suffix: str, json_key: str) -> str:
    """The class that a .cls or .json says; ValueError where it says none."""
    if suffix == "cls":
        return text.decode().strip()
    found = from_json(text)  # of bounded depth, unlike json's own; NaN stands beside the labels of some
    if not isinstance(found, dict) or json_key not in found:
        raise ValueError(f"it has no key {json_key!r}")
    value = found[json_key]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"its {json_key!r} is neither a text nor a whole number")
    return str(value)


def _samples(path: Path, json_key: str, scan: Scan, remarks: list[str]) -> list[Found]:
    """The samples of a tar, in its order; members that are neither image nor label are passed over."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, str]] = {}  # by key, then by suffix
    passed_over = []
    try:
        with closing(OpenTar(path)) as tar:
            for member in tar.members():
                scan.count()
                key, suffix = split_member(member.name)
                where = f"{path}: {member.name!r}"
                if suffix in IMAGE_MEMBERS:
                    if key in images:
                        raise SourceError(f"{path}: two images of the name {key!r}")
                    if not 0 < member.size <= LARGEST_IMAGE:
                        raise SourceError(f"{where} is {member.size:,} bytes long, no image is")
                    images[key] = (member.offset, member.size)
                elif suffix in ("cls", "json"):
                    if member.size > LONGEST_LABEL:
                        raise SourceError(f"{where} is {member.size:,} bytes long, no label is")
                    told = labels.setdefault(key, {})
                    if suffix in told:
                        raise SourceError(f"{path}: two labels of the name {key + '.' + suffix!r}")
                    told[suffix] = _label(tar.read(member), suffix, json_key, where) if "cls" not in told else ""
                elif suffix.rpartition(".")[2] in IMAGE_MEMBERS:
                    passed_over.append(member.name)
    except OSError as error:
        raise SourceError(f"{path} cannot be read as a tar: {error.strerror}") from None
    except TarError as error:
        raise SourceError(f"{path} cannot be read as a tar: {error}") from None
    if images and not labels:  # somebody left all of them out; one image without a label among others lost it
        return [Found(path.name, UNKNOWN, offset, size) for offset, size in images.values()]
    if lacking := next((key for key in images if key not in labels), None):
        raise SourceError(f"{path}: image {lacking!r} has neither .cls nor .json")
    if not images:
        remarks.append(f"{path} has no image ({', '.join(IMAGE_MEMBERS)})")
    if passed_over:
        remarks.append(f"{path}: {len(passed_over)} images of two suffixes are left out: the first is {passed_over[0]}")
    if alone := [key for key in labels if key not in images]:
        remarks.append(f"{path}: {len(alone)} labels have no image: the first is {alone[0]}")
    return [Found(path.name, _chosen(labels[key]), offset, size) for key, (offset, size) in images.items()]


def _chosen(told: dict[str, str]) -> str:
    return told["cls"] if "cls" in told else told["json"]


def _label(text: bytes, suffix: str, json_key: str, where: str) -> str:
    try:
        return label_of(text, suffix, json_key)
    except ValueError as error:
        raise SourceError(f"{where} holds no label ({type(error).__name__}: {error}); is --json-key right?") from None


def _class_order(labels: set[str]) -> list[str]:
    """By number where all labels are numbers, else by name."""
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)


def _check_tars(root: Path, train: Sequence[Path], test: Sequence[Path]) -> None:
    """Raise SourceError for tars that cannot be named in a manifest of this folder, or that are in both parts."""
    for path in (*train, *test):
        if path.resolve().parent != root.resolve():
            raise SourceError(f"{path} does not lie in {root}, where its index is to stand")
        if not is_file_name(f"{path.name}.unlabelled.idx.npy"):
            raise SourceError(f"{root} has a tar with a name that a manifest cannot have, {path.name!a}: rename it")
    if both := sorted({path.name for path in train} & {path.name for path in test}):
        raise SourceError(
            f"{root / both[0]} is for training and for testing: give --train and --test that tell them apart"
        )


def _digests(root: Path, tars: Sequence[str]) -> dict[str, str]:
    """sha256 of every tar; raises SourceError where two are the same."""
    found: dict[str, str] = {}
    for tar in tars:
        try:
            found[tar] = file_sha256(root / tar)
        except OSError as error:
            raise SourceError(f"{root / tar} cannot be read: {error.strerror}") from None
        if twin := next((other for other in found if other != tar and found[other] == found[tar]), None):
            raise SourceError(f"{root / tar} and {twin} are the same tar: remove one")
    return found


def index(
    root: Path,
    train: Sequence[Path],
    test: Sequence[Path],
    num_old: int | None,
    settings: Settings,
    name: str,
    json_key: str,
    num_new: int | None = None,
) -> Indexed:
    """Write indexes and a manifest beside tars.

    The uid of a sample is its position in the tars, taken by name; its class is what its .cls says, else the key
    `json_key` of its .json. The first `num_old` classes, by number or name, are old. Where tars for training have no
    label at all, nobody knows their images' classes: all other images for training are labelled, of old classes.

    Raises:
        SourceError: a tar outside of `root`, no tar or a hostile one, a tar in both parts, a sample without label, an
            impossible `num_old`, or one that is not needed, or not said.
    """
    if os.path.lexists(root / MANIFEST):
        raise SourceError(f"{root} has a {MANIFEST} already: remove it to index again")
    if fault := name_fault(name):
        raise SourceError(f"the dataset's name {name!a} {fault}: give another one with --name")
    if not json_key.isprintable():
        raise SourceError(f"--json-key {json_key!a} has characters that cannot be printed")
    _check_tars(root, train, test)
    scan, remarks = Scan("members of tars"), []  # type: tuple[Scan, list[str]]
    found = {
        part: [sample for path in sorted(tars) for sample in _samples(path, json_key, scan, remarks)]
        for part, tars in (("train", train), ("test", test))
    }
    source = _source(root, name, found, num_old, num_new)
    labelled = source.labelled
    if labelled is None:
        labelled = labelled_positions(source, settings.labelled_fraction, settings.seed)
    rows = _rows(found, source.classes, set(labelled.tolist()))
    protocol = {
        "seed": settings.seed,
        "labelled_fraction": settings.labelled_fraction,
        "source": {part: len(samples) for part, samples in found.items()},
        "json_key": json_key,
    }
    digests = _digests(root, sorted({tar for tar, _ in rows}))
    try:
        shards = _write(root, rows, digests)
        manifest = Manifest(
            name, source.classes, source.num_old, protocol, shards, num_new=source.num_new, unknown=source.unknown
        )
        write_manifest(root, manifest)
    except OSError as error:
        raise SourceError(f"{error.filename or root} cannot be written: {error.strerror}") from None
    return Indexed(manifest, [*remarks, *source.remarks, *near_duplicates(source.classes)])


def _source(root: Path, name: str, found: dict[str, list[Found]], num_old: int | None, num_new: int | None) -> Source:
    """Classes and images, checked; raises SourceError."""
    labels = {sample.label for sample in found["train"]} - {UNKNOWN}
    if not found["train"]:
        raise SourceError(f"{root} has no image in its tars for training ({', '.join(IMAGE_MEMBERS)})")
    if bare := next((sample.tar for sample in found["test"] if sample.label == UNKNOWN), None):
        raise SourceError(f"{root / bare} is for testing, and has no label at all: there is nothing to measure on")
    if long := next((label for label in labels if len(label) > LONGEST_NAME), None):
        raise SourceError(f"{root} has a label of {len(long)} characters, no class has: {long[:40]!a}...")
    train, test = (Items.of(Item(s.label, s.tar, s.size) for s in found[part]) for part in ("train", "test"))
    if UNKNOWN in train.counts():
        if num_old is not None:
            raise SourceError(f"{root} has tars without labels: all its classes are old, leave --old out")
        source = of_unknown(name, train, test, lambda where: b"", num_new)
        old, new = _class_order(labels), _class_order(set(source.classes) - labels)
        source = replace(source, classes=[*old, *new])
    elif num_old is None or num_new is not None:
        raise SourceError(f"{root} has labels in all its tars: say by --old which are old; --new is for tars without")
    else:
        classes = _class_order(labels)
        need_classes(root, classes, (sample.label for sample in found["test"]), num_old)
        source = Source(name, classes, num_old, train, test, lambda where: b"")
    check_classes(str(root), source.classes)
    return source


def _rows(found: dict[str, list[Found]], classes: list[str], labelled: Set[int]) -> Rows:
    rows: Rows = {}
    targets = {UNKNOWN: UNKNOWN_TARGET} | {label: target for target, label in enumerate(classes)}
    for part, samples in found.items():
        for uid, sample in enumerate(samples):
            kind: Kind = "test" if part == "test" else "labelled" if uid in labelled else "unlabelled"
            rows.setdefault((sample.tar, kind), []).append((uid, targets[sample.label], sample.offset, sample.size))
    return rows


def index_file(tar: str, kind: Kind) -> str:
    """`train-0.tar` -> `train-0.labelled.idx.npy`."""
    return f"{tar.removesuffix('.tar')}.{kind}.idx.npy"


def _write(root: Path, rows: Rows, digests: dict[str, str]) -> list[Shard]:
    shards = []
    for tar, kind in sorted(rows, key=lambda pair: (KINDS.index(pair[1]), pair[0])):
        path = root / index_file(tar, kind)
        entries = np.array(rows[tar, kind], INDEX_DTYPE)
        digest = write_index(path, entries)
        size = (root / tar).stat().st_size
        shards.append(Shard(tar, path.name, kind, len(entries), size, digests[tar], digest))
    return shards
