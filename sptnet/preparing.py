"""A run before its first step: its parts, put back to where it stood."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sptnet.build import assemble, build_data, build_model, build_schedule, check_strategy, images_of_rank
from sptnet.config import Config
from sptnet.data.batches import Batch
from sptnet.data.loader import train_batches
from sptnet.data.order import BatchOrder
from sptnet.data.storage.store import Store
from sptnet.data.tokens import Tokens
from sptnet.method.model import PromptedViT
from sptnet.method.schedule import Schedule
from sptnet.run.checkpoint import Facts, left_behind, remove
from sptnet.run.lock import RunLock
from sptnet.run.parts import PartsError
from sptnet.run.provenance import describe, size_of
from sptnet.run.resume import agree_where_to_continue, backbone_of, facts_to_continue, numbers_of, restore
from sptnet.run.saving import Saver
from sptnet.run.signals import StopRequest
from sptnet.run.step_readback import Used
from sptnet.run.throughput import Throughput, matmul_peak, work_of_steps
from sptnet.run.tolerance import NonFiniteGuard, ReplacedSamples
from sptnet.steps import Learner, Taken
from sptnet.strategy.attention import choose_attention
from sptnet.strategy.base import DTYPES
from sptnet.strategy.collectives import on_any_rank, rank, world_size
from sptnet.strategy.connect import connect, record_collectives
from sptnet.strategy.kernels import choose_kernels
from sptnet.trunk_cache import TrunkCache, choose, stored_type
from sptnet.trunk_making import make


class StopRequestedError(Exception):
    """Asked to stop, on all ranks at once; of one that `prepare` raises the message says what is kept."""


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
    used: Used | None = None

    @property
    def tokens(self) -> Tokens | None:
        return None if self.cache is None else self.cache.tokens

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps of what went wrong so far."""
        guard = self.guard
        return {
            "bad_samples": self.replaced.total, "skipped_steps": guard.skipped, "faulty_steps": guard.faulty
        }  # fmt: skip

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

    def note(self, taken: Taken, launched: float, used: Used) -> None:
        """A step is over, which had been launched at some second: count it, and the classes, into the figures."""
        self.throughput.step(taken.phase, launched)
        self.used = used if self.used is None else self.used | used

    def figures(self) -> dict[str, float]:
        """What the metrics tell of the steps since they were last written."""
        used, self.used = self.used, None
        figures = self.throughput.interval() | {"classes_used": 0 if used is None else int(used.sum())}
        if stall := self.saver.pop_stall_seconds():
            figures["checkpoint_stall_s"] = round(stall, 4)
        return figures


