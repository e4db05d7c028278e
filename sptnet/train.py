"""The training loop: SPTNet's two alternating phases, or SimGCD's single one.

`accelerate launch --config_file launch/ddp.yaml -m sptnet train CONFIG [section.key=value ...]`
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sptnet.build import build_data, build_loss, build_model, build_schedule
from sptnet.config import Config, ConfigError, OptimizerConfig
from sptnet.data.batches import Batch
from sptnet.data.loader import train_batches
from sptnet.data.manifest import Kind
from sptnet.data.on_device import on_device
from sptnet.data.order import BatchOrder
from sptnet.data.store import Store
from sptnet.data.tokens import DamagedTokensError, Tokens
from sptnet.evaluate import evaluate, save_evaluation
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.objective import Said
from sptnet.run.checkpoint import CheckpointError, is_of_run, remove_from
from sptnet.run.folder import check_unfinished, mark_finished, open_run
from sptnet.run.following import Following
from sptnet.run.lock import RunLock
from sptnet.run.metrics_log import MetricsLog
from sptnet.run.model_file import ModelFacts, save_model
from sptnet.run.outcome import naming_step
from sptnet.run.provenance import describe, record_start, size_of, warnings
from sptnet.run.resume import agree_where_to_continue, backbone_of, numbers_of, restore
from sptnet.run.saving import Saver
from sptnet.run.signals import StopRequest
from sptnet.run.throughput import Throughput, matmul_peak, work_of_steps
from sptnet.run.tolerance import NonFiniteGuard, ReplacedSamples
from sptnet.run.trackers import Trackers, named_trackers
from sptnet.steps import Learner, Taken
from sptnet.strategy.base import DTYPES, make_momentum, parameter_groups
from sptnet.strategy.collectives import rank, world_size
from sptnet.strategy.connect import LaunchSettings, connect, record_collectives
from sptnet.strategy.create import create_strategy
from sptnet.strategy.kernels import choose_kernels
from sptnet.strategy.recompute import checkpoint_blocks
from sptnet.trunk_cache import TrunkCache, choose, make, stored_type


def train(config: Config) -> bool:
    """Train a run from its first step, or from where it stood, to its last, evaluating on the way and at the end.

    The model that counts is the last one: nothing is selected on labels that a method must not see.

    Returns:
        Whether the run is finished; False if it was asked to stop and left a checkpoint to continue from.

    Raises:
        ConfigError, DatasetError, BackboneError, RunError, StrategyError, CheckpointError: before the first step.
        DatasetError, EvaluationError, CheckpointError, NonFiniteError: on the way; the last checkpoint stays.
    """
    check_unfinished(config)
    trackers = named_trackers(config)
    with StopRequest() as stop:  # also of signals that come while everything is built: the first step is the last then
        try:
            run, header = prepare(config, stop)
        except StoppedError:
            return False
        try:
            first = rank() == 0
            if first:
                open_run(config, run.start)
            record_start(Path(config.run), run.start, run.learner.strategy.launch)
            told = Trackers(config, trackers if first else (), run.start)
            with MetricsLog(config, run.schedule.total_steps, run.start, run.figures, told, active=first) as log:
                log.summary(f"sptnet train: {config.run}", header)
                for warning in warnings(config, run.schedule, run.learner.strategy.module.train_from_block):
                    log.line(f"warning: {warning}")
                finished = run_steps(run, log, stop)
            run.learner.strategy.accelerator.wait_for_everyone()
        finally:
            if run.lock is not None:
                run.lock.release()
    return finished


class StoppedError(Exception):
    """Asked to stop, on all ranks at once."""


@dataclass
class Run:
    """What a run is made of.

    Attributes:
        start: the first step to be taken.
        continues: the checkpoint that it goes on from.
        lock: rank 0's, on the run's folder.
        cache: of what the frozen trunk makes of the views; None where they go through it.
        used: [K] bool, the classes predicted in the steps that the next figures tell of.
    """

    config: Config
    store: Store
    order: BatchOrder
    schedule: Schedule
    learner: Learner
    saver: Saver
    throughput: Throughput
    replaced: ReplacedSamples
    guard: NonFiniteGuard
    start: int
    continues: Path | None
    lock: RunLock | None
    cache: TrunkCache | None
    used: Tensor | None = None

    @property
    def tokens(self) -> Tokens | None:
        return None if self.cache is None else self.cache.tokens

    def batches(self) -> Iterator[Batch]:
        """This rank's slices of the steps to come; how long each is waited for goes into the throughput."""
        config = self.config
        batches = train_batches(
            self.store, self.order, augment=config.data.augment, image_size=config.model.image_size, seed=config.seed,
            steps=range(self.start, self.schedule.total_steps), views_at=self.learner.views_at,
            known_views=config.data.views, tokens=self.tokens, workers=config.data.workers, rank=rank(),
            world_size=world_size(), tolerated=config.data.tolerate_bad_samples,
        )  # fmt: skip
        return self.throughput.waiting(batches)

    def evaluation_is_due(self, done: int) -> bool:
        """Whether a run is evaluated when `done` steps are done: every few epochs, and at its end."""
        every = self.config.evaluate.every * self.schedule.steps_per_epoch
        return done > 0 and (done == self.schedule.total_steps or done % every == 0)

    def note(self, taken: Taken, launched: float) -> None:
        """A step is over, which had been launched at some second: count it into the figures."""
        self.throughput.step(taken.phase, launched)
        self.used = taken.used if self.used is None else self.used | taken.used

    def figures(self) -> dict[str, float]:
        """What the metrics tell of the steps since they were last written."""
        used, self.used = self.used, None
        figures = self.throughput.interval() | {"classes_used": 0 if used is None else int(used.sum())}
        if stall := self.saver.pop_stall_seconds():
            figures["checkpoint_stall_s"] = round(stall, 4)
        return figures


