"""What a source dataset is to the rest of this folder."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class SourceError(ValueError):
    """A source that cannot be converted; the message names the file and what to do."""


class Item(NamedTuple):
    """One image. `where` is whatever the source's `read` understands; bytes: its size."""

    class_name: str
    where: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """A dataset in its own order.

    Attributes:
        train, test: the images of the two official parts, in the source's own order; `test` may be empty.
        classes: in target order, old ones first.
        read: gives the encoded image of an item's `where`.
        protocol: what the source adds to the manifest's protocol.
    """

    name: str
    classes: list[str]
    num_old: int
    train: list[Item]
    test: list[Item]
    read: Callable[[str], bytes]
    protocol: dict[str, Any] = field(default_factory=dict)
