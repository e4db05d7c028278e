"""Lists of images as columns: an image costs 20 bytes beside its path, and is made when it is asked for.

Ten million images as Python objects are four gigabytes; as columns they are a fraction of one, and worker processes
that are forked share them.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

UNKNOWN = ""  # in the place of a class's name
# text that is no UTF-8, such as names of files may be, comes through as it is
ERRORS = "surrogatepass"
SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
PART = 2**16  # images that are gone through at once


class Item(NamedTuple):
    """One image. `where` is whatever the source's `read` understands; bytes: its size.

    `class_name` is UNKNOWN where nobody knows it; such an image is unlabelled.
    """

    class_name: str
    where: str
    bytes: int


class Items(Sequence[Item]):
    """Images in an order.

    Attributes:
        class_names: those that images may have, each once.
        classes: int32 [images], places in `class_names`.
        sizes: int64 [images], bytes.
        ends: int64 [images], where in `names` each image's `where` ends; it begins where the one before ends.
        names: every `where`, one behind the other.
    """

    def __init__(
        self,
        class_names: list[str],
        classes: NDArray[np.int32],
        sizes: NDArray[np.int64],
        ends: NDArray[np.int64],
        names: bytes | bytearray | memoryview,
    ):
        self.class_names, self.classes, self.sizes, self.ends = class_names, classes, sizes, ends
        self.names = memoryview(names)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Items":
        """The columns of images that come one by one."""
        if isinstance(items, Items):
            return items
        columns = Columns()
        for item in items:
            columns.add(item)
        return columns.items()

    def __len__(self) -> int:
        return len(self.classes)

    def is_sound(self) -> bool:
        """Whether columns can be what is said of them; those of a file that was made to harm are not."""
        if not len(self):
            return not len(self.names)
        ends = self.ends
        ends_fit = ends[0] >= 0 and ends[-1] == len(self.names) and (ends[1:] >= ends[:-1]).all()
        return bool(ends_fit and self.sizes.min() >= 0 and are_places(self.classes, len(self.class_names)))

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return Item(self.class_names[self.classes[place]], self.where(place), int(self.sizes[place]))

    def __iter__(self) -> Iterator[Item]:
        for place, (begin, end) in enumerate(self._spans()):
            where = str(self.names[begin:end], "utf-8", ERRORS)
            yield Item(self.class_names[self.classes[place]], where, int(self.sizes[place]))

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Where each image's `where` begins and ends; in parts: NumPy's numbers are slow, Python's are large."""
        begin = 0
        for first in range(0, len(self), PART):
            for end in self.ends[first : first + PART].tolist():
                yield begin, end
                begin = end

    def name(self, place: int) -> memoryview:
        """The `where` of an image, encoded."""
        return self.names[0 if place == 0 else self.ends[place - 1] : self.ends[place]]

    def where(self, place: int) -> str:
        return str(self.name(place), "utf-8", ERRORS)

    def counts(self) -> dict[str, int]:
        """How many images there are of every class that has one."""
        counted = np.bincount(self.classes, minlength=len(self.class_names)).tolist()
        return {name: count for name, count in zip(self.class_names, counted, strict=True) if count}

    def targets(self, numbers: Mapping[str, int]) -> NDArray[np.int64]:
        """What a mapping says of every image's class, [images]."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.array([numbers[name] for name in self.class_names], np.int64)[self.classes]

    def of_classes(self, chosen: Iterable[str]) -> NDArray[np.int64]:
        """Positions of the images of some classes, ascending."""
        wanted = set(chosen)
        return np.flatnonzero(self.targets({name: name in wanted for name in self.class_names}))

    def twice(self) -> list[int]:
        """The places of a `where` that is there more than once; none where all differ."""
        # Python's own hash: compared in this process only
        hashes = np.fromiter((hash(bytes(self.names[begin:end])) for begin, end in self._spans()), np.int64, len(self))
        ordered = np.sort(hashes)
        for value in np.unique(ordered[1:][ordered[1:] == ordered[:-1]]):
            alike: dict[bytes, list[int]] = {}
            for place in np.flatnonzero(hashes == value).tolist():
                alike.setdefault(bytes(self.name(place)), []).append(place)
            if found := next((places for places in alike.values() if len(places) > 1), None):
                return found
        return []

    def not_utf8(self) -> int | None:
        """The place of a `where` that is no UTF-8, such as a name of a file may be, or None."""
        found = SURROGATE.search(self.names)
        return None if found is None else int(np.searchsorted(self.ends, found.start(), side="right"))


class Columns:
    """Items that are being listed."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._classes, self._sizes, self._ends, self._names = array("i"), array("q"), array("q"), bytearray()

    def add(self, item: Item) -> None:
        self._classes.append(self._numbers.setdefault(item[0], len(self._numbers)))
        self._sizes.append(item[2])
        self._names += item[1].encode(errors=ERRORS)
        self._ends.append(len(self._names))

    def items(self) -> Items:
        """All that were added; more can not be."""
        return Items(
            list(self._numbers), np.frombuffer(self._classes, np.int32), np.frombuffer(self._sizes, np.int64),
            np.frombuffer(self._ends, np.int64), self._names,
        )  # fmt: skip


def are_places(numbers: NDArray[Any], count: int) -> bool:
    """Whether all numbers are places in a sequence of so many."""
    return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() < count)
