"""A plan as tables, as JSON, as one line."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sptnet.errors import visible
from sptnet.plan.calibrate import Taken
from sptnet.plan.hardware import SPARE, Machine
from sptnet.plan.planned import Line, Plan
from sptnet.plan.trial import KINDS

PLANNED = "planned, not measured"


def as_facts(plan: Plan, price: float | None) -> dict[str, Any]:
    """A plan as JSON has it; bytes, seconds, hours."""
    best, why = plan.recommended
    cluster, machine = plan.cluster, plan.cluster.machine
    return {
        "config": {"method": plan.config.method, "run": plan.config.run, "data": plan.config.data.root},
        "images": plan.counts.__dict__,
        "cluster": {"nodes": cluster.nodes, "gpus": cluster.gpus, "gpu": machine.name, "precision": cluster.precision,
                    "usable_bytes": cluster.usable, "sources": list(machine.sources)},
        "batch": plan.config.data.batch_size,
        "steps": plan.steps,
        "evaluations": plan.evaluations,
        "parameters": plan.size._asdict(),
        "stored": plan.stored.__dict__,
        "strategies": {line.strategy: _line_facts(plan, line, price) for line in plan.lines},
        "recommended": None if best is None else best.strategy,
        "reason": why,
    }  # fmt: skip


def _line_facts(plan: Plan, line: Line, price: float | None) -> dict[str, Any]:
    phases = {}
    for phase, found in line.counted.items():
        assert found.work is not None
        phases[phase] = {
            "peak_bytes": found.peak,
            "bytes": found.bytes,
            "collectives": found.work.collectives.total(),
            "collective_bytes": found.work.sent,
            "flops": found.work.flops,
            "seconds": line.seconds[phase].total,
            "bound": line.seconds[phase].bound,
            "parts": line.seconds[phase]._asdict(),
        }
    gpu_hours = line.hours * plan.cluster.ranks
    watts = plan.cluster.machine.watts
    return {
        "fits": line.fits,
        "memory_by": "formula" if line.formula else "count",
        "largest_batch": line.largest,
        "largest_batch_checkpointed": line.largest_checkpointed,
        "phases": phases,
        "hours": line.hours,
        "gpu_hours": gpu_hours,
        "kwh_at_most": None if watts is None else gpu_hours * watts / 1000,
        "cost": None if price is None else gpu_hours * price,
    }


def tell(plan: Plan, price: float | None, console: Console) -> None:
    """Print a plan."""
    cluster = plan.cluster
    told = (
        f"{plan.config.run}: {plan.config.method} on {cluster.nodes} x {cluster.gpus} {cluster.machine.name}, "
        f"{cluster.precision}, batch {plan.config.data.batch_size}; {PLANNED}"
    )
    console.print(Text(visible(told)))
    console.print(_memory(plan))
    console.print(_time(plan, price))
    for line in _lines(plan):
        console.print(Text(visible(line)), soft_wrap=True)


def one_line(plan: Plan) -> str:
    """What a job script quotes."""
    best, why = plan.recommended
    if best is None:
        return why
    cluster = plan.cluster
    return (
        f"{PLANNED}: {plan.config.method} {best.hours:.2f} h on {cluster.nodes} x {cluster.gpus} "
        f"{cluster.machine.name} ({best.strategy}, {cluster.precision}), {best.peak / 1e9:.1f} GB of a GPU"
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="Bytes of a rank at the peak of a step, GB, and what it sends", title_justify="left")
    for column in ("strategy", "phase", "peak", *KINDS, "collectives", "sent, MB"):
        table.add_column(column, justify="left" if column in ("strategy", "phase") else "right")
    for line in plan.lines:
        name = line.strategy + (" (formula)" if line.formula else "")
        for phase, found in line.counted.items():
            assert found.work is not None
            calls, sent = found.work.collectives.total(), found.work.sent
            row = [f"{found.bytes[kind] / 1e9:.2f}" for kind in KINDS]
            table.add_row(name, phase, f"{found.peak / 1e9:.2f}", *row, f"{calls}", f"{sent / 1e6:,.1f}")
            name = ""
    return table


def _time(plan: Plan, price: float | None) -> Table:
    table = Table(title="Seconds, and the whole run", title_justify="left")
    phases = list(plan.steps)
    columns = ["strategy", *(f"{phase} step, ms" for phase in phases), "evaluation, s", "hours", "GPU-hours"]
    columns += ["kWh at most", "largest batch", "checkpointed"] + (["cost"] if price is not None else [])
    for column in columns:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for line in plan.lines:
        facts = _line_facts(plan, line, price)
        told = [f"{1e3 * line.seconds[p].total:.1f} ({line.seconds[p].bound})" for p in phases]
        row = [line.strategy, *told, f"{line.seconds['evaluation'].total:.1f}", f"{line.hours:.2f}"]
        row += [f"{facts['gpu_hours']:.1f}", "?" if facts["kwh_at_most"] is None else f"{facts['kwh_at_most']:.1f}"]
        row += ["?" if most is None else f"{most:,}" for most in (line.largest, line.largest_checkpointed)]
        table.add_row(*row, *([] if price is None else [f"{facts['cost']:,.2f}"]))
    return table


def _lines(plan: Plan) -> Iterator[str]:
    counts, stored, cluster = plan.counts, plan.stored, plan.cluster
    yield (
        f"data: {counts.labelled:,} labelled, {counts.unlabelled:,} unlabelled, {counts.test:,} test images "
        f"({counts.source})"
    )
    steps = ", ".join(f"{count:,} {phase}" for phase, count in plan.steps.items())
    yield f"steps: {steps}; {plan.evaluations} evaluations"
    shards = "unknown, they are not here" if stored.shards is None else f"{stored.shards / 1e9:.3f} GB"
    tokens = f"; no tokens are kept: {stored.not_kept}" if stored.not_kept else ""
    tokens = tokens if stored.cache is None else f"; tokens {stored.cache / 1e9:.1f} GB"
    yield (
        f"on disk: shards {shards}; a checkpoint {stored.checkpoint / 1e6:.0f} MB, of all that are kept "
        f"{stored.checkpoints / 1e6:.0f} MB; the model {stored.model / 1e6:.0f} MB{tokens}"
    )
    yield f"rates: {'; '.join(cluster.machine.sources)}"
    if cluster.usable:
        yield f"{SPARE:.0%} of a GPU's memory is left to CUDA, NCCL and what is between blocks: assumed, not measured"
    best, why = plan.recommended
    yield why if best is None else f"recommended: {best.strategy}, since {why}"


def tell_steps(machine: Machine, taken: Sequence[Taken], console: Console) -> None:
    """Steps that were taken on this machine, beside what was planned for them."""
    table = Table(title=f"Steps on this machine ({machine.name}), s", title_justify="left")
    for column in ("phase", "images", "measured", "planned", "planned, calibrated", "off"):
        table.add_column(column, justify="right")
    for step in taken:
        off = f"{step.calibrated / step.measured - 1:+.0%}"
        seconds = (f"{value:.4f}" for value in (step.measured, step.planned, step.calibrated))
        table.add_row(step.phase, str(step.images), *seconds, off)
    console.print(table)
