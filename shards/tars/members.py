"""What is in a tar that somebody else made: its images with their labels, found in one pass over it.

Written down beside the tars as `conversion/X.tar.members`, a line of JSON and columns, so that several tasks share the
reading and one of them numbers the images.
"""

import json
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from sptnet_shards.items import UNKNOWN, Columns, Item, Items
from sptnet_shards.progress import Scan
from sptnet_shards.source import SourceError
from sptnet_shards.tar_members import IMAGE_MEMBERS, Member, StreamedTar, TarError
from sptnet_shards.tars.places import Place

from sptnet.data.format.fields import Count, Digest
from sptnet.data.format.files import LARGEST_IMAGE

LONGEST_LABEL = 2**20  # bytes of a .cls or .json
COLUMNS = (("classes", "<i4"), ("sizes", "<i8"), ("ends", "<i8"))


class _Head(BaseModel):
    """The first line of what `Members.encoded` writes."""

    model_config = ConfigDict(strict=True)

    size: Count
    sha256: Digest
    keyed: bool
    keyless: str
    json_key: str
    state: str
    remarks: list[str]
    class_names: list[str]
    images: Count


class Members(NamedTuple):
    """A tar's images, in its order.

    Attributes:
        size, sha256: of the tar, bytes and digest.
        images: class, key and size; UNKNOWN where nothing says a class.
        offsets: int64 [images], bytes.
        keyed: whether a .json has the key of the class; keyless: the name of the first that lacks it, or "".
        remarks: sentences on what is odd.
        json_key: where a .json was asked for its class.
        state: of the tar, as `Place.states` tells it, when it was read.
    """

    size: int
    sha256: str
    images: Items
    offsets: NDArray[np.int64]
    keyed: bool
    keyless: str
    remarks: list[str]
    json_key: str
    state: str = ""

    def encoded(self) -> bytes:
        """As `parsed` reads it."""
        head = {
            "size": self.size, "sha256": self.sha256, "keyed": self.keyed, "keyless": self.keyless,
            "json_key": self.json_key, "state": self.state, "remarks": self.remarks,
            "class_names": self.images.class_names, "images": len(self.images),
        }  # fmt: skip
        columns = [getattr(self.images, name).astype(dtype).tobytes() for name, dtype in COLUMNS]
        offsets = self.offsets.astype("<i8").tobytes()
        return b"".join([json.dumps(head).encode(), b"\n", *columns, offsets, self.images.names])