def prepare(config: Config, stop: StopRequest) -> tuple[Run, dict[str, object]]:
    """Everything of a run, put back to where it stood, and the header that says what it is; all ranks call it.

    A run that cannot go on from its checkpoint is told so before tokens are made, which may take hours.

    Raises:
        StopRequestedError: asked to stop while tokens were made; what is made stays.
        CheckpointError, RunError, DatasetError, ConfigError, PartsError: it cannot begin; the message says why.
    """
    store, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, store.manifest)
    record_collectives(Path(config.run))
    accelerator, launch = connect(config.collective_timeout_s, config.device)
    choose_kernels(accelerator.device, config.matmul_precision, config.deterministic)
    check_strategy(config, launch)
    images = images_of_rank(config, launch.world_size, f"{launch.world_size} processes")
    # all this is of the whole model: a strategy may take it apart
    numbers, backbone = numbers_of(config, store.manifest, model.statistics), backbone_of(config, model)
    size = size_of(model, prompt)

    def saved_in(checkpoint: Path | None, look: bool) -> Facts | None:
        if checkpoint is None:
            return None
        return facts_to_continue(checkpoint, config, numbers, backbone, launch.precision, schedule.total_steps, look)

    def images_left() -> int:
        with ExitStack() as held:  # and let go of: what a lost node still makes must not shut out who comes for it
            saved = saved_in(_agree_where_to_continue(config, held)[0], look=True)
        return (schedule.total_steps - (0 if saved is None else saved.step)) * config.data.batch_size

    weights, device = backbone["sha256"], accelerator.device
    cache, header = _kept_tokens(config, store, model, weights, device, launch.precision, images_left, stop)
    row = None if cache is None else (cache.tokens.shape.tokens, cache.tokens.shape.width)
    work = work_of_steps(model, prompt, images, row)
    peak = matmul_peak(device, DTYPES.get(launch.precision, torch.float32))
    choose_attention(model, device, launch.precision, config.memory.micro_batches)
    learner = assemble(config, accelerator, launch, model, prompt, schedule)
    learner.strategy.settle()
    with ExitStack() as held:
        checkpoint, lock = _agree_where_to_continue(config, held)
        run = Run(
            config, store, order, schedule, learner,
            saver=Saver(config, learner, numbers, backbone),
            throughput=Throughput(config.data.batch_size, launch.world_size, device, work, peak),
            replaced=ReplacedSamples(config.data.tolerate_bad_samples),
            guard=NonFiniteGuard(config, scaled=launch.precision == "fp16"),
            start=0, continues=checkpoint, lock=lock, cache=cache,
        )  # fmt: skip
        if (saved := saved_in(checkpoint, look=False)) is not None:
            _go_on(run, saved)
        _remove_what_is_left_behind(run)
        header = describe(config, learner, store.manifest, order, size, checkpoint) | header
        held.pop_all()
    return run, header


def _kept_tokens(
    config: Config, store: Store, model: PromptedViT, weights: str, device: torch.device, precision: str,
    images_left: Callable[[], int], stop: StopRequest,
) -> tuple[TrunkCache | None, dict[str, object]]:  # fmt: skip
    """The tokens that the run trains from, made where they are missing, and what the header says of them."""
    chosen = choose(config, store, model, weights, device, precision, images_left)
    cache = None if isinstance(chosen, str) else chosen
    if cache is not None:
        try:
            full = make(cache, config, store, model, device, stop.here)
        except PartsError as error:
            if config.trunk_cache != "auto":
                raise
            advised = PartsError(f"{error}; or set trunk_cache to a folder on another disk, or to off")
            raise advised.with_outcome(error.outcome) from None
        if on_any_rank(stop.here(), device):
            raise StopRequestedError(cache.progress())
        if on_any_rank(bool(full), device):  # the numbers are the same without
            cache.give_up()
            cache, chosen = None, f"none: {full or 'the disk of another rank is full'}"
    model.round_tokens = stored_type(config, model)
    if config.data.views is None:
        return cache, {}
    told = chosen if isinstance(chosen, str) else chosen.where()
    return cache, {"views": f"{config.data.views} of every image, known ones", "trunk cache": told}


def _agree_where_to_continue(config: Config, held: ExitStack) -> tuple[Path | None, RunLock | None]:
    """The checkpoint to go on from, on all ranks, and rank 0's lock, which `held` releases unless it is emptied."""
    checkpoint, lock = agree_where_to_continue(config)
    if lock is not None:
        held.callback(lock.release)
    return checkpoint, lock


def _go_on(run: Run, saved: Facts) -> None:
    """Put back what a checkpoint has: state, step, and what went wrong before it."""
    assert run.continues is not None
    restore(run.continues, saved, run.learner)
    run.start, run.replaced.total = saved.step, int(saved.counters.get("bad_samples", 0))
    run.guard.skipped = int(saved.counters.get("skipped_steps", 0))
    run.guard.faulty = int(saved.counters.get("faulty_steps", run.guard.skipped))


def _remove_what_is_left_behind(run: Run) -> None:
    """The folder's checkpoints of later steps, which belong to a way that is not gone on; all where it starts anew."""
    if rank() == 0:
        for checkpoint in left_behind(Path(run.config.run), run.continues):
            remove(checkpoint)
