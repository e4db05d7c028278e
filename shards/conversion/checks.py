"""What every source must be before anything of it is written: names that can be stored, shown and told apart."""

import unicodedata
from collections.abc import Iterable, Sequence

from sptnet_shards.items import UNKNOWN, Items
from sptnet_shards.source import Source, SourceError

from sptnet.data.format.fields import name_fault


def check_source(source: Source) -> None:
    """Raise SourceError for names that a manifest cannot hold, and for images of a class that is not the source's."""
    if fault := name_fault(source.name):
        raise SourceError(f"the dataset's name {source.name!a} {fault}: give another one with --name")
    check_classes(source.name, source.classes)
    known = {*source.classes, *([UNKNOWN] if source.unknown else [])}
    for part in ("train", "test"):
        items = source.part(part)
        if strange := next((name for name in items.counts() if name not in known), None):
            first = items.where(int(items.of_classes([strange])[0]))
            raise SourceError(f"{first} is of class {strange!r}, which training does not have")
        if (place := items.not_utf8()) is not None:
            raise SourceError(f"{items.where(place)!a} has a name that is not UTF-8: rename it")
        _need_no_path_twice(part, items)


def check_classes(where: str, classes: Sequence[str]) -> None:
    """Raise SourceError for class names that a manifest cannot hold, or that nobody could tell apart."""
    for name in classes:
        if fault := name_fault(name):
            raise SourceError(f"{where}: the class name {name!a} {fault}: rename the class")
    for one, other in _alike(classes):
        raise SourceError(f"{where} has the classes {one!a} and {other!a}, which look the same: rename one")


def near_duplicates(classes: Sequence[str]) -> list[str]:
    """A sentence for each two classes whose names differ in capitals or spaces only."""
    seen: dict[str, str] = {}
    told = []
    for name in classes:
        key = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        if key in seen:
            told.append(f"the classes {seen[key]!r} and {name!r} differ in capitals or spaces only: are they one?")
        seen.setdefault(key, name)
    return told


def _alike(classes: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Names that are one in Unicode's eyes, or one number: `1` and `01`."""
    seen: dict[str, str] = {}
    for name in classes:
        key = unicodedata.normalize("NFC", name)
        key = str(int(key)) if key.isdecimal() else key
        if key in seen:
            yield seen[key], name
        seen.setdefault(key, name)


def _need_no_path_twice(part: str, items: Items) -> None:
    """A list that names an image twice in one part counts it twice, or says two things of it."""
    places = items.twice()
    if not places:
        return
    classes = sorted({items[place].class_name for place in places})
    raise SourceError(
        f"{items.where(places[0])} is listed {len(places)} times for {part}, as "
        f"{' and '.join(map(repr, classes))}: list it once"
    )
