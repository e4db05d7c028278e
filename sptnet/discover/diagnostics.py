"""What the results look like, as far as it can be seen without labels of the unlabelled images."""

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sptnet.data.features import Split
from sptnet.discover.children import StageError

QUERIES, AMONG = 2000, 20_000  # images whose nearest neighbour is looked for, and among how many
NO_BETTER = 1.5  # times as often as by chance, below which nothing is told apart
# a difference of shares that is told, at least; and so many deviations of what chance makes of that many images. One of
# 1.6 points was told once where the truth, which discover does not know, said the opposite (docs/results.md)
TOLD, DEVIATIONS = 0.03, 2.5
FEW_IMAGES, FEW_PER_CLASS = 300, 5
SMALL = 0.1  # of the mean size of a new category
EMPTY_SHARE = 1 / 3  # of the new categories that are empty or small, from which on they were too many
WIDE = 3  # times a number of classes, from which on an estimate's upper end says nothing
Ids = NDArray[np.int64]


@dataclass
class Group:
    """A category of the table of predictions: its images, the mean of their confidence, the old class most are near."""

    name: str
    is_new: bool
    size: int
    confidence: float
    nearest: str


class Agreement(NamedTuple):
    """How often the nearest other image is in the same group, of how many, and how often it would be by chance."""

    found: float
    chance: float
    images: int

    @property
    def is_chance(self) -> bool:
        return self.found < min(NO_BETTER * self.chance, (1 + self.chance) / 2)


class Share(NamedTuple):
    """Of `images`, how many parts of 1."""

    value: float
    images: int

    def is_worse(self, before: "Share") -> bool:
        """Whether it is less than another by more than chance makes of so few images, as if they were others."""
        mean = (self.value + before.value) / 2
        variance = mean * (1 - mean) * (1 / max(self.images, 1) + 1 / max(before.images, 1))
        return before.value - self.value > max(TOLD, DEVIATIONS * math.sqrt(variance))


class StageFacts(NamedTuple):
    """What is seen of one run without labels of the unlabelled images.

    own_class: share of the labelled images that it puts into their own class.
    neighbours: of the unlabelled images, by its predictions.
    result, test: of its metrics.
    """

    name: str
    own_class: Share
    neighbours: Agreement
    result: dict[str, Any]
    test: dict[str, Any] | None


class Row(NamedTuple):
    """What is used of a row of the table that `sptnet predict` wrote."""

    path: str
    class_name: str
    is_new: bool
    confidence: float
    nearest_old_class: str


def rows_of(folder: Path) -> Iterator[Row]:
    """That table, a row after the other. Raises StageError: a part of it is damaged."""
    for path in sorted((folder / "predictions").glob("part-*.csv")):
        try:
            with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = csv.reader(file)
                columns = next(rows)
                places = [columns.index(name) for name in Row._fields]
                for row in rows:
                    if len(row) != len(columns):
                        raise ValueError(f"line {rows.line_num} has {len(row)} cells")
                    image, name, is_new, confidence, nearest = (row[place] for place in places)
                    yield Row(image, name, is_new == "True", float(confidence), nearest)
        except (ValueError, StopIteration, csv.Error) as error:
            raise StageError(
                f"{path} is damaged ({str(error) or 'it is empty'}): remove it, and the same command makes it again"
            ) from None


def groups_of(folder: Path) -> list[Group]:
    """Every category that has an image, the largest first."""
    sizes: Counter[str] = Counter()
    confidence: Counter[str] = Counter()
    nearest: dict[str, Counter[str]] = {}
    new: dict[str, bool] = {}
    for row in rows_of(folder):
        name = row.class_name
        sizes[name] += 1
        confidence[name] += row.confidence  # type: ignore[assignment]
        nearest.setdefault(name, Counter())[row.nearest_old_class] += 1
        new[name] = row.is_new
    return [
        Group(name, new[name], size, confidence[name] / size, nearest[name].most_common(1)[0][0])
        for name, size in sizes.most_common()
    ]


def own_class_share(folder: Path) -> Share:
    """Of labelled images, predicted as a split of shards: the share in their own class, by `labelled/CLASS/...`."""
    right = total = 0
    for row in rows_of(folder):
        right += row.path.split("/")[1:2] == [row.class_name]
        total += 1
    return Share(right / max(total, 1), total)


