"""That every sample is predicted once, and what the accuracies are counted from: spread over the ranks by uid.

The uids of a split are cut into windows of about WINDOW samples, the same on any number of ranks; window w belongs to
rank w % R. A rank puts what it predicts, and the uids that its share of the indexes names, aside by window, in memory
or, where it is more than KEPT bytes, in temporary files. Then, R windows at a time, all ranks send each other what is
of a window; its rank sorts, compares and counts it. Reduced over the ranks are the counts, the K x K confusion among
them, and the first of each kind of fault. So a rank holds one window at a time, however many samples there are, and
rank 0 no more than others.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sptnet.data.format.manifest import Kind
from sptnet.data.storage.store import Store
from sptnet.errors import SptnetError
from sptnet.run.parts import putting_aside
from sptnet.strategy.collectives import exchange_rows, gather_packed, rank, summed, world_size

MILLION = 1_000_000  # a confidence travels as a whole number, beside uids
WINDOW = 2**22  # samples: 128 MiB of rows
KEPT_INDEXES = 4096  # of a split in the node's cache, which is listed for each file that comes into it
KEPT = 2**28  # bytes of rows that are put aside in memory
COLUMNS = 4  # uid, target, prediction, confidence in millionths
NOT_FINITE = -1.0  # a confidence that says so of a sample's outputs
FAULTS = ("missing", "there more than once", "of no sample", "with outputs that are not finite")
NAMED = 5  # uids of each kind of fault that are told


class EvaluationError(SptnetError, RuntimeError):
    """Predictions that are not one of every sample; no number is given."""

    on_all_ranks = True


class Predictions(NamedTuple):
    """[N] each, sorted by uid; a target is -1 where nobody knows it."""

    uid: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float32] | None = None


class Counts(NamedTuple):
    """What an evaluation counts.

    Attributes:
        confusion: [K, K], how many images of known class (column) are predicted as each class (row).
        sizes: [K], how many are predicted as each class, of known class or not.
        confidence: the sum over all, in millionths; None where there is none.
    """

    confusion: NDArray[np.int64]
    sizes: NDArray[np.int64]
    confidence: int | None = None

    @classmethod
    def of(cls, predictions: Predictions, num_classes: int) -> "Counts":
        _, targets, predicted, confidence = predictions
        known = targets >= 0
        cells = predicted[known] * num_classes + targets[known]
        confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
        total = None if confidence is None else round(float(confidence.sum(dtype=np.float64)) * MILLION)
        return cls(confusion, np.bincount(predicted, minlength=num_classes), total)

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        both = self.confidence is not None and other.confidence is not None
        total = self.confidence + other.confidence if both else None  # type: ignore[operator]
        return Counts(self.confusion + other.confusion, self.sizes + other.sizes, total)


class Windows:
    """Rows of int64, [n, columns], put aside by the window of their uid (column 0); its files are gone when closed.

    `add` raises PartsError where a temporary file cannot be written.
    """

    def __init__(self, number: int, width: int, columns: int):
        self.number, self.width, self.columns = number, width, columns
        self._files: list[IO[bytes]] = [
            tempfile.SpooledTemporaryFile(max_size=KEPT // number)  # noqa: SIM115
            for _ in range(number)
        ]

    def add(self, rows: NDArray[np.int64]) -> None:
        windows = np.clip(rows[:, 0] // self.width, 0, self.number - 1)
        order = np.argsort(windows, kind="stable")
        ends = np.searchsorted(windows[order], np.arange(self.number), side="right")
        with putting_aside():
            for file, part in zip(self._files, np.split(rows[order], ends[:-1]), strict=True):
                file.write(np.ascontiguousarray(part).tobytes())

    def rows(self, window: int) -> NDArray[np.int64]:
        """What was put aside of a window, [n, columns], none of one that is not there; it is given once."""
        if window >= self.number:
            return np.zeros((0, self.columns), np.int64)
        with closing(self._files[window]) as file:
            file.seek(0)
            return np.frombuffer(file.read(), np.int64).reshape(-1, self.columns)

    def close(self) -> None:
        for file in self._files:
            file.close()


def expected_uids(store: Store, kind: Kind, share: tuple[int, int] = (0, 1)) -> Iterator[NDArray[np.int64]]:
    """The uids of a split, shard by shard, from the indexes; of every `share[1]`-th shard from `share[0]` on."""
    shards = store.manifest.of_kind(kind)
    for number in range(share[0], len(shards), share[1]):
        yield store.entries(shards[number], keep=len(shards) <= KEPT_INDEXES)["uid"]


def windows_of(samples: int) -> int:
    """How many windows the uids of a split are cut into."""
    return max(1, -(-samples // WINDOW))


def count_once(
    store: Store,
    kind: Kind,
    predicted: Iterator[NDArray[np.int64]],
    num_classes: int,
    device: torch.device,
    each_window: Callable[[int, Predictions], None],
) -> Counts:
    """Check and count what all ranks have predicted of a split; all ranks call it.

    Args:
        predicted: this rank's rows, [n, 4] of (uid, target, prediction, confidence in millionths), a piece at a time.
        each_window: is given the number and the predictions of every window of this rank.

    Returns:
        The counts of the whole split, on every rank.

    Raises:
        EvaluationError: on all ranks, naming the first uids that are missing, there twice, of no sample, or whose
            outputs are not finite.
    """
    manifest, samples = store.manifest, store.manifest.samples(kind)
    number = windows_of(samples)
    # a uid is a position in the source; one that is higher all the same comes into the last window
    sources: tuple[Kind, ...] = ("test",) if kind == "test" else ("labelled", "unlabelled")
    width = -(-(sum(map(manifest.samples, sources)) + len(manifest.skipped)) // number)
    with closing(Windows(number, width, COLUMNS)) as given, closing(Windows(number, width, 1)) as wanted:
        for rows in predicted:
            given.add(rows)
        for uids in expected_uids(store, kind, (rank(), world_size())):
            wanted.add(uids[:, None])
        size = max(num_classes, manifest.targets(kind))
        counts = Counts(np.zeros((size, size), np.int64), np.zeros(size, np.int64), 0)
        faults = np.zeros((len(FAULTS), 1 + NAMED), np.int64)
        for first in range(0, number, world_size()):
            rows = _exchanged(given, first, device)
            uids = np.sort(_exchanged(wanted, first, device)[:, 0])
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            odd = rows[rows[:, 3] < 0, 0]
            # sets of millions of uids take minutes: they are made only where there is something to be found
            if len(odd) or not np.array_equal(rows[:, 0], uids) or (uids[1:] == uids[:-1]).any():
                faults = _added(faults, _faults(rows[:, 0], uids, odd))
            elif first + rank() < number:
                confidence = (rows[:, 3] / MILLION).astype(np.float32)
                predictions = Predictions(rows[:, 0], rows[:, 1], rows[:, 2], confidence)
                counts += Counts.of(predictions, size)
                each_window(first + rank(), predictions)
    everyones = gather_packed([torch.from_numpy(faults).to(device)])[0].cpu().numpy()
    for theirs in (everyones[r] for r in range(world_size()) if r != rank()):
        faults = _added(faults, theirs)
    if faults[:, 0].any():
        raise EvaluationError(f"of {samples} samples, {_told(faults)}: no accuracy is given")
    assert counts.confidence is not None
    parts = [torch.from_numpy(counts.confusion), torch.from_numpy(counts.sizes), torch.tensor([counts.confidence])]
    confusion, sizes, confidence = (part.cpu().numpy() for part in summed([part.to(device) for part in parts]))
    return Counts(confusion, sizes, int(confidence[0]))


def _exchanged(windows: Windows, first: int, device: torch.device) -> NDArray[np.int64]:
    """What all ranks have of this rank's window among those from `first` on, [n, columns]."""
    rows = [torch.from_numpy(windows.rows(first + r).copy()).to(device) for r in range(world_size())]
    return exchange_rows(rows).cpu().numpy()


