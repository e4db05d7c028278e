"""Curves over the steps of a run, from metrics.jsonl, in memory that does not grow with its length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sptnet.run.folder import STEPS
from sptnet.run.records import records_of

BINS = 300  # points of a curve at most; twice as many while reading
LAST = 2**53  # steps; beyond it a line is damaged
WIDTH, HEIGHT = 420, 130  # of a panel, in its own units
LOSSES = {
    "total": "objective",
    "cls": "classification of labelled images",
    "distill": "self-distillation",
    "me_max": "mean-entropy gap (0: all classes alike)",
    "info_nce": "contrastive, unsupervised",
    "sup_con": "contrastive, supervised",
}
USED = "classes_used"
PHASES = ("model", "prompt")
ACCURACIES = ("all", "old", "new")


@dataclass
class Steps:
    """Means over equal stretches of `width` steps: [phase, name, stretch].

    Attributes:
        last: number of the last step that was told.
        evaluations: (steps done, results by protocol).
    """

    width: int = 1
    last: int = -1
    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, len(LOSSES) + 1, 2 * BINS)))
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, len(LOSSES) + 1, 2 * BINS)))
    taken: np.ndarray = field(default_factory=lambda: np.zeros((2, 2 * BINS)))
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        step = record["step"]
        if step > LAST:
            return
        if isinstance(record.get("evaluation"), dict):
            self.evaluations.append((step, record["evaluation"]))
            if len(self.evaluations) > 4 * BINS:
                del self.evaluations[1::2]
            return
        if record.get("phase") not in PHASES:
            return
        while step // self.width >= 2 * BINS:
            self._halve()
        phase, stretch = PHASES.index(record["phase"]), step // self.width
        self.last = max(self.last, step)
        self.taken[phase, stretch] += 1
        for number, name in enumerate((*LOSSES, USED)):
            if (value := number_of(record.get(name))) is not None:
                self.sums[phase, number, stretch] += value
                self.counts[phase, number, stretch] += 1

    def _halve(self) -> None:
        self.width *= 2
        for array in (self.sums, self.counts, self.taken):
            joined = array.reshape(*array.shape[:-1], BINS, 2).sum(-1)
            array[..., :BINS], array[..., BINS:] = joined, 0

    def curve(self, phase: str, name: str) -> list[tuple[float, float]]:
        """Middles of stretches, and means there."""
        number, which = (*LOSSES, USED).index(name), PHASES.index(phase)
        counts, sums = self.counts[which, number], self.sums[which, number]
        return [((i + 0.5) * self.width, float(sums[i] / counts[i])) for i in np.flatnonzero(counts).tolist()]

    def shades(self) -> list[tuple[float, float, float]]:
        """From, to, and the share of prompt steps, of neighbouring stretches that have the same."""
        together = self.taken.sum(0)
        found: list[tuple[float, float, float]] = []
        for i in np.flatnonzero(together).tolist():
            share = round(float(self.taken[1, i] / together[i]), 1)
            begin, end = i * self.width, (i + 1) * self.width
            if found and found[-1][1] == begin and found[-1][2] == share:
                found[-1] = (found[-1][0], end, share)
            else:
                found.append((begin, end, share))
        return [one for one in found if one[2] > 0]


def number_of(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_steps(folder: Path) -> Steps | None:
    """What a run told of its steps; None where it told nothing."""
    steps = Steps()
    try:
        for record in records_of(folder / STEPS):
            if record is not None:
                steps.add(record)
    except OSError:
        return None
    return steps if steps.last >= 0 or steps.evaluations else None


class Line(NamedTuple):
    """label, and a polyline's points in a panel's units."""

    label: str
    points: str
    dots: list[tuple[float, float]]


class Panel(NamedTuple):
    """One run's curves of one kind; `low`, `high`: what its bottom and top mean; shades: x, width, opacity."""

    lines: list[Line]
    shades: list[tuple[float, float, float]]
    low: str
    high: str
    last: int


class Row(NamedTuple):
    """The same curves of every run, on the same scale; a panel is None for a run that has none."""

    title: str
    panels: list[Panel | None]


def rows_of(runs: Sequence[Steps | None]) -> list[Row]:
    """A row for every loss term, classes in use, and the accuracies under each protocol."""
    rows = []
    for name, title in (*LOSSES.items(), (USED, "classes in use since the last line")):
        curves = [
            {}
            if steps is None
            else {f"{phase} phase": points for phase in PHASES if (points := steps.curve(phase, name))}
            for steps in runs
        ]
        rows.append(_row(title, runs, curves))
    for protocol in ("unlabelled", "test"):
        curves = [{} if steps is None else _accuracies(steps, protocol) for steps in runs]
        rows.append(_row(f"accuracy, {protocol}, %", runs, curves, (0.0, 100.0)))
        used = [{} if steps is None else _evaluated(steps, protocol, USED, 1.0) for steps in runs]
        rows.append(_row(f"classes in use, {protocol}", runs, used))
    return [row for row in rows if any(row.panels)]


Curves = dict[str, list[tuple[float, float]]]


def _accuracies(steps: Steps, protocol: str) -> Curves:
    found: Curves = {}
    for name in ACCURACIES:
        found |= _evaluated(steps, protocol, name, 100.0)
    return found


def _evaluated(steps: Steps, protocol: str, name: str, factor: float) -> Curves:
    told = [(step, results.get(protocol)) for step, results in steps.evaluations]
    values = [(step, number_of(result.get(name))) for step, result in told if isinstance(result, dict)]
    points = [(float(step), factor * value) for step, value in values if value is not None]
    label = "images" if name == USED else name.capitalize()
    return {label: points} if points else {}


def _row(
    title: str, runs: Sequence[Steps | None], curves: Sequence[Curves], span: tuple[float, float] | None = None
) -> Row:
    values = [y for run in curves for points in run.values() for _, y in points]
    if not values:
        return Row(title, [None] * len(runs))
    low, high = span or (min(values), max(values))
    high = high if high > low else low + max(1.0, abs(low))
    panels: list[Panel | None] = []
    for steps, run in zip(runs, curves, strict=True):
        if steps is None or not run:
            panels.append(None)
            continue
        end = max(steps.last + 1, *(step for step, _ in steps.evaluations), 1)
        lines = []
        for label, points in run.items():
            placed = [(WIDTH * x / end, HEIGHT * (high - y) / (high - low)) for x, y in points]
            told = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            lines.append(Line(label, told, placed if len(placed) <= 30 else []))
        shades = [(WIDTH * begin / end, WIDTH * (stop - begin) / end, share) for begin, stop, share in steps.shades()]
        panels.append(Panel(lines, shades, f"{low:.4g}", f"{high:.4g}", int(end)))
    return Row(title, panels)
