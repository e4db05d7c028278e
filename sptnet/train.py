"""The training loop: SPTNet's two alternating phases, or SimGCD's single one.

`accelerate launch --config_file launch/ddp.yaml -m sptnet train CONFIG [section.key=value ...]`
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sptnet.config import Config
from sptnet.data.batches import Batch
from sptnet.data.format.manifest import Kind
from sptnet.data.on_device import on_device
from sptnet.data.tokens import DamagedTokensError
from sptnet.evaluate import evaluate, save_evaluation
from sptnet.objective import RankStatus
from sptnet.preparing import Run, StopRequestedError, prepare
from sptnet.run.folder import check_unfinished, mark_finished, open_run
from sptnet.run.metrics_log import MetricsLog
from sptnet.run.model_file import ModelFacts, save_model
from sptnet.run.outcome import naming_step, record_outcome
from sptnet.run.provenance import record_start, warnings
from sptnet.run.signals import StopRequest
from sptnet.run.step_readback import StepReadback
from sptnet.run.trackers import Trackers, named_trackers
from sptnet.strategy.collectives import on_any_rank, rank


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
        except StopRequestedError as stopped:
            record_outcome("continue", str(stopped))
            return False
        try:
            first = rank() == 0
            if first:
                open_run(config, run.start)
            record_start(Path(config.run), run.start, run.learner.strategy)
            told = Trackers(config, trackers if first else (), run.start)
            with MetricsLog(config, run.schedule.total_steps, run.start, run.figures, told, active=first) as log:
                log.summary(f"sptnet train: {config.run}", header)
                for warning in warnings(config, run.schedule, run.learner.strategy.module.train_from_block):
                    log.line(f"warning: {warning}")
                finished = run_steps(run, log, stop)
            run.learner.strategy.accelerator.wait_for_everyone()
        finally:
            run.saver.finish()
            if run.lock is not None:
                run.lock.release()
    if not finished:
        record_outcome("continue", f"a checkpoint is in {config.run}")
    return finished


def run_steps(run: Run, log: MetricsLog, stop: StopRequest) -> bool:
    """Take the steps that are left, or those until asked to stop; returns whether the run is finished."""
    config, total, done = run.config, run.schedule.total_steps, run.start
    following = StepReadback(run.guard, run.replaced, run.note, log)
    # asked to stop, or killed, before it was evaluated: a checkpoint comes first
    stopped = run.evaluation_is_due(done) and not evaluate_now(run, log, done, stop)
    run.throughput.restart()
    strategy = run.learner.strategy
    batches = TwoAhead(iter(()) if stopped else run.batches(), stop)
    for batch, views, targets in on_device(batches, strategy.device, strategy.module.statistics):
        done = batch.step + 1
        with naming_step(run.schedule.phase(batch.step), batch.step):
            said = RankStatus(stop.here(), run.replaced.told_where_met(batch))
            taken = run.learner.step(batch.step, views, targets, None, said)
            following.follow(batch, taken, facts_of(run, batch))  # reads what the step before it did
            stopped, due = following.stop, run.evaluation_is_due(done)
            if stopped or due or done % config.checkpoint.every == 0:
                following.catch_up()
                log.flush(durable=True)  # what is told of the steps before a checkpoint is on disk when it is
                run.saver.save(done, run.counters(), hurried=stopped)
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
        if on_any_rank(stop.here(), device):
            raise StopRequestedError

    try:
        module.round_tokens = None if final else rounded
        results, parts = evaluate(learner.strategy, learner.prompt, config, run.store, each_round, tokens)
    except StopRequestedError:
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
        save_evaluation(folder, config.method, run.store.manifest, results, parts)
        if rank() == 0:
            mark_finished(folder)
    return True
