"""What a plan is: what it is for, a line of every strategy, and one recommendation."""

from collections.abc import Sequence
from dataclasses import dataclass

from sptnet.config import Config
from sptnet.method.schedule import Schedule
from sptnet.plan.dataset import Counts
from sptnet.plan.hardware import SPARE, Machine
from sptnet.plan.seconds import Network, Seconds
from sptnet.plan.trial import Counted, Phase
from sptnet.run.provenance import Size
from sptnet.strategy.launcher import Precision, StrategyName

SIMPLER = 0.95  # a strategy is taken before a simpler one only where it takes less than this share of its time
Trials = dict[Phase, Counted]


@dataclass(frozen=True)
class Cluster:
    """What a run is to be on: `nodes` of `gpus` machines, in a precision."""

    nodes: int
    gpus: int
    machine: Machine
    precision: Precision
    network: Network

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors may take; 0 where it is not known."""
        return int(self.machine.memory * (1 - SPARE))


@dataclass(frozen=True)
class Line:
    """A strategy's part of the plan.

    Attributes:
        largest, largest_checkpointed: images of the largest global batch that fits, by lines through a few counted
            batches, with gradient checkpointing as configured and with all of it; 0 where none does, None where the
            memory is not known, or nobody asked.
        seconds: of a step, by phase; `evaluation`: of all images once.
        formula: the bytes are by a formula, not counted.
    """

    strategy: StrategyName
    counted: Trials
    largest: int | None
    largest_checkpointed: int | None
    fits: bool
    seconds: dict[Phase, Seconds]
    hours: float
    formula: bool

    @property
    def peak(self) -> int:
        return max(counted.peak for counted in self.counted.values())

    @property
    def peak_of_steps(self) -> int:
        """Before anything was evaluated."""
        return max(counted.peak for phase, counted in self.counted.items() if phase != "evaluation")


@dataclass(frozen=True)
class Stored:
    """Bytes on disk. `shards`, `cache`: None where they are not known, or there is none.

    Attributes:
        not_kept: why there are no tokens where there could be.
    """

    shards: int | None
    checkpoint: int
    checkpoints: int
    model: int
    cache: int | None
    not_kept: str


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        work: floating-point operations of a rank's step, by phase, without what is computed again.
        remedy: one line, where the run fits under no strategy.
    """

    config: Config
    counts: Counts
    cluster: Cluster
    schedule: Schedule
    size: Size
    steps: dict[Phase, int]
    evaluations: int
    lines: Sequence[Line]
    stored: Stored
    work: dict[str, float]
    remedy: str = ""

    @property
    def recommended(self) -> tuple[Line | None, str]:
        """The line to take, and why; None where nothing fits, with the way out."""
        fitting = [line for line in self.lines if line.fits]
        if not fitting:
            return None, self.remedy
        best = fitting[0]  # the simplest first
        for line in fitting[1:]:
            if line.hours < SIMPLER * best.hours:
                best = line
        if best is fitting[0] and len(fitting) < len(self.lines) and self.lines[0] is not best:
            return best, "it is the simplest that fits"
        if best is fitting[0]:
            return best, "it fits, and nothing more complicated is planned to be 5% faster"
        return best, f"planned {best.hours:.2f} h, {fitting[0].strategy} {fitting[0].hours:.2f} h"


def steps_of(schedule: Schedule) -> dict[Phase, int]:
    """How many steps a run takes in each phase."""
    total, k, each = schedule.total_steps, schedule.k, schedule.steps_per_epoch
    if schedule.phase_schedule == "model_only":
        return {"model": total}

    def prompts(steps: int) -> int:
        """Of the first steps of k of the one and k of the other, in turn."""
        return steps // (2 * k) * k + min(steps % (2 * k), k)

    # in the reference's every epoch begins anew, with the second step of a turn
    prompt = total // each * (prompts(each + 1) - 1) if schedule.phase_schedule == "reference" else prompts(total)
    return {"prompt": prompt, "model": total - prompt}