def parsed(encoded: bytes) -> Members | None:
    """What `Members.encoded` wrote; None of anything else."""
    try:
        line, _, rest = encoded.partition(b"\n")
        head = _Head.model_validate_json(line)
        count, at, columns = head.images, 0, []
        for dtype in (*(dtype for _, dtype in COLUMNS), "<i8"):
            columns.append(np.frombuffer(rest, dtype, count, at))
            at += columns[-1].nbytes
        classes, sizes, ends, offsets = columns
        images = Items(head.class_names, classes, sizes, ends, rest[at:])
        if not images.is_sound():
            return None
        return Members(
            head.size, head.sha256, images, offsets, head.keyed, head.keyless, head.remarks, head.json_key, head.state
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
        return None


def split_member(name: str) -> tuple[str, str]:
    """Key and suffix of a member as WebDataset has them: folders belong to the key, dots in them too."""
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def label_of(text: bytes, suffix: str, json_key: str) -> str | None:
    """The class that a .cls or .json says; None where it is empty, or a .json lacks the key, or has null for it.

    Raises:
        ValueError: it says something that is no class.
    """
    if suffix == "cls":
        return _no_minus_one(text.decode().strip()) or None
    found = from_json(text)  # of bounded depth, unlike json's own; NaN stands beside the labels of some
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    value = found.get(json_key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"its {json_key!r} is neither a text nor a whole number")
    return _no_minus_one(str(value))


def _no_minus_one(label: str) -> str:
    """Raises ValueError for what others write, and we in an index, where nobody knows the class."""
    if label == "-1":
        raise ValueError("-1 is no class: leave it empty, or null, where nobody knows it")
    return label


def members_of(place: Place, tar: str, json_key: str, scan: Scan) -> Members:
    """The images of a tar; members that are neither image nor label are passed over.

    Raises:
        SourceError: no tar or a hostile one, an image or a label that is there twice, an image that lost its label.
    """
    where = place.where(tar)
    try:
        with place.tar(tar) as stream:
            walk = _Walk(where, json_key)
            for member in stream.members():
                scan.count()
                walk.add(member, stream)
            return walk.done(stream.size, stream.sha256())
    except OSError as error:
        raise SourceError(f"{where} cannot be read as a tar: {error.strerror}") from None
    except TarError as error:
        raise SourceError(f"{where} cannot be read as a tar: {error}") from None


class _Walk:
    """What was met so far. images: offset and size by key; labels: by key, then by suffix."""

    def __init__(self, where: str, json_key: str):
        self.where, self.json_key = where, json_key
        self.images: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, dict[str, str | None]] = {}
        self.passed_over: list[str] = []
        self.keyed, self.keyless = False, ""

    def add(self, member: Member, stream: StreamedTar) -> None:
        key, suffix = split_member(member.name)
        where = f"{self.where}: {member.name!r}"
        if suffix in IMAGE_MEMBERS:
            if key in self.images:
                raise SourceError(f"{self.where}: two images of the name {key!r}")
            if not 0 < member.size <= LARGEST_IMAGE:
                raise SourceError(f"{where} is {member.size:,} bytes long, no image is")
            self.images[key] = (member.offset, member.size)
        elif suffix in ("cls", "json"):
            if member.size > LONGEST_LABEL:
                raise SourceError(f"{where} is {member.size:,} bytes long, no label is")
            told = self.labels.setdefault(key, {})
            if suffix in told:
                raise SourceError(f"{self.where}: two labels of the name {key + '.' + suffix!r}")
            told[suffix] = self._label(stream.read(member), suffix, where) if "cls" not in told else None
        elif suffix.rpartition(".")[2] in IMAGE_MEMBERS:
            self.passed_over.append(member.name)

    def _label(self, text: bytes, suffix: str, where: str) -> str | None:
        try:
            label = label_of(text, suffix, self.json_key)
        except ValueError as error:
            told = f"({type(error).__name__}: {error})"
            raise SourceError(f"{where} holds no label {told}; is --json-key right?") from None
        if suffix == "json":
            self.keyed = self.keyed or label is not None
            self.keyless = self.keyless or ("" if label is not None else where)
        return label

    def done(self, size: int, sha256: str) -> Members:
        columns, remarks = Columns(), []
        # somebody left all labels out; one image without a label among others lost it
        if self.labels and (lacking := next((key for key in self.images if key not in self.labels), None)):
            raise SourceError(f"{self.where}: image {lacking!r} has neither .cls nor .json")
        for key, (_, length) in self.images.items():
            told = self.labels.get(key, {})
            columns.add(Item((told["cls"] if "cls" in told else told.get("json")) or UNKNOWN, key, length))
        if not self.images:
            remarks.append(f"{self.where} has no image ({', '.join(IMAGE_MEMBERS)})")
        if self.passed_over:
            remarks.append(
                f"{self.where}: {len(self.passed_over)} images of two suffixes are left out: the first is "
                f"{self.passed_over[0]}"
            )
        if alone := [key for key in self.labels if key not in self.images]:
            remarks.append(f"{self.where}: {len(alone)} labels have no image: the first is {alone[0]}")
        offsets = np.array([offset for offset, _ in self.images.values()], np.int64)
        return Members(size, sha256, columns.items(), offsets, self.keyed, self.keyless, remarks, self.json_key)
