"""What several tasks that index the same tars must agree on, and how they find out."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError
from sptnet_shards.conversion.plan import Settings
from sptnet_shards.conversion.record import CONVERSION, LARGEST, Conversion, difference
from sptnet_shards.source import SourceError
from sptnet_shards.tars.places import Place

from sptnet.data.format.fields import is_file_name, name_fault
from sptnet.data.format.manifest import MANIFEST

AGAIN = f"remove {MANIFEST} and {CONVERSION} to index again"
_CONVERSION = TypeAdapter(Conversion)


@dataclass(frozen=True)
class Indexing:
    """What somebody asked for.

    Attributes:
        train, test: names of the tars for training and for testing.
        num_old: how many classes, the first by number or name, are old; None where training images lack labels.
        num_new: how many new classes there are then, if somebody said it.
        json_key: where a .json has the class.
    """

    train: list[str]
    test: list[str]
    num_old: int | None
    settings: Settings
    name: str
    json_key: str
    num_new: int | None = None

    def parts(self) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
        return ("train", sorted(self.train)), ("test", sorted(self.test))

    def tars(self) -> list[str]:
        return [tar for _, tars in self.parts() for tar in tars]

    def conversion(self, sizes: Mapping[str, int]) -> Conversion:
        """What all tasks must have in common; `sizes`: bytes of the tars."""
        options = {
            "--old": self.num_old, "--new": self.num_new, "--name": self.name, "--json-key": self.json_key,
            "--seed": self.settings.seed, "--labelled-fraction": self.settings.labelled_fraction,
        }  # fmt: skip
        listed = [[part, tar, sizes[tar]] for part, tars in self.parts() for tar in tars]
        fingerprint = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return Conversion("index", options, {}, fingerprint, {}, {"tars": len(listed)}, {}, [])


def check(place: Place, job: Indexing) -> None:
    """Raise SourceError for names that a manifest cannot have, and for tars that are in both parts."""
    if fault := name_fault(job.name):
        raise SourceError(f"the dataset's name {job.name!a} {fault}: give another one with --name")
    if not job.json_key.isprintable():
        raise SourceError(f"--json-key {job.json_key!a} has characters that cannot be printed")
    if strange := next((tar for tar in job.tars() if not is_file_name(f"{tar}.unlabelled.idx.npy")), None):
        raise SourceError(
            f"{place.where('')} has a tar with a name that a manifest cannot have, {strange!a}: rename it"
        )
    if both := sorted(set(job.train) & set(job.test)):
        raise SourceError(
            f"{place.where(both[0])} is for training and for testing: give --train and --test that tell them apart"
        )


def conversion_of(place: Place) -> Conversion | None:
    encoded = place.read(CONVERSION, LARGEST)
    try:
        return None if encoded is None else _CONVERSION.validate_json(encoded)
    except ValidationError:
        raise SourceError(f"{place.where(CONVERSION)} is damaged, or of another version: {AGAIN}") from None


def need_same(place: Place, job: Indexing, theirs: Conversion) -> None:
    sizes = place.sizes()
    ours = job.conversion({tar: sizes.get(tar, 0) for tar in job.tars()})
    if theirs.command != "index":
        raise SourceError(f"{place.where(CONVERSION)} is of a conversion by {theirs.command!r}: index other tars")
    if told := difference(theirs.options, ours.options):
        raise SourceError(f"{place.where('')} is indexed with other settings: {told}; {AGAIN}")
    if theirs.fingerprint != ours.fingerprint:
        raise SourceError(f"{place.where('')} was indexed with other tars, by name or size: {AGAIN}")


def claim(place: Place, job: Indexing) -> bool:
    """Say how the tars are indexed, or find that somebody did; returns whether it was us."""
    theirs = conversion_of(place)
    if theirs is None:
        sizes = place.sizes()
        ours = job.conversion({tar: sizes.get(tar, 0) for tar in job.tars()})
        if place.write_once(CONVERSION, (json.dumps(asdict(ours), indent=1, sort_keys=True) + "\n").encode()):
            return True
        theirs = conversion_of(place)
    if theirs is not None:
        need_same(place, job, theirs)
    return False
