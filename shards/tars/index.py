"""Indexes and a manifest for WebDataset tars that others made; the tars stay as they are.

A tar of training samples usually holds labelled and unlabelled ones together, so it gets two indexes, one per kind.
Each of several tasks walks its share of the tars into a list of members; whoever finds all lists numbers the images.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sptnet_shards.conversion.checks import check_classes, near_duplicates
from sptnet_shards.conversion.finish import Converted, Unfinished, look
from sptnet_shards.conversion.record import CONVERSION, FOLDER, LARGEST, MEMBERS
from sptnet_shards.items import UNKNOWN, Items
from sptnet_shards.progress import Scan
from sptnet_shards.protocol import labelled_positions
from sptnet_shards.share import ALONE, Share
from sptnet_shards.source import Source, SourceError, need_classes
from sptnet_shards.sources.discover import of_unknown
from sptnet_shards.tar_members import IMAGE_MEMBERS
from sptnet_shards.tars.indexing import Indexing, check, claim, conversion_of, need_same
from sptnet_shards.tars.members import Members, members_of, parsed
from sptnet_shards.tars.places import Place

from sptnet.data.format.fields import LONGEST_NAME
from sptnet.data.format.manifest import KINDS, LARGEST_MANIFEST, MANIFEST, Kind, Manifest, Shard, Shards, parse_manifest
from sptnet.data.format.manifest import UNKNOWN as UNKNOWN_TARGET
from sptnet.data.format.shard_index import INDEX_DTYPE


class _GoneError(SourceError):
    """A list of members that was there is not any more."""


class _Summary(NamedTuple):
    """Of a list of members what is kept of all tars at once: 4 bytes an image."""

    size: int
    sha256: str
    class_names: list[str]
    classes: NDArray[np.int32]
    keyed: bool
    keyless: str
    remarks: list[str]


def index(place: Place, job: Indexing, share: Share = ALONE) -> Converted | Unfinished:
    """Walk a share of the tars; write indexes and a manifest beside them if all others are walked.

    The uid of a sample is its position in the tars, taken by name; its class is what its .cls says, else the key
    `json_key` of its .json. An image whose .json lacks that, or of a tar without labels, is unlabelled, and its class
    unknown: all others for training are labelled then, of old classes.

    Raises:
        SourceError: no tar or a hostile one, a tar in both parts, a sample that lost its label, an impossible
            `num_old`, or one that is not needed, or not said; or the folder is indexed otherwise.
    """
    check(place, job)
    if (complete := _complete(place, job)) is not None:
        return complete
    begun = claim(place, job)
    tars = job.tars()
    try:
        scan = Scan("members of tars")
        states = place.states()
        for tar in share.of(tars):
            there, state = _list(place, tar, job), states.get(tar, "")
            if there is None or not state or there.state != state:
                place.write(_list_name(tar), members_of(place, tar, job.json_key, scan)._replace(state=state).encoded())
        return _finished(place, job, 0.0)
    except SourceError:
        if begun and share.is_all():  # the next try may ask otherwise; what was read of tars stays, it takes the time
            place.remove([CONVERSION])
        raise


def finish_index(place: Place, job: Indexing, late: float) -> Converted | Unfinished:
    """Write indexes and manifest if all tars are walked, with `late` seconds for lists that are shown late."""
    check(place, job)
    if (complete := _complete(place, job)) is not None:
        return complete
    if conversion_of(place) is None:
        raise SourceError(f"{place.where(CONVERSION)} is not there: run the same command without --finish first")
    claim(place, job)
    return _finished(place, job, late)


def _complete(place: Place, job: Indexing) -> Converted | None:
    """The dataset that is there already, where it is what was asked for."""
    encoded = place.read(MANIFEST, LARGEST_MANIFEST)
    if encoded is None:
        return None
    theirs = conversion_of(place)
    if theirs is None:
        raise SourceError(f"{place.where('')} has a {MANIFEST} already: remove it to index again")
    need_same(place, job, theirs)
    _clean_up(place)
    return Converted(parse_manifest(encoded, place.where(MANIFEST)), [])


def _list_name(tar: str) -> str:
    return f"{FOLDER}/{tar}{MEMBERS}"


def _tar_of(name: str) -> str:
    """The tar that a file in the folder of lists is of."""
    return name.removesuffix(MEMBERS)


def _list(place: Place, tar: str, job: Indexing) -> Members | None:
    """What a task has listed of a tar; None where it was another that looked for labels elsewhere."""
    encoded = place.read(_list_name(tar), LARGEST)
    found = None if encoded is None else parsed(encoded)
    return found if found is not None and found.json_key == job.json_key else None


def _summary(place: Place, tar: str, job: Indexing) -> _Summary | None:
    found = _list(place, tar, job)
    if found is None:
        return None
    return _Summary(
        found.size, found.sha256, found.images.class_names, found.images.classes.copy(), found.keyed, found.keyless,
        found.remarks,
    )  # fmt: skip


def _finished(place: Place, job: Indexing, late: float) -> Converted | Unfinished:
    """Number the images, draw the labelled ones, write indexes and, last, the manifest."""
    tars = job.tars()
    found, missing = look(lambda tar: _summary(place, tar, job), lambda: map(_tar_of, place.listed()), tars, late)
    if missing:
        return _complete(place, job) or Unfinished(missing, len(tars))
    _need_key(place, job, list(found.values()))
    # those without images are all alike
    _need_apart(place, {tar: found[tar].sha256 for tar in sorted(tars) if len(found[tar].classes)})
    source = _source(place, job, found)
    labelled = source.labelled
    if labelled is None:
        labelled = labelled_positions(source, job.settings.labelled_fraction, job.settings.seed)
    protocol = {
        "seed": job.settings.seed,
        "labelled_fraction": job.settings.labelled_fraction,
        "source": {"train": len(source.train), "test": len(source.test)},
        "json_key": job.json_key,
    }
    try:
        shards = Shards.of(_write(place, job, source, labelled))
        manifest = Manifest(
            job.name, source.classes, source.num_old, protocol, shards, num_new=source.num_new, unknown=source.unknown
        )
        place.write(MANIFEST, b"".join(manifest.encoded()))
    except _GoneError:  # to another task, which has finished meanwhile
        if (complete := _complete(place, job)) is not None:
            return complete
        raise
    except OSError as error:
        raise SourceError(f"{error.filename or place.where('')} cannot be written: {error.strerror}") from None
    _clean_up(place)
    told = [remark for tar in tars for remark in found[tar].remarks]
    return Converted(manifest, [*told, *source.remarks, *near_duplicates(source.classes)])


def _clean_up(place: Place) -> None:
    place.remove([f"{FOLDER}/{name}" for name in place.listed() if name.endswith(f".tar{MEMBERS}")])


def _need_key(place: Place, job: Indexing, found: Sequence[_Summary]) -> None:
    """A .json without the key is of an unlabelled image; where all of them lack it, it is not their key."""
    keyless = next((summary.keyless for summary in found if summary.keyless), "")
    if keyless and not any(summary.keyed for summary in found):
        raise SourceError(
            f"{keyless} holds no label, nor does any other .json (no key {job.json_key!r}); is --json-key right?"
        )


def _need_apart(place: Place, digests: Mapping[str, str]) -> None:
    """Raise SourceError where two tars are the same."""
    seen: dict[str, str] = {}
    for tar, digest in digests.items():
        if digest in seen:
            raise SourceError(f"{place.where(tar)} and {seen[digest]} are the same tar: remove one")
        seen[digest] = tar


def _class_order(labels: set[str]) -> list[str]:
    """By number where all labels are numbers, else by name."""
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)


def _images(found: Sequence[_Summary]) -> Items:
    """The images of tars, one behind the other, by their classes alone."""
    names: dict[str, int] = {}
    classes = [
        np.array([names.setdefault(name, len(names)) for name in summary.class_names], np.int32)[summary.classes]
        for summary in found
        if len(summary.classes)
    ]
    together = np.concatenate([np.zeros(0, np.int32), *classes])
    nothing = np.broadcast_to(np.int64(0), len(together))
    return Items(list(names), together, nothing, nothing, b"")


def _source(place: Place, job: Indexing, found: Mapping[str, _Summary]) -> Source:
    """Classes and images, checked; raises SourceError."""
    root = place.where("").rstrip("/")
    train, test = (_images([found[tar] for tar in tars]) for _, tars in job.parts())
    if not train:
        raise SourceError(f"{root} has no image in its tars for training ({', '.join(IMAGE_MEMBERS)})")
    if UNKNOWN in test.counts():
        bare = next(tar for tar in sorted(job.test) if UNKNOWN in found[tar].class_names)
        raise SourceError(
            f"{place.where(bare)} is for testing, and has images without a label: there is nothing to measure on"
        )
    labels = train.counts().keys() - {UNKNOWN}
    if long := next((label for label in labels if len(label) > LONGEST_NAME), None):
        raise SourceError(f"{root} has a label of {len(long)} characters, no class has: {long[:40]!a}...")
    if UNKNOWN in train.counts():
        if job.num_old is not None:
            raise SourceError(f"{root} has images without labels: all its classes are old, leave --old out")
        source = of_unknown(job.name, train, test, lambda where: b"", job.num_new)
        old, new = _class_order(labels), _class_order(set(source.classes) - labels)
        source = replace(source, classes=[*old, *new])
    elif job.num_old is None or job.num_new is not None:
        raise SourceError(f"{root} has labels in all its tars: say by --old which are old; --new is for tars without")
    else:
        classes = _class_order(labels)
        need_classes(root, classes, test.counts(), job.num_old)
        source = Source(job.name, classes, job.num_old, train, test, lambda where: b"")
    check_classes(root, source.classes)
    return source


def index_file(tar: str, kind: Kind) -> str:
    """`train-0.tar` -> `train-0.labelled.idx.npy`."""
    return f"{tar.removesuffix('.tar')}.{kind}.idx.npy"


def _write(place: Place, job: Indexing, source: Source, labelled: NDArray[np.int64]) -> list[Shard]:
    """The indexes of all tars, written one after the other."""
    targets = {UNKNOWN: UNKNOWN_TARGET} | {label: target for target, label in enumerate(source.classes)}
    is_labelled = np.zeros(len(source.train), bool)
    is_labelled[labelled] = True
    shards = []
    for part, tars in job.parts():
        first = 0
        for tar in tars:
            found = _list(place, tar, job)
            if found is None:
                raise _GoneError(f"{place.where(_list_name(tar))} is gone: run the same command again")
            count = len(found.images)
            entries = np.empty(count, INDEX_DTYPE)
            entries["uid"], entries["target"] = np.arange(first, first + count), found.images.targets(targets)
            entries["offset"], entries["size"] = found.offsets, found.images.sizes
            chosen = is_labelled[first : first + count]
            kinds: dict[Kind, NDArray[np.bool_]] = (
                {"test": np.ones(count, bool)} if part == "test" else {"labelled": chosen, "unlabelled": ~chosen}
            )
            shards += [
                _write_index(place, tar, kind, entries[mask], found) for kind, mask in kinds.items() if mask.any()
            ]
            first += count
    return sorted(shards, key=lambda shard: (KINDS.index(shard.kind), shard.file))


def _write_index(place: Place, tar: str, kind: Kind, entries: NDArray[np.void], found: Members) -> Shard:
    encoded = io.BytesIO()
    np.lib.format.write_array(encoded, entries, allow_pickle=False)
    content = encoded.getvalue()
    place.write(index_file(tar, kind), content)
    digest = hashlib.sha256(content).hexdigest()
    return Shard(tar, index_file(tar, kind), kind, len(entries), found.size, found.sha256, digest)
