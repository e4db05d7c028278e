"""The categories that a run put the images of a split into: sizes, and what they are made of where that is known."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sptnet.data.format.manifest import Kind
from sptnet.run.predictions import load_predictions

FINE_PURITY, FINE_CONFIDENCE = 0.9, 0.8  # from which a category needs no second look
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Sorted:
    """Predictions of a split: uid, target (-1: unknown) and category of every image, [N] each."""

    kind: Kind
    uid: Ids
    target: Ids
    category: Ids

    def members(self) -> dict[int, Ids]:
        """Rows of every category that has any, the largest category first."""
        order = np.argsort(self.category, kind="stable")
        ids, begins = np.unique(self.category[order], return_index=True)
        rows = np.split(order, begins[1:])
        by_size = sorted(range(len(ids)), key=lambda i: (-len(rows[i]), ids[i]))
        return {int(ids[i]): rows[i] for i in by_size}


def read_predictions(folder: Path) -> dict[Kind, Sorted]:
    """What a run predicted, by protocol; raises RunError."""
    return {kind: Sorted(kind, *columns) for kind, columns in load_predictions(folder).items()}


@dataclass
class Category:
    """What is told of a category; None: not known.

    Attributes:
        rows: its images, of all that were sorted.
        confidence: mean of those that were looked at.
        purity, main: the share of its most frequent true class among images of known class, and that class.
        nearest, similarity: the old class that its images' class tokens are most similar to, and the mean cosine.
        looked: how many images were looked at.
        shown: rows of the images of its gallery, the most confident first, the least confident last.
        shown_confidence, shown_path: of those.
    """

    id: int
    name: str
    is_new: bool
    rows: Ids
    purity: float | None = None
    main: str | None = None
    confidence: float | None = None
    nearest: str | None = None
    similarity: float | None = None
    looked: int = 0
    shown: list[int] = field(default_factory=list)
    shown_confidence: list[float] = field(default_factory=list)
    shown_path: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def novelty(self) -> float | None:
        """Of a new category: an old one is nearest to its own class."""
        return 1 - self.similarity if self.is_new and self.similarity is not None else None

    @property
    def is_fine(self) -> bool:
        """Whether it looks as if it needed no second look."""
        if self.purity is not None:
            return self.purity >= FINE_PURITY
        return self.confidence is not None and self.confidence >= FINE_CONFIDENCE


def categories_of(found: Sorted, names: list[str], num_old: int, true_names: list[str]) -> list[Category]:
    """Every category that is in use, the largest first.

    Args:
        names: of the model's classes.
        true_names: of the dataset's, by target.
    """
    made = []
    for number, rows in found.members().items():
        category = Category(number, name_of(number, names), number >= num_old, rows)
        known = found.target[rows]
        known = known[known >= 0]
        if len(known):
            counts = np.bincount(known)
            category.purity = float(counts.max() / len(known))
            category.main = name_of(int(counts.argmax()), true_names)
        made.append(category)
    return made


def name_of(number: int, names: list[str]) -> str:
    """A class's name, or its number where nobody has said it."""
    return names[number] if number < len(names) else f"class {number}"