def agreement(features: Split, groups: Ids) -> Agreement:
    """Of some images: how often the other one with the most similar class token, the mean taken off, shares its group.

    Args:
        features: of N images.
        groups: [N] the group of each; negative: of none, left out.
    """
    draws = np.random.default_rng(0)
    known = np.flatnonzero(groups >= 0)
    chosen = np.sort(draws.choice(known, min(AMONG, len(known)), replace=False))
    if len(chosen) < 2:
        return Agreement(0.0, 1.0, 0)
    tokens = _rows(features, chosen)
    tokens -= tokens.mean(0)
    tokens /= np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    asked = draws.choice(len(chosen), min(QUERIES, len(chosen)), replace=False)
    similarity = tokens[asked] @ tokens.T
    similarity[np.arange(len(asked)), asked] = -np.inf  # not itself
    own = groups[chosen]
    sizes = np.unique(own, return_counts=True)[1]
    chance = float((sizes * (sizes - 1)).sum() / (len(own) * (len(own) - 1)))
    return Agreement(float((own[similarity.argmax(1)] == own[asked]).mean()), chance, len(asked))


def _rows(features: Split, rows: Ids) -> NDArray[np.float32]:
    """Rows [n] (sorted) of features, as [n, D], without holding all of them."""
    found, begin = [], 0
    for block in features.blocks():
        here = rows[(rows >= begin) & (rows < begin + len(block))] - begin
        found.append(block[here])
        begin += len(block)
    return np.concatenate(found).astype(np.float32)


def predictions_by_features(features: Split, uids: Ids, predictions: Ids) -> Ids:
    """Predictions in the order of features; -1 where there is none."""
    order = np.argsort(uids)
    place = np.minimum(np.searchsorted(uids[order], features.uids), len(uids) - 1)
    there = uids[order][place] == features.uids
    return np.where(there, predictions[order][place], -1)


def worse(before: StageFacts, after: StageFacts) -> list[str]:
    """By what can be seen, where the second stage is worse than the first: a phrase each."""
    found = [Share(stage.neighbours.found, stage.neighbours.images) for stage in (before, after)]
    pairs = [
        ("labelled images in their own class", before.own_class, after.own_class),
        ("images whose nearest neighbour is in the same category", found[0], found[1]),
    ]
    if before.test is not None and after.test is not None:
        for name in ("all", "old", "new"):
            shares = [_of_truth(result, name) for result in (before.test, after.test)]
            if shares[0] is not None and shares[1] is not None:
                pairs.append((f"{name.capitalize()} on the test images", shares[0], shares[1]))
    told = [f"{what} {100 * b.value:.1f}% for {100 * a.value:.1f}%" for what, a, b in pairs if b.is_worse(a)]
    used = before.result["classes_used"], after.result["classes_used"]
    if used[1] < used[0] - max(1, TOLD * used[0]):
        told.append(f"{used[1]} categories in use for {used[0]}")
    return told


def _of_truth(result: dict[str, Any], name: str) -> Share | None:
    """An accuracy of metrics.json; those of earlier versions do not say of how many images."""
    if result[name] is None or math.isnan(result[name]):
        return None
    return Share(result[name], (result.get("known") or {}).get(name, 0))


def few_images(labelled: int, unlabelled: int, classes: int) -> str | None:
    """A sentence where there is hardly anything to learn from."""
    if labelled + unlabelled < FEW_IMAGES:
        return (
            f"only {labelled + unlabelled} images: the result is the backbone's more than training's, and may change "
            f"with the seed; use at least {FEW_IMAGES}"
        )
    if labelled < FEW_PER_CLASS * classes:
        return f"only {labelled} labelled images of {classes} classes: use at least {FEW_PER_CLASS} of each"
    return None


def about_sizes(groups: list[Group], num_new: int, interval: tuple[int, int] | None, num_old: int) -> list[str]:
    """What the sizes of the categories say about their number."""
    told = []
    total = sum(group.size for group in groups)
    new = [group.size for group in groups if group.is_new]
    share = sum(new) / max(total, 1)
    if not new:
        return ["no image is in a new category: everything was found to be of a class that has a name"]
    if share == 1:
        told.append("no image is in a named class: perhaps the named ones are of another kind of picture")
    if groups[0].size > max(0.5 * total, 2) and len(groups) > 1:
        told.append(
            f"{groups[0].name} has {100 * groups[0].size / total:.0f}% of all images: one very common class, or a "
            "catch-all"
        )
    mean = sum(new) / num_new
    small = num_new - sum(size >= SMALL * mean for size in new)
    if num_new > 2 and small > EMPTY_SHARE * num_new:
        told.append(
            f"{small} of {num_new} new categories are empty or nearly: there are fewer, which is harmless, or the "
            "training was too short to sort them"
        )
    elif small == 0 and interval is not None and (more := _more_classes(num_old + num_new, interval[1])):
        told.append(
            f"all {num_new} new categories are in use: where one holds visibly different things there are more; the "
            f"estimate goes up to {interval[1]} classes, so try --new {more - num_old} with an OUT of its own"
        )
    return told


def _more_classes(classes: int, high: int) -> int | None:
    """How many to try next: halfway, over their logarithm, to the upper end, which is an end since it is too large."""
    tried = round(math.sqrt(classes * high))
    return tried if classes < tried and high <= WIDE * classes else None
