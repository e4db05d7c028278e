"""From a configuration, a dataset's counts and a cluster to the plan of a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sptnet.build import build_schedule, build_untrained, images_of_rank
from sptnet.config import Config
from sptnet.data.cache_room import beyond
from sptnet.data.tokens import TokenShape
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.dataset import Counts
from sptnet.plan.fake_ranks import Numberless, pretending
from sptnet.plan.hardware import LOADED, READ, PlanError
from sptnet.plan.largest import Curve, curves, images_that_fit
from sptnet.plan.memory_settings import in_words, memory_settings_that_fit
from sptnet.plan.planned import Cluster, Line, Plan, Stored, Trials, steps_of
from sptnet.plan.seconds import Seconds, seconds_of
from sptnet.plan.trial import Phase, Trial
from sptnet.plan.zero import FLOAT, with_zero
from sptnet.run.provenance import Size, size_of
from sptnet.run.throughput import work_of_steps
from sptnet.strategy.frozen import frozen_bytes, place_frozen
from sptnet.strategy.launcher import LaunchSettings, StrategyName
from sptnet.trunk_cache import does_not_pay, impossible, limit_of, stored_type

STRATEGIES: tuple[StrategyName, ...] = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MOST_RANKS = 16_384


def plan_run(
    config: Config, counts: Counts, cluster: Cluster, strategies: Sequence[StrategyName], largest: bool = True
) -> Plan:  # fmt: skip
    """Plan a run.

    Args:
        largest: find the largest batch too, which takes a few more trials.

    Raises:
        PlanError: more ranks than are planned, fewer images than a batch has, an unknown rate.
        ConfigError, BackboneError: a configuration that does not fit.
    """
    config = config.model_copy(update={"compile": False})  # what it will keep and save is not known before it compiles
    batch, ranks = config.data.batch_size, cluster.ranks
    cluster.machine.check(cluster.precision)
    if ranks > MOST_RANKS:
        raise PlanError(f"{cluster.nodes} x {cluster.gpus} = {ranks} ranks: at most {MOST_RANKS:,} are planned")
    images_of_rank(config, ranks, f"{cluster.nodes} x {cluster.gpus} = {ranks} ranks")
    steps_per_epoch = (counts.labelled + counts.unlabelled) // batch
    if steps_per_epoch == 0:
        raise PlanError(f"data.batch_size is {batch}, more than the {counts.labelled + counts.unlabelled} images")
    with Numberless():
        model, prompt = build_untrained(config, counts.old, counts.classes - counts.old)
    schedule, size = build_schedule(config, steps_per_epoch), size_of(model, prompt)
    model.round_tokens = stored_type(config, model)
    planner = Planner(config, counts, cluster, schedule, model.to("meta"), prompt and prompt.to("meta"), size)
    return planner.plan(strategies, largest)


def possible_on(cluster: Cluster, asked: str) -> Sequence[StrategyName]:
    """The strategies that make sense on so many ranks: the one that is asked for, or all.

    Raises:
        PlanError: it does not, with what would; or there is none of this name.
    """
    one, many = cluster.ranks == 1, cluster.nodes > 1 and cluster.gpus > 1
    names = [name for name in STRATEGIES if (name == "single") == one and (many or name != "hsdp")]
    if asked == "all":
        return names
    if asked not in STRATEGIES:
        raise PlanError(f"--strategy {asked[:80]}: use all, {', '.join(STRATEGIES)}")
    if asked in names:
        return [name for name in names if name == asked]
    where = f"--strategy {asked} on {cluster.nodes} x {cluster.gpus} GPUs"
    if one:
        raise PlanError(f"{where}: there is nobody to share with, use --strategy single")
    if asked == "single":
        raise PlanError(f"{where}: it is for one process, use --nodes 1 --gpus 1, or --strategy ddp")
    raise PlanError(
        f"{where}: it shards inside of a node and copies between nodes, so it takes two nodes or more of two GPUs or "
        "more; use --strategy fsdp2"
    )


def _has_trial(name: StrategyName) -> bool:
    """Whether a strategy's own code is run; of the others a rank that shares nothing but the loss says all."""
    return name != "single" and not name.startswith("zero")


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
        self.not_kept = self._why_not_kept()
        self.cached = stored_type(self.config, self.model) is not None and not self.not_kept
        self.states = 1 if self.config.optimizer.name == "sgd" else 2  # that the optimizer keeps of a parameter

    def _why_not_kept(self) -> str:
        """Why the run keeps no tokens that it could keep, as `trunk_cache` decides it; "" where it does, or has none.

        Raises ConfigError as the run would.
        """
        config = self.config
        if stored_type(config, self.model) is None:
            return ""
        if config.trunk_cache == "off":
            return "trunk_cache is off"
        too_large = beyond(self._kept_bytes(), limit_of(config))
        if config.trunk_cache != "auto":
            if too_large:
                raise impossible(config, too_large)
            return ""
        return too_large or does_not_pay(
            self._views_made(), 2 * self.schedule.total_steps * self.config.data.batch_size
        )

    def _views_made(self) -> int:
        """Views that go through the trunk to be kept: the known ones, and the one that is evaluated."""
        views, counts = self.config.data.views or 0, self.counts
        return views * (counts.labelled + counts.unlabelled) + counts.unlabelled + counts.test

    def plan(self, names: Sequence[StrategyName], largest: bool) -> Plan:
        """The plan, with the largest batches where they are asked for."""
        share, row = self.config.data.batch_size // self.cluster.ranks, self._row() if self.cached else None
        work = work_of_steps(self.model, self.prompt, share, None if row is None else (row.tokens, row.width))
        trials: dict[StrategyName, Trials] = {}
        for name in names:
            if _has_trial(name):
                trials[name] = self._counted(name)
        alone, found = None, None
        if largest or len(trials) < len(names):
            with self.trial("single") as trial:
                alone = trial.run()
                trials |= {name: self._without_trial(name, alone) for name in names if name not in trials}
                if self.cluster.usable and largest:
                    found = curves(trial, alone, trials, self.cluster)
        steps, evaluations = steps_of(self.schedule), -(-self.schedule.epochs // self.config.evaluate.every)
        lines = [
            self._line(name, trials[name], self._largest(trials[name], alone, found), steps, evaluations)
            for name in names
        ]
        out = "" if any(line.fits for line in lines) else self._way_out(min(lines, key=lambda line: line.peak))
        return Plan(
            self.config, self.counts, self.cluster, self.schedule, self.size, steps, evaluations, lines,
            self._stored(), work, out,
        )  # fmt: skip

    def _way_out(self, least: Line) -> str:
        """One line for a run that fits nowhere."""
        cluster, name = self.cluster, least.strategy

        def trial_of(config: Config) -> Trials:
            return replace(self, config=config)._counted(name)

        needed, room = in_words(least.peak), in_words(cluster.usable)
        out = memory_settings_that_fit(self.config, cluster, least.counted, trial_of)
        return (
            f"does not fit: {name} takes least, {needed} of the {room} that tensors may have of a "
            f"{cluster.machine.name}; {out}"
        )

    def _counted(self, name: StrategyName) -> Trials:
        with self.trial(name if _has_trial(name) else "single") as trial:
            return trial.run() if _has_trial(name) else self._without_trial(name, trial.run())

    @contextmanager
    def trial(self, name: StrategyName) -> Iterator[Trial]:
        """Of a strategy; `single`: on a rank that shares nothing but the loss, however many there are."""
        cluster, config = self.cluster, self.config
        if config.memory.frozen_blocks == "auto" and cluster.machine.memory:  # of the machine that is planned, not here
            whole = place_frozen("auto", frozen_bytes(self.model), cluster.machine.memory).whole
            memory = config.memory.model_copy(update={"frozen_blocks": "whole" if whole else "sharded"})
            config = config.model_copy(update={"memory": memory})
        shard = cluster.gpus if name == "hsdp" else cluster.ranks
        launch = LaunchSettings(name, cluster.ranks, cluster.precision, shard)
        with pretending(
            config, self.model, self.prompt, self.schedule, launch, self.cached, wrapped=name != "single"
        ) as trial:  # fmt: skip
            yield trial

    def fits(self, counted: Trials) -> bool:
        room = self.cluster.usable
        return not room or max(found.peak for found in counted.values()) <= room

    def _without_trial(self, name: StrategyName, alone: Trials) -> Trials:
        """A strategy by what a rank has that shares nothing but the loss."""
        if name == "single":
            return alone
        return {
            phase: with_zero(counted, phase, int(name[-1]), self.cluster.ranks, self.model, self.states)
            for phase, counted in alone.items()
        }

    def _largest(
        self, counted: Trials, alone: Trials | None, found: Mapping[bool, Curve] | None
    ) -> tuple[int | None, int | None]:
        """The largest global batches, as configured and with all blocks checkpointed; None where they are unknown."""
        if alone is None or found is None:
            return None, None
        # a batch is a multiple of the ranks, and of what the streams deal
        step = math.lcm(2 * self.config.data.streams, self.cluster.ranks)
        most = [images_that_fit(counted, alone, found[full], self.cluster) for full in (False, True)]
        plain, checkpointed = (images * self.cluster.ranks // step * step for images in most)
        return plain, checkpointed

    def _line(
        self, name: StrategyName, counted: Trials, largest: tuple[int | None, int | None],
        steps: dict[Phase, int], evaluations: int,
    ) -> Line:  # fmt: skip
        config, cluster = self.config, self.cluster
        share = config.data.batch_size // cluster.ranks
        of_step = 2 * share * self._row().row_bytes / READ if self.cached else share / LOADED
        seconds: dict[Phase, Seconds] = {}
        for phase, found in counted.items():
            assert found.work is not None
            loading = of_step if phase != "evaluation" else config.evaluate.batch_size / LOADED
            seconds[phase] = seconds_of(found.work, cluster.machine, cluster.network, loading, config.data.workers)
        looked_at = self.counts.unlabelled + self.counts.test
        batches = -(-looked_at // config.evaluate.batch_size)
        rounds = -(-batches // cluster.ranks)  # of forward passes, by the rank that has most
        seconds["evaluation"] = Seconds(*(rounds * part for part in seconds["evaluation"]))
        total = sum(count * seconds[phase].total for phase, count in steps.items())
        # passes of all evaluated images through the trunk; evaluations on the way, but for the last, read what is kept
        through = 1 + self._views_made() / looked_at if self.cached else evaluations
        hours = (total + through * seconds["evaluation"].total) / 3600
        return Line(name, counted, *largest, self.fits(counted), seconds, hours, name.startswith("zero"))

    def _stored(self) -> Stored:
        """Bytes on disk: a checkpoint has what is trained, the prompt, and what their optimizers keep of each."""
        checkpoint = FLOAT * ((1 + self.states) * self.size.trained + 2 * self.size.prompt)
        if self.config.checkpoint.full:
            checkpoint += FLOAT * self.size.frozen
        kept, cache = self.config.checkpoint.keep, self._kept_bytes() if self.cached else None
        whole = FLOAT * (self.size.trained + self.size.frozen + self.size.prompt)
        return Stored(self.counts.bytes, checkpoint, kept * checkpoint, whole, cache, self.not_kept)

    def _kept_bytes(self) -> int:
        """Of the tokens of all images."""
        row, counts = self._row(), self.counts
        rows = counts.labelled * row.rows_of("labelled") + counts.unlabelled * row.rows_of("unlabelled")
        return (rows + counts.test * row.rows_of("test")) * row.row_bytes

    def _row(self) -> TokenShape:
        """Of the tokens of one view."""
        backbone, views = self.model.backbone, self.config.data.views
        assert views is not None
        patches = (self.model.image_size // self.model.patch_size) ** 2
        tokens = patches + int(backbone.num_prefix_tokens)
        return TokenShape(views, tokens, int(backbone.embed_dim), self.config.data.tokens)
