"""The plan of a run: every strategy, both phases, and one recommendation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sptnet.build import build_schedule, build_untrained
from sptnet.config import Config
from sptnet.config_sections import MANY
from sptnet.data.tokens import TokenShape
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.dataset import Counts
from sptnet.plan.hardware import SPARE, Machine, PlanError
from sptnet.plan.pretend import pretended
from sptnet.plan.seconds import Network, Seconds, seconds_of
from sptnet.plan.trial import Counted, Phase
from sptnet.plan.zero import with_zero
from sptnet.run.provenance import Size, size_of
from sptnet.strategy.connect import LaunchSettings, Precision, StrategyName
from sptnet.strategy.frozen import frozen_bytes, place_frozen
from sptnet.trunk_cache import stored_type

STRATEGIES: tuple[StrategyName, ...] = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
FLOAT = 4  # bytes of what is trained, in every precision
TRIED = 16_384  # images of the largest global batch that is tried: the objective's rows come in ever more pieces
SIMPLER = 0.95  # a strategy is taken before a simpler one only where it takes less than this share of its time
Trials = dict[Phase, Counted]
Curve = dict[int, dict[Phase, int]]  # peaks in bytes by phase, by images of a rank


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
        largest, largest_checkpointed: images of the largest global batch that fits, by lines through three counted
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


@dataclass(frozen=True)
class Stored:
    """Bytes on disk. `shards`, `cache`: None where they are not known, or there is none."""

    shards: int | None
    checkpoint: int
    checkpoints: int
    model: int
    cache: int | None


@dataclass(frozen=True)
class Plan:
    """All of it."""

    config: Config
    counts: Counts
    cluster: Cluster
    schedule: Schedule
    size: Size
    steps: dict[Phase, int]
    evaluations: int
    lines: Sequence[Line]
    stored: Stored

    @property
    def recommended(self) -> tuple[Line | None, str]:
        """The line to take, and why; None where nothing fits, with the way out."""
        fitting = [line for line in self.lines if line.fits]
        if not fitting:
            return None, self.way_out()
        best = fitting[0]  # the simplest first
        for line in fitting[1:]:
            if line.hours < SIMPLER * best.hours:
                best = line
        if best is fitting[0] and len(fitting) < len(self.lines) and self.lines[0] is not best:
            return best, "the simplest that fits"
        if best is fitting[0]:
            return best, "it fits, and nothing more complicated is planned to be 5% faster"
        return best, f"planned {best.hours:.2f} h, {fitting[0].strategy} {fitting[0].hours:.2f} h"

    def way_out(self) -> str:
        """One line for a run that fits nowhere."""
        room, least = self.cluster.usable, min(self.lines, key=lambda line: line.peak)
        told = (
            f"does not fit: {least.strategy} takes least, {least.peak / 1e9:.1f} GB of the {room / 1e9:.1f} GB that "
            f"tensors may have of a {self.cluster.machine.name}"
        )
        batch, most = self.config.data.batch_size, max(line.largest_checkpointed or 0 for line in self.lines)
        if most >= batch:
            return f"{told}; memory.gradient_checkpointing=full lets batches up to {most} in"
        if most:
            factor = -(-batch // most)
            return (
                f"{told}; try memory.gradient_checkpointing=full memory.micro_batches={factor}, or {factor} x the GPUs"
            )
        return f"{told}; no batch does: take a smaller model.backbone or model.image_size"


def plan_run(
    config: Config, counts: Counts, cluster: Cluster, strategies: Sequence[StrategyName], largest: bool = True
) -> Plan:  # fmt: skip
    """Plan a run.

    Args:
        largest: find the largest batch too, which takes three more trials; done all the same where a strategy does
            not fit.

    Raises:
        PlanError: strategies, ranks and batch that do not go together; an unknown rate.
        ConfigError, BackboneError: a configuration that does not fit.
    """
    batch, ranks = config.data.batch_size, cluster.ranks
    cluster.machine.check(cluster.precision)
    if batch % ranks:
        raise PlanError(f"data.batch_size {batch} cannot be dealt to {cluster.nodes} x {cluster.gpus} = {ranks} ranks")
    steps_per_epoch = (counts.labelled + counts.unlabelled) // batch
    if steps_per_epoch == 0:
        raise PlanError(f"data.batch_size is {batch}, more than the {counts.labelled + counts.unlabelled} images")
    model, prompt = build_untrained(config, counts.old, counts.classes - counts.old)
    schedule, size = build_schedule(config, steps_per_epoch), size_of(model, prompt)
    model.round_tokens = stored_type(config, model)
    planner = Planner(config, counts, cluster, schedule, model.to("meta"), prompt and prompt.to("meta"), size)
    return planner.plan([name for name in strategies if possible(name, cluster)], largest)


def possible(name: StrategyName, cluster: Cluster) -> bool:
    """Whether a strategy makes sense on so many ranks: hsdp shards inside of a node, and copies between nodes."""
    if cluster.ranks == 1:
        return name == "single"
    return name != "single" and (name != "hsdp" or (cluster.nodes > 1 and cluster.gpus > 1))


@dataclass
class Planner:
    """What the parts of a plan are made from; model and prompt are on the meta device."""

    config: Config
    counts: Counts
    cluster: Cluster
    schedule: Schedule
    model: PromptedViT
    prompt: Prompt | None
    size: Size

    def __post_init__(self) -> None:
        self.cached = stored_type(self.config, self.model) is not None and self.config.trunk_cache != "off"
        self.images = self.config.data.batch_size // self.cluster.ranks

    def plan(self, strategies: Sequence[StrategyName], largest: bool) -> Plan:
        """The plan, with the largest batches where they are asked for, or something does not fit."""
        if not strategies:
            raise PlanError(f"none of the strategies can be run on {self.cluster.ranks} processes")
        trials = {name: self._of_strategy(name) for name in strategies}
        fits = all(self.fits(counted) for counted in trials.values())
        wanted = (largest or not fits) and self.cluster.usable > 0
        curves = self._curves(trials[strategies[0]]) if wanted else None
        steps, evaluations = steps_of(self.schedule), self._evaluations()
        lines = [self._line(name, counted, curves, steps, evaluations) for name, counted in trials.items()]
        stored = self._stored()
        return Plan(
            self.config, self.counts, self.cluster, self.schedule, self.size, steps, evaluations, lines, stored
        )  # fmt: skip

    def _trial(self, name: StrategyName, config: Config) -> Trials:
        """Counted; `single`: on a rank that shares nothing but the loss, however many there are."""
        cluster = self.cluster
        if config.memory.frozen_blocks == "auto" and cluster.machine.memory:  # of the machine that is planned, not here
            whole = place_frozen("auto", frozen_bytes(self.model), cluster.machine.memory).whole
            memory = config.memory.model_copy(update={"frozen_blocks": "whole" if whole else "sharded"})
            config = config.model_copy(update={"memory": memory})
        shard = cluster.gpus if name == "hsdp" else cluster.ranks
        launch = LaunchSettings(name, cluster.ranks, cluster.precision, shard)
        return pretended(
            config, self.model, self.prompt, self.schedule, launch, tokens=self.cached, wrapped=name != "single"
        )  # fmt: skip

    @cached_property
    def alone(self) -> Trials:
        """Of a rank that shares nothing but the loss."""
        return self._trial("single", self.config)

    def fits(self, counted: Trials) -> bool:
        room = self.cluster.usable
        return not room or max(found.peak for found in counted.values()) <= room

    def _of_strategy(self, name: StrategyName) -> Trials:
        if name == "single":
            return self.alone
        if not name.startswith("zero"):
            return self._trial(name, self.config)
        stage, trained, frozen = int(name[-1]), FLOAT * self.size.trained, FLOAT * self.size.frozen
        states = 1 if self.config.optimizer.name == "sgd" else 2
        return {
            phase: with_zero(counted, phase, stage, self.cluster.ranks, trained, frozen, states)
            for phase, counted in self.alone.items()
        }

    def _curves(self, first: Trials) -> dict[bool, Curve]:
        """Peaks of `alone` by images of a rank, without further and with full checkpointing: at this batch, at twice as
        many images, and near the largest that lets `first`, a strategy's trials, fit, or at TRIED images of all ranks.
        """
        full = self.config.memory.model_copy(update={"gradient_checkpointing": "full"})
        found = {}
        for checkpointed in (False, True):
            config = self.config.model_copy(update={"memory": full}) if checkpointed else self.config
            curve = (
                {self.images: self._peaks(config, self.images)} if checkpointed else {self.images: peaks(self.alone)}
            )
            curve[2 * self.images] = self._peaks(config, 2 * self.images)
            # the objective's matrices grow with the square of the batch: beyond two points a line would be too low
            guess = min(self._images(first, curve), TRIED // self.cluster.ranks)
            if guess > 2 * self.images:
                curve[guess] = self._peaks(config, guess)
            found[checkpointed] = curve
        return found

    def _peaks(self, config: Config, images: int) -> dict[Phase, int]:
        data = config.data.model_copy(update={"batch_size": images * self.cluster.ranks})
        return peaks(self._trial("single", config.model_copy(update={"data": data})))

    def _images(self, counted: Trials, curve: Curve) -> int:
        """Images of a rank that fit, by straight lines between the points of a curve, and beyond the last two."""
        points = sorted(curve)
        most = float("inf")
        for phase, found in counted.items():
            room = self.cluster.usable - (found.peak - self.alone[phase].peak)
            inside = [n for n in points if curve[n][phase] <= room]
            at = min(points.index(inside[-1]) if inside else 0, len(points) - 2)
            low, high = points[at], points[at + 1]
            slope = (curve[high][phase] - curve[low][phase]) / (high - low)
            if slope > 0:
                most = min(most, low + (room - curve[low][phase]) / slope)
            elif curve[low][phase] > room:
                most = 0.0
        return int(min(max(most, 0.0), MANY))

    def _largest(self, counted: Trials, curve: Curve) -> int | None:
        if not self.cluster.usable:
            return None
        # a batch is a multiple of the ranks, and of what the streams deal
        step = math.lcm(2 * self.config.data.streams, self.cluster.ranks)
        return self._images(counted, curve) * self.cluster.ranks // step * step

    def _line(
        self, name: StrategyName, counted: Trials, curves: dict[bool, Curve] | None,
        steps: dict[Phase, int], evaluations: int,
    ) -> Line:  # fmt: skip
        config, cluster = self.config, self.cluster
        loaded = 0 if self.cached else self.images
        seconds: dict[Phase, Seconds] = {}
        for phase, found in counted.items():
            assert found.work is not None
            images = loaded if phase != "evaluation" else config.evaluate.batch_size
            seconds[phase] = seconds_of(found.work, cluster.machine, cluster.network, images, config.data.workers)
        looked_at = self.counts.unlabelled + self.counts.test
        batches = -(-looked_at // config.evaluate.batch_size)
        rounds = -(-batches // cluster.ranks)  # of forward passes, by the rank that has most
        seconds["evaluation"] = Seconds(*(rounds * part for part in seconds["evaluation"]))
        total = sum(count * seconds[phase].total for phase, count in steps.items())
        hours = (total + evaluations * seconds["evaluation"].total) / 3600
        largest = [None if curves is None else self._largest(counted, curves[full]) for full in (False, True)]
        return Line(
            name, counted, largest[0], largest[1], self.fits(counted), seconds, hours, name.startswith("zero")
        )  # fmt: skip

    def _evaluations(self) -> int:
        return -(-self.schedule.epochs // self.config.evaluate.every)

    def _stored(self) -> Stored:
        """Bytes on disk: a checkpoint has what is trained, the prompt, and what their optimizers keep of each."""
        states = 1 if self.config.optimizer.name == "sgd" else 2
        checkpoint = FLOAT * ((1 + states) * self.size.trained + 2 * self.size.prompt)
        if self.config.checkpoint.full:
            checkpoint += FLOAT * self.size.frozen
        kept, cache = self.config.checkpoint.keep, None
        counts = self.counts
        if self.cached and self.config.data.views is not None:
            tokens = self._tokens()
            shape = TokenShape(self.config.data.views, *tokens, self.config.data.tokens)
            rows = counts.labelled * shape.rows_of("labelled") + counts.unlabelled * shape.rows_of("unlabelled")
            cache = (rows + counts.test * shape.rows_of("test")) * shape.row_bytes
        whole = FLOAT * (self.size.trained + self.size.frozen + self.size.prompt)
        return Stored(counts.bytes, checkpoint, kept * checkpoint, whole, cache)

    def _tokens(self) -> tuple[int, int]:
        """Tokens of an image, and their width."""
        backbone = self.model.backbone
        patches = (self.model.image_size // self.model.patch_size) ** 2
        return patches + int(backbone.num_prefix_tokens), int(backbone.embed_dim)


def peaks(counted: Trials) -> dict[Phase, int]:
    """Bytes at the peak of each phase."""
    return {phase: found.peak for phase, found in counted.items()}


def steps_of(schedule: Schedule) -> dict[Phase, int]:
    """How many steps a run takes in each phase."""
    total, period = schedule.total_steps, 2 * schedule.k
    if schedule.phase_schedule == "model_only":
        return {"model": total}
    if schedule.phase_schedule == "reference":
        period = schedule.steps_per_epoch
    counts: dict[Phase, int] = {"prompt": 0, "model": 0}
    for begin, end, times in ((0, period, total // period), (total // period * period, total, 1)):
        for step in range(begin, end):
            counts[schedule.phase(step)] += times
    return counts
