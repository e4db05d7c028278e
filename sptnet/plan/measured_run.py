"""What a run was, and what it told of itself while it trained, as its folder says."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from sptnet.config import Config
from sptnet.data.format.files import read_regular
from sptnet.plan.hardware import PlanError
from sptnet.run.folder import CONFIG, LOG, STEPS, read_config
from sptnet.run.provenance import STARTS, read_starts
from sptnet.run.records import LARGEST, DamagedError, records_of, typed
from sptnet.strategy.launcher import Precision, StrategyName

Ranks = Annotated[int, Field(gt=0, lt=10**6)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strategy(BaseModel):
    strategy: StrategyName
    world_size: Ranks
    precision: Precision
    shard_size: Ranks


class _Start(BaseModel):
    """A line of starts.jsonl; `device`: cpu, or a GPU's name; lines of before do not have it."""

    step: Annotated[int, Field(ge=0)]
    strategy: _Strategy
    nodes: dict[str, Ranks] = {}
    device: str | None = None


class _Figures(BaseModel):
    """What a line of metrics.jsonl tells of the steps of its write, all together."""

    phase: str
    images_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    data_wait_s_per_step: Figure
    peak_memory_mb: Figure
    share_of_matmul_peak: Figure


class Told(NamedTuple):
    """Steps of one phase that were told of together. `seconds`, `waited`: of a step; `share`: of the matmul peak."""

    phase: str
    seconds: float
    waited: float
    share: float


@dataclass(frozen=True)
class MeasuredRun:
    """A run as it last was.

    Attributes:
        nodes, gpus: over which its ranks were spread; under hsdp, copies and ranks that share one.
        device: cpu, cuda, a GPU's name, or None where the folder does not say.
        told: what it told of steps since its last start, but for the first ones and those that are of two phases.
        memory: bytes, the most that it told of.
        evaluated: whether it told of it after an evaluation, too.
    """

    folder: Path
    config: Config
    strategy: StrategyName
    nodes: int
    gpus: int
    precision: Precision
    device: str | None
    told: Sequence[Told]
    memory: float
    evaluated: bool

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


def read_run(folder: Path, overrides: Sequence[str] = ()) -> MeasuredRun:
    """What a run was when it was last started, and what it told since then.

    Raises:
        RunError, ConfigError: no run's folder; an override of what makes its numbers.
        PlanError: its files do not say what it ran on, or nothing of its steps.
    """
    if not (folder / CONFIG).exists():
        raise PlanError(f"{folder} is a folder, and no run's: there is no {CONFIG} in it")
    config = read_config(folder, overrides)
    start = _last_start(folder)
    strategy, ranks, precision, shard = start.strategy.__dict__.values()
    nodes = len(start.nodes)
    if strategy == "hsdp":
        nodes, gpus = ranks // shard, shard
    else:
        even = nodes > 0 and set(start.nodes.values()) == {ranks // nodes}
        nodes, gpus = (nodes, ranks // nodes) if even else (1, ranks)
    if nodes * gpus != ranks:
        raise PlanError(f"{folder / STARTS} says {ranks} ranks, and {nodes} x {gpus} of them")
    told = list(_figures(folder / STEPS, start.step))
    if not told:
        raise PlanError(
            f"{folder} has told of no step since its last start ({STEPS}): let it train, or plan its configuration: "
            f"sptnet plan {folder / CONFIG} --nodes {nodes} --gpus {gpus}"
        )
    device = start.device or _device_of_log(folder / LOG)
    figures = [figure for figure, _ in told]
    memory, evaluated = 1e6 * max(figure.peak_memory_mb for figure in figures), told[-1][1]
    intervals = _intervals(figures, config.data.batch_size)
    return MeasuredRun(folder, config, strategy, nodes, gpus, precision, device, intervals, memory, evaluated)


def _last_start(folder: Path) -> _Start:
    starts = read_starts(folder)
    if not starts:
        raise PlanError(
            f"{folder} does not say what it ran on: no line of {STARTS} can be read; plan its configuration: sptnet "
            f"plan {folder / CONFIG} --nodes N --gpus G"
        )
    try:
        return typed(starts[-1], _Start)
    except DamagedError as error:
        raise PlanError(f"the last line of {folder / STARTS} is damaged: {error}") from None


def _figures(path: Path, start: int) -> Iterator[tuple[_Figures, bool]]:
    """Of steps since the last start, and whether an evaluation came before; damaged lines, and a file that is not
    there, tell nothing.
    """
    evaluated = False
    try:
        for record in records_of(path):
            if record is None or record["step"] < start:
                continue
            if "phase" not in record:
                evaluated = True
                continue
            with suppress(DamagedError):
                yield typed(record, _Figures), evaluated
    except OSError:
        return


def _intervals(figures: Sequence[_Figures], batch: int) -> Sequence[Told]:
    """One of every write; the figures of a write are the same in its lines. The first has the start in it."""

    def of_write(figure: _Figures) -> tuple[Any, ...]:
        return figure.images_per_s, figure.data_wait_s_per_step, figure.share_of_matmul_peak

    told = []
    for (speed, waited, share), lines in groupby(figures, of_write):
        phases = {line.phase for line in lines}
        told.append((phases, Told(phases.pop() if len(phases) == 1 else "", batch / speed, waited, share)))
    return [interval for _, interval in told[1:] if interval.phase]


def _device_of_log(path: Path) -> str | None:
    """The kind of device that the last header of log.txt names, behind `2 x`; None where none does."""
    try:
        lines = read_regular(path, LARGEST).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    headers = [line.split()[-1] for line in lines if " strategy: " in line]
    return headers[-1] if headers and headers[-1] in ("cpu", "cuda") else None