def _faults(uids: NDArray[np.int64], expected: NDArray[np.int64], odd: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is wrong with sorted uids, those expected, and of which outputs: of each of FAULTS how many, the first."""
    found, counts = np.unique(uids, return_counts=True)
    wanted, times = np.unique(expected, return_counts=True)
    faults = np.zeros((len(FAULTS), 1 + NAMED), np.int64)
    twice = np.union1d(found[counts > 1], wanted[times > 1])
    wrong = (np.setdiff1d(wanted, found), twice, np.setdiff1d(found, wanted), np.unique(odd))
    for row, theirs in zip(faults, wrong, strict=True):
        row[0], row[1 : 1 + len(theirs[:NAMED])] = len(theirs), theirs[:NAMED]
    return faults


def _added(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    both = np.zeros_like(one)
    for row, a, b in zip(both, one, other, strict=True):
        row[0] = a[0] + b[0]
        first = np.sort(np.concatenate([a[1 : 1 + min(a[0], NAMED)], b[1 : 1 + min(b[0], NAMED)]]))[:NAMED]
        row[1 : 1 + len(first)] = first
    return both


def _told(faults: NDArray[np.int64]) -> str:
    told = ((what, row[0], row[1 : 1 + min(row[0], NAMED)]) for what, row in zip(FAULTS, faults, strict=True))
    return "; ".join(f"{count} {what} (uid {', '.join(map(str, uids))})" for what, count, uids in told if count)


def rows_of(tensors: Iterator[Tensor], most: int = 2**16) -> Iterator[NDArray[np.int64]]:
    """Rows [n, 4] on a device, a batch at a time, as arrays of about `most` of them: each copy is waited for."""
    here: list[Tensor] = []
    for tensor in tensors:
        here.append(tensor)
        if sum(map(len, here)) >= most:
            yield torch.cat(here).cpu().numpy()
            here = []
    if here:
        yield torch.cat(here).cpu().numpy()
