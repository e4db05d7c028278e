"""Images of every category through the model: how confident it is, where their class tokens lie, what is near.

At most LOOKED_AT images are looked at, or LEAST of every category where that is more: a page of a million images takes
minutes and not hours, and says of how many a figure is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sptnet.data.blocks import Sample, path_of_sample, prepared
from sptnet.data.format.faults import DatasetError
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import Store
from sptnet.report.categories import Category, Ids, Sorted
from sptnet.run.progress import Progress
from sptnet.trained import TrainedRun

LOOKED_AT, LEAST = 5000, 16  # images in all, and of a category
MOST_MISSING = 10  # sentences on what cannot be had
HALF = 8  # of the most confident, and of the least confident, in a gallery


class Place(NamedTuple):
    """Where an image lies: number of its shard, and position in it."""

    shard: int
    position: int


@dataclass
class Images:
    """The images of a split, where they can be had.

    Attributes:
        missing: sentences on what cannot be had, and why.
    """

    store: Store | None
    found: Sorted
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = None
        if self.store is not None:
            self._reader = ShardReader(self.store, self.store.manifest.of_kind(self.found.kind))

    def places(self, rows: Ids) -> dict[int, Place]:
        """Where the images of some rows are; those of no shard are left out. One index is in memory at a time."""
        if self._reader is None or self.store is None:
            return {}
        order = rows[np.argsort(self.found.uid[rows], kind="stable")]
        uids = self.found.uid[order]
        places: dict[int, Place] = {}
        for number, shard in enumerate(self._reader.shards):
            try:
                entries = self.store.entries(shard)
            except DatasetError as error:
                self._miss(str(error))
                continue
            at = np.searchsorted(uids, entries["uid"])
            here = np.flatnonzero((at < len(uids)) & (uids[np.minimum(at, len(uids) - 1)] == entries["uid"]))
            for position in here.tolist():
                row = int(order[at[position]])
                if entries["target"][position] == self.found.target[row]:
                    places[row] = Place(number, position)
        if len(places) < len(rows) and not self.missing:
            self._miss(
                f"{len(rows) - len(places)} of {len(rows)} images are not in the shards as they were evaluated: "
                "the shards are others now"
            )
        return places

    def _miss(self, told: str) -> None:
        """Say once what cannot be had; of very many shards the first."""
        if told not in self.missing and len(self.missing) < MOST_MISSING:
            self.missing.append(told)

    def read(self, place: Place, path: str = "") -> Sample:
        """An image; one that cannot be read comes with its error."""
        assert self._reader is not None
        try:
            one = self._reader.read(*place)
        except DatasetError as error:
            return Sample(path, -1, -1, b"", str(error))
        return Sample(path or path_of_sample(self.found.kind, one.uid), one.uid, one.target, one.image)

    def paths(self, places: dict[int, Place]) -> dict[int, str]:
        """Where the images of some rows came from."""
        assert self._reader is not None
        told: dict[int, str] = {}
        by_shard: dict[int, list[int]] = {}
        for row, place in places.items():
            by_shard.setdefault(place.shard, []).append(row)
        for number, rows in by_shard.items():
            try:
                names = self._reader.store.paths(self._reader.shards[number])
            except DatasetError:
                names = None  # readers may do without them
            for row in rows:
                uid = int(self.found.uid[row])
                told[row] = names[places[row].position] if names else path_of_sample(self.found.kind, uid)
        return told

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


def chosen_rows(categories: Sequence[Category], total: int) -> Ids:
    """Rows to look at: all, or a share of every category, drawn by its id."""
    chosen = []
    for category in categories:
        quota = category.size if total <= LOOKED_AT else max(LEAST, LOOKED_AT * category.size // total)
        rows = category.rows
        if quota < len(rows):
            rows = np.random.default_rng(category.id).choice(rows, quota, replace=False, shuffle=False)
        chosen.append(rows)
    return np.sort(np.concatenate(chosen))


class Inferred(NamedTuple):
    """rows [n] that could be read, and their class tokens [n, D]."""

    rows: Ids
    tokens: NDArray[np.float32]


def look(run: TrainedRun, images: Images, categories: Sequence[Category]) -> Inferred:
    """Look at images of every category, and fill in what that tells of it."""
    rows = chosen_rows(categories, len(images.found.uid))
    places = images.places(rows)
    by_id = {category.id: number for number, category in enumerate(categories)}
    old = np.zeros((len(categories), run.classes.num_old))
    seen: list[int] = []
    confidences: list[NDArray[np.float64]] = []
    tokens = [np.zeros((0, run.encoder.module.backbone.num_features), np.float32)]
    with Progress("report") as progress:
        for some, features, logits in _outputs(run, images, places, progress):
            of = np.array([by_id[int(images.found.category[row])] for row in some])
            scaled = logits.astype(np.float64) / run.temperature
            shares = np.exp(scaled - scaled.max(1, keepdims=True))
            confidences.append((shares / shares.sum(1, keepdims=True))[range(len(some)), images.found.category[some]])
            np.add.at(old, of, logits[:, : run.classes.num_old])
            seen += some
            tokens.append(features)
    looked = np.array(seen, np.int64)
    confidence = np.concatenate(confidences or [np.zeros(0)])
    _fill(categories, looked, confidence, images, places, by_id)
    for number, category in enumerate(categories):
        if category.looked and run.classes.num_old:
            nearest = int(old[number].argmax())
            category.nearest = run.classes.names[nearest]
            category.similarity = float(old[number, nearest] / category.looked)
    return Inferred(looked, np.concatenate(tokens))


def _outputs(
    run: TrainedRun, images: Images, places: dict[int, Place], progress: Progress
) -> Iterator[tuple[list[int], NDArray[np.float32], NDArray[np.float32]]]:
    """Rows, class tokens and logits by batches; images that do not decode are left out, and said."""
    ordered = sorted(places, key=lambda row: places[row])  # as they lie on the disk
    size, damaged = run.encoder.batch_size, 0
    for begin in range(0, len(ordered), size):
        some = ordered[begin : begin + size]
        pixels, told = prepared([images.read(places[row]) for row in some], run.encoder.augment, run.encoder.image_size)
        good = [i for i, sample in enumerate(told) if not sample.error]
        damaged += len(some) - len(good)
        if good:
            outputs = run.forward(pixels[torch.tensor(good)])
            yield [some[i] for i in good], outputs.features.float().cpu().numpy(), outputs.logits.float().cpu().numpy()
        progress.advance("images", begin + len(some), len(ordered))
    if damaged:
        images.missing.append(f"{damaged} of {len(ordered)} images cannot be read or do not decode")


def _fill(
    categories: Sequence[Category],
    looked: Ids,
    confidence: NDArray[np.float64],
    images: Images,
    places: dict[int, Place],
    by_id: dict[int, int],
) -> None:
    """Confidence of every category, and which of its images are shown."""
    of = np.array([by_id[int(number)] for number in images.found.category[looked]], np.int64)
    order = np.lexsort((looked, -confidence, of))
    begins = np.searchsorted(of[order], np.arange(len(categories) + 1))
    shown: dict[int, Place] = {}
    for number, category in enumerate(categories):
        mine = order[begins[number] : begins[number + 1]]
        category.looked = len(mine)
        if not len(mine):
            continue
        category.confidence = float(confidence[mine].mean())
        kept = mine if len(mine) <= 2 * HALF else np.concatenate([mine[:HALF], mine[-HALF:]])
        category.shown = looked[kept].tolist()
        category.shown_confidence = confidence[kept].tolist()
        shown |= {row: places[row] for row in category.shown}
    told = images.paths(shown) if shown else {}
    for category in categories:
        category.shown_path = [told[row] for row in category.shown]


def nearest_by_prototypes(run: TrainedRun, categories: Sequence[Category]) -> None:
    """What a category is near where no image can be had: the cosine between the prototypes of the classes."""
    if not run.classes.num_old:
        return
    prototypes = torch.nn.functional.normalize(run.encoder.module.head.prototypes.detach().float().cpu(), dim=1)
    for category in categories:
        cosines = prototypes[: run.classes.num_old] @ prototypes[category.id]
        nearest = int(cosines.argmax())
        category.nearest, category.similarity = run.classes.names[nearest], float(cosines[nearest])
