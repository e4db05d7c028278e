"""What every source must be before anything of it is written: names that can be stored, shown and told apart."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from sptnet_shards.source import UNKNOWN, Item, Source, SourceError

from sptnet.data.fields import name_fault


def check_source(source: Source) -> None:
    """Raise SourceError for names that a manifest cannot hold, and for images of a class that is not the source's."""
    if fault := name_fault(source.name):
        raise SourceError(f"the dataset's name {source.name!a} {fault}: give another one with --name")
    check_classes(source.name, source.classes)
    known = {*source.classes, *([UNKNOWN] if source.unknown else [])}
    for item in (*source.train, *source.test):
        if item.class_name not in known:
            raise SourceError(f"{item.where} is of class {item.class_name!r}, which training does not have")
        if not _is_utf8(item.where):
            raise SourceError(f"{item.where!a} has a name that is not UTF-8: rename it")
    for part, items in (("train", source.train), ("test", source.test)):
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


def _need_no_path_twice(part: str, items: Sequence[Item]) -> None:
    """A list that names an image twice in one part counts it twice, or says two things of it."""
    if len({item.where for item in items}) == len(items):
        return
    where, times = Counter(item.where for item in items).most_common(1)[0]
    classes = sorted({item.class_name for item in items if item.where == where})
    raise SourceError(
        f"{where} is listed {times} times for {part}, as {' and '.join(map(repr, classes))}: list it once"
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
