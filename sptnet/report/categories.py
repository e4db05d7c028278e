"""The categories that a run put the images of a split into: sizes, and what they are made of where that is known."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sptnet.data.manifest import Kind
from sptnet.evaluate import PROTOCOLS
from sptnet.run.folder import PREDICTIONS, RunError

FINE_PURITY, FINE_CONFIDENCE = 0.9, 0.8  # from which a category needs no second look
LAST_CLASS = 2**21  # more than any model may have
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
    """predictions.npz of a run, by protocol; raises RunError."""
    path = folder / PREDICTIONS
    found: dict[Kind, Sorted] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for kind in PROTOCOLS:
                if f"{kind}_uid" in arrays:
                    uid, target, category = (arrays[f"{kind}_{name}"] for name in ("uid", "target", "prediction"))
                    highest = (2**63 - 1, LAST_CLASS, LAST_CLASS)
                    checked = map(_checked, (uid, target, category), 3 * [len(uid)], highest)
                    found[kind] = Sorted(kind, *checked)
    except FileNotFoundError:
        raise RunError(f"{path} is not there: `sptnet eval {folder}` writes it") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} is damaged ({reason}): `sptnet eval {folder}` writes it again") from None
    if not any(len(one.uid) for one in found.values()):
        raise RunError(f"{path} has no prediction: `sptnet eval {folder}` writes it again")
    return {kind: one for kind, one in found.items() if len(one.uid)}


def _checked(column: NDArray[Any], length: int, highest: int) -> Ids:
    if column.ndim != 1 or len(column) != length or not np.issubdtype(column.dtype, np.integer):
        raise ValueError(f"a column is {column.dtype} {list(column.shape)} beside {length} uids")
    if len(column) and column.max() > highest:
        raise ValueError(f"class {column.max()}")
    return column.astype(np.int64)


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
        return None if self.similarity is None else 1 - self.similarity

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
