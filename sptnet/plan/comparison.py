"""What a run measured beside what is planned for it: where the plan is off by more than it promises."""

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sptnet.errors import visible
from sptnet.plan.measured_run import MeasuredRun, Told
from sptnet.plan.planned import Plan
from sptnet.strategy.base import DTYPES

MEMORY, MEMORY_BY_FORMULA = 0.02, 0.1  # what docs/plan.md promises


class Comparison(NamedTuple):
    """A figure of a run.

    Attributes:
        planned, measured: in `unit`; None where it is not known, and `note` says why.
        promised: how far off the plan may be, as a share; None where nothing is promised.
    """

    what: str
    unit: str
    planned: float | None
    measured: float | None
    promised: float | None = None
    note: str = ""

    @property
    def off(self) -> float | None:
        """How much too high the plan is, as a share; negative: too low."""
        return self.planned / self.measured - 1 if self.planned is not None and self.measured else None

    @property
    def broken(self) -> bool:
        """Whether the plan is off by more than it promises."""
        return self.promised is not None and self.off is not None and abs(self.off) > self.promised


def compare(plan: Plan, ran: MeasuredRun) -> Sequence[Comparison]:
    """The figures of a run beside its plan, which is of the run's strategy alone."""
    rows = [_memory(plan, ran)]
    for phase in plan.steps:
        rows += _step(plan, phase, [told for told in ran.told if told.phase == phase])
    return rows


def _memory(plan: Plan, ran: MeasuredRun) -> Comparison:
    (line,) = plan.lines
    planned = line.peak if ran.evaluated else line.peak_of_steps  # nothing has been evaluated yet
    what, promised = "memory at the peak", MEMORY_BY_FORMULA if line.formula else MEMORY
    if ran.device is None or ran.on_cpu:
        where = "on a CPU" if ran.on_cpu else "on an unknown device"
        note = f"{where} a run tells of its process only: {ran.memory / 1e9:.2f} GB, programs and libraries in it"
        return Comparison(what, "GB", planned / 1e9, None, promised, note)
    if plan.stored.cache is not None:
        note = "nothing is promised of a run that keeps tokens: it may have made them in this process"
        return Comparison(what, "GB", planned / 1e9, ran.memory / 1e9, None, note)
    return Comparison(what, "GB", planned / 1e9, ran.memory / 1e9, promised)


def _step(plan: Plan, phase: Any, told: Sequence[Told]) -> Iterator[Comparison]:
    (line,) = plan.lines
    seconds, work = line.seconds[phase], line.counted[phase].work
    assert work is not None
    note = "promised after --calibrate only"
    if not told:
        note = "no line of metrics.jsonl is of this phase alone, the first ones left out"
    took, waited, share = (
        (median(figures) for figures in zip(*(t[1:] for t in told), strict=True)) if told else (None,) * 3
    )
    computing = max(seconds.matmul + seconds.memory, seconds.host)
    rates = plan.cluster.machine.matmul
    peak = rates.get(DTYPES.get(plan.cluster.precision, torch.float32), rates[torch.float32])
    yield Comparison(f"{phase} step", "ms", 1e3 * seconds.total, took and 1e3 * took, None, note)
    yield Comparison(f"{phase} step, waiting for data", "ms", 1e3 * max(0.0, seconds.loader - computing),
                 None if waited is None else 1e3 * waited)  # fmt: skip
    yield Comparison(f"{phase} step, share of the matmul peak", "%", 100 * plan.work[phase] / seconds.total / peak,
                 share and 100 * share)  # fmt: skip
    untold = "a run does not count what it sends"
    yield Comparison(f"{phase} step, collectives", "", work.collectives.total(), None, None, untold)
    yield Comparison(f"{phase} step, sent", "MB", work.sent / 1e6, None, None, untold)


def verdict(rows: Sequence[Comparison]) -> str:
    """One line: where the plan is off by more than it promises."""
    broken = [f"{row.what} ({row.off:+.0%}, {row.promised:.0%} promised)" for row in rows if row.broken]
    if broken:
        return f"the plan is off by more than it promises: {', '.join(broken)}"
    held = [row.what for row in rows if row.promised is not None and row.off is not None]
    if not held:
        return "the run recorded nothing that the plan promises anything about"
    return f"the plan kept its promise on: {', '.join(held)}"


def facts(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The rows as JSON has them."""
    return [
        {**row._asdict(), "off": _finite(row.off), "measured": _finite(row.measured), "broken": row.broken}
        for row in rows
    ]


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def tell_beside(plan: Plan, ran: MeasuredRun, console: Console) -> None:
    """Print the plan of a run and what it measured, side by side."""
    cluster, rows = plan.cluster, compare(plan, ran)
    told = (
        f"{ran.folder}: {plan.config.method} under {ran.strategy} on {ran.nodes} x {ran.gpus} ranks "
        f"({ran.device or 'an unknown device'}), {ran.precision}, batch {plan.config.data.batch_size}; planned "
        f"with the rates of {cluster.machine.name}"
    )
    console.print(Text(visible(told)), soft_wrap=True)
    table = Table(title="Planned, and measured by the run", title_justify="left")
    for column in ("", "planned", "measured", "off", "promised", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows:
        planned, measured = (_told(value, row.unit) for value in (row.planned, row.measured))
        off = "" if row.off is None else f"{row.off:+.0%}" + (" !" if row.broken else "")
        table.add_row(row.what, planned, measured, off, "" if row.promised is None else f"{row.promised:.0%}", row.note)
    console.print(table)
    console.print(verdict(rows), soft_wrap=True, highlight=False)


def _told(value: float | None, unit: str) -> str:
    if value is None:
        return "not told"
    return f"{value:,.0f}" if not unit else f"{value:,.{2 if unit == 'GB' else 1}f} {unit}"