def prepare(config: Config, stop: StopRequest) -> tuple[Run, dict[str, object]]:
    """Everything of a run, put back to where it stood, and the header that says what it is; all ranks call it.

    Raises:
        StoppedError: asked to stop while tokens were made; what is made stays.
    """
    store, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, store.manifest)
    record_collectives(Path(config.run))
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    choose_kernels(accelerator.device, config.matmul_precision, config.deterministic)
    if config.data.batch_size % launch.world_size:
        raise ConfigError(f"data.batch_size {config.data.batch_size} cannot be dealt to {launch.world_size} processes")
    share = config.data.batch_size // launch.world_size
    if config.memory.micro_batches > share:
        raise ConfigError(f"memory.micro_batches is {config.memory.micro_batches}, more than a rank's {share} images")
    # all this is of the whole model: a strategy may take it apart
    numbers, backbone = numbers_of(config, store.manifest, model.statistics), backbone_of(config, model)
    size = size_of(model, prompt)
    chosen = choose(
        config, store, model, backbone["sha256"], accelerator.device, launch.precision,
        schedule.total_steps * config.data.batch_size,
    )  # fmt: skip
    cache = None if isinstance(chosen, str) else chosen
    if cache is not None:
        make(cache, config, store, model, accelerator.device, stop.here)
        if stop.on_any_rank(accelerator.device):
            raise StoppedError
    model.round_tokens = stored_type(config, model)
    row = None if cache is None else (cache.tokens.shape.tokens, cache.tokens.shape.width)
    work = work_of_steps(model, prompt, config.data.batch_size // launch.world_size, row)
    peak = matmul_peak(accelerator.device, DTYPES.get(launch.precision, torch.float32))
    learner = assemble(config, accelerator, launch, model, prompt, schedule)
    continues, lock = agree_where_to_continue(config)
    run = Run(
        config, store, order, schedule, learner,
        saver=Saver(config, learner, numbers, backbone),
        throughput=Throughput(config.data.batch_size, launch.world_size, accelerator.device, work, peak),
        replaced=ReplacedSamples(config.data.tolerate_bad_samples),
        guard=NonFiniteGuard(config, scaled=launch.precision == "fp16"),
        start=0, continues=continues, lock=lock, cache=cache,
    )  # fmt: skip
    if run.continues is not None:
        saved = restore(run.continues, learner, numbers, backbone, config.resume.allow)
        if saved.step > schedule.total_steps:
            raise CheckpointError(
                f"{run.continues} is of step {saved.step}, beyond the {schedule.total_steps} of this schedule: raise "
                "schedule.epochs, or start anew with resume=none"
            )
        run.start, run.replaced.total = saved.step, int(saved.counters.get("bad_samples", 0))
        run.guard.skipped = int(saved.counters.get("skipped_steps", 0))
    if rank() == 0:
        own = run.continues is not None and is_of_run(run.continues, Path(config.run))
        remove_from(Path(config.run), run.start if own else -1)
    header = describe(config, learner, store.manifest, order, size, run.continues)
    if config.data.views is not None:
        told = chosen if isinstance(chosen, str) else chosen.where()
        header |= {"views": f"{config.data.views} of every image, known ones", "trunk cache": told}
    return run, header


def assemble(
    config: Config,
    accelerator: Accelerator,
    launch: LaunchSettings,
    model: PromptedViT,
    prompt: Prompt | None,
    schedule: Schedule,
) -> Learner:
    """Put model, prompt, their optimizers, the strategy and the loss together."""
    checkpoint_blocks(model, config.memory.gradient_checkpointing)
    images_per_rank = config.data.batch_size // launch.world_size
    strategy = create_strategy(
        accelerator, launch, model, lambda m: build_optimizer(config.optimizer, m), images_per_rank
    )  # fmt: skip
    prompt_optimizer = None
    if prompt is not None:
        prompt.to(accelerator.device)
        prompt_optimizer = torch.optim.SGD(
            prompt.parameters(), lr=config.prompts.lr, momentum=config.prompts.momentum, fused=True
        )
        make_momentum(prompt_optimizer, prompt.parameters())
    whole, pieces = config.loss.scope == "global", config.memory.micro_batches
    return Learner(strategy, build_loss(config), schedule, prompt, prompt_optimizer, whole, pieces)


def build_optimizer(spec: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of blocks and head; parameters that are not trained are not in it.

    Fused: one kernel for all parameters, which leaves out a step without the host's knowledge.
    """
    groups = parameter_groups(model, spec.weight_decay)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=spec.lr, fused=True)


def run_steps(run: Run, log: MetricsLog, stop: StopRequest) -> bool:
    """Take the steps that are left, or those until asked to stop; returns whether the run is finished."""
    config, total, done = run.config, run.schedule.total_steps, run.start
    following = Following(run.guard, run.replaced, run.note, log)
    # asked to stop, or killed, before it was evaluated: a checkpoint comes first
    stopped = run.evaluation_is_due(done) and not evaluate_now(run, log, done, stop)
    run.throughput.restart()
    strategy = run.learner.strategy
    batches = TwoAhead(iter(()) if stopped else run.batches(), stop)
    for batch, views, targets in on_device(batches, strategy.device, strategy.module.statistics):
        done = batch.step + 1
        with naming_step(run.schedule.phase(batch.step), batch.step):
            said = Said(stop.here(), run.replaced.told_where_met(batch))
            taken = run.learner.step(batch.step, views, targets, None, said)
            following.follow(batch, taken, facts_of(run, batch))  # reads what the step before it did
            stopped, due = following.stop, run.evaluation_is_due(done)
            if stopped or due or done % config.checkpoint.every == 0:
                following.catch_up()
                log.flush(durable=True)  # what is told of the steps before a checkpoint is on disk when it is
                run.saver.save(done, {"bad_samples": run.replaced.total, "skipped_steps": run.guard.skipped})
            if due and not stopped:
                run.saver.wait()  # an evaluation that fails ends the run: it is to begin again from here
                stopped = not evaluate_now(run, log, done, stop)
                run.throughput.restart()
            run.saver.poll()
        if stopped:
            break
    run.saver.wait()
    if batches.damage is not None:
        raise batches.damage
    if stopped:
        again = "the same command" if config.resume.source == "auto" else "the same command with resume=auto"
        log.line(f"asked to stop after step {done} of {total}: {again} continues")
    return not stopped


class TwoAhead:
    """Batches, the next two of which are read before a step is taken.

    Damaged tokens stop all ranks with a checkpoint: the others learn of it when the step after the next is launched,
    which this rank must be able to take.

    Attributes:
        damage: what was met; it is of this rank only.
    """

    def __init__(self, batches: Iterator[Batch], stop: StopRequest):
        self._batches, self._stop = batches, stop
        self.damage: DamagedTokensError | None = None

    def __iter__(self) -> Iterator[Batch]:
        ahead = [self._next(), self._next()]
        while (batch := ahead.pop(0)) is not None:
            ahead.append(self._next())
            yield batch

    def _next(self) -> Batch | None:
        if self.damage is not None:
            return None
        try:
            return next(self._batches, None)
        except DamagedTokensError as error:
            self.damage = error
            self._stop.ask()
            return None


def facts_of(run: Run, batch: Batch) -> dict[str, Any]:
    """What metrics.jsonl tells of a step beside its losses, without asking the device."""
    schedule, step = run.schedule, batch.step
    facts = {"step": step, "epoch": schedule.epoch(step), "phase": schedule.phase(step)}
    rates = {"model_lr": schedule.model_lr_at(step)}
    if run.learner.prompt is not None:
        rates["prompt_lr"] = schedule.prompt_lr_at(step)
    return facts | rates


def evaluate_now(run: Run, log: MetricsLog, done: int, stop: StopRequest) -> bool:
    """Evaluate, and save the model with its results; all ranks call it. Returns False if asked to stop on the way."""
    config, learner, folder, device = run.config, run.learner, Path(run.config.run), run.learner.strategy.device

    # what is written into files goes through the trunk, and is not rounded: as `sptnet eval` computes it
    final = done == run.schedule.total_steps
    module, rounded = learner.strategy.module, learner.strategy.module.round_tokens
    tokens = None if final else run.tokens

    def each_round(protocol: Kind, images: int) -> None:
        log.evaluating(done, protocol, images, run.store.manifest.samples(protocol))
        if stop.on_any_rank(device):
            raise StoppedError

    try:
        module.round_tokens = None if final else rounded
        results, parts = evaluate(learner.strategy, learner.prompt, config, run.store, each_round, tokens)
    except StoppedError:
        module.train()
        return False
    finally:
        module.round_tokens = rounded
    state = learner.strategy.full_state()
    if rank() == 0:
        manifest = run.store.manifest
        about = ModelFacts(
            done, learner.strategy.launch.precision, manifest.num_old, tuple(manifest.classes), *module.statistics
        )
        save_model(folder, state, learner.prompt, about)
        log.evaluation(done, results)
    if final:
        save_evaluation(folder, config.method, results, parts)
        if rank() == 0:
            mark_finished(folder)
    return True
