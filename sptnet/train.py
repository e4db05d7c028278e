"""The training loop: SPTNet's two alternating phases, or SimGCD's single one.

`accelerate launch --config_file launch/ddp.yaml -m sptnet.train CONFIG [section.key=value ...]`
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from sptnet.build import build_data, build_loss, build_model, build_schedule
from sptnet.checkpoint import is_of_run, remove_all
from sptnet.collectives import rank, world_size
from sptnet.config import Config, ConfigError, OptimizerConfig
from sptnet.data.augment import normalise
from sptnet.data.loader import train_batches
from sptnet.data.manifest import KINDS, Manifest
from sptnet.data.order import BatchOrder
from sptnet.evaluate import evaluate, save_evaluation
from sptnet.failures import told_where
from sptnet.journal import Journal
from sptnet.model import PromptedViT
from sptnet.nonfinite import NonFiniteGuard
from sptnet.prompts import Prompt
from sptnet.recompute import checkpoint_blocks
from sptnet.replaced import Replaced
from sptnet.resume import backbone_of, numbers_of, restore, where_to_continue
from sptnet.run_folder import check_unfinished, lock_run, open_run, save_model
from sptnet.saving import Saver
from sptnet.schedule import Schedule
from sptnet.signals import StopRequest
from sptnet.steps import Learner
from sptnet.strategy.base import parameter_groups
from sptnet.strategy.connect import Asked, connect
from sptnet.strategy.create import create_strategy


def train(config: Config) -> bool:
    """Train a run from its first step, or from where it stood, to its last, evaluating on the way and at the end.

    The model that counts is the last one: nothing is selected on labels that a method must not see.

    Returns:
        Whether the run is finished; False if it was asked to stop and left a checkpoint to continue from.

    Raises:
        ConfigError, DatasetError, BackboneError, RunError, StrategyError, CheckpointError: before the first step.
        DatasetError, EvaluationError, CheckpointError, FloatingPointError: on the way; the last checkpoint stays.
    """
    check_unfinished(config)
    store, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, store.manifest)
    accelerator, asked = connect(config.collective_timeout_s)
    if config.data.batch_size % asked.world_size:
        raise ConfigError(f"data.batch_size {config.data.batch_size} cannot be dealt to {asked.world_size} processes")
    numbers, backbone = numbers_of(config, store.manifest), backbone_of(config, model)
    size = size_of(model, prompt)
    learner = assemble(config, accelerator, asked, model, prompt, schedule)
    replaced = Replaced(config.data.tolerate_bad_samples)
    guard = NonFiniteGuard(config)
    start, checkpoint = 0, where_to_continue(config)
    if checkpoint is not None:
        saved = restore(checkpoint, learner, numbers, backbone, config.resume.allow)
        start, replaced.total = saved.step, int(saved.counters["bad_samples"])
        guard.skipped = int(saved.counters["skipped_steps"])
    folder, device = Path(config.run), learner.strategy.device
    lock = lock_run(config) if rank() == 0 else None
    accelerator.wait_for_everyone()
    if rank() == 0:
        if checkpoint is None or not is_of_run(checkpoint, folder):
            remove_all(folder)  # they would be taken for this run's
        open_run(config, start)
    steps = range(start, schedule.total_steps)
    batches = train_batches(
        store, order, augment=config.data.augment, image_size=config.model.image_size,
        seed=config.seed, steps=steps, views_at=learner.views_at, workers=config.data.workers,
        rank=rank(), world_size=world_size(), tolerated=config.data.tolerate_bad_samples,
    )  # fmt: skip
    saver = Saver(config, learner, numbers, backbone)

    with (
        Journal(folder, schedule.total_steps, config.log_every, active=rank() == 0) as journal,
        StopRequest() as stop,
    ):
        journal.summary(
            f"sptnet train: {config.run}", describe(config, learner, store.manifest, order, size, checkpoint)
        )
        if warning := schedule.warning():
            journal.line(f"warning: {warning}")
        for batch in batches:
            pieces = (batch.views, batch.targets, batch.labelled)
            views, targets, labelled = (piece.to(device, non_blocking=True) for piece in pieces)

            with told_where(schedule.phase(batch.step), batch.step):
                terms = guard.step(learner, batch, normalise(views), targets, labelled)

            done = batch.step + 1
            facts = facts_of(schedule, batch.step) | replaced.in_step(batch) | guard.told()
            journal.step(facts, terms, config.data.batch_size)
            if evaluation_is_due(config, schedule, done):
                journal.flush()
                evaluated, state = evaluate(learner.strategy, prompt, config, store), learner.strategy.full_state()
                if evaluated:
                    save_model(folder, state, prompt)
                    journal.evaluation(done, evaluated[0])
                    if done == schedule.total_steps:
                        save_evaluation(folder, config.method, *evaluated)
            stopping = done < schedule.total_steps and stop.on_any_rank(device)
            if stopping or (done % config.checkpoint.every == 0 and done < schedule.total_steps):
                journal.flush()  # what is told of the steps before a checkpoint is on disk when it is
                saver.save(done, {"bad_samples": replaced.total, "skipped_steps": guard.skipped})
            saver.poll()
            if stopping:
                saver.wait()
                journal.line(f"asked to stop after step {done} of {schedule.total_steps}: the same command continues")
                break
        saver.wait()
    accelerator.wait_for_everyone()
    if lock is not None:
        lock.release()
    return done == schedule.total_steps


def assemble(
    config: Config,
    accelerator: Accelerator,
    asked: Asked,
    model: PromptedViT,
    prompt: Prompt | None,
    schedule: Schedule,
) -> Learner:
    """Put model, prompt, their optimizers, the strategy and the loss together."""
    checkpoint_blocks(model, config.memory.gradient_checkpointing)
    images_per_rank = config.data.batch_size // asked.world_size
    strategy = create_strategy(
        accelerator, asked, model, lambda m: build_optimizer(config.optimizer, m), images_per_rank
    )  # fmt: skip
    prompt_optimizer = None
    if prompt is not None:
        prompt.to(accelerator.device)
        prompt_optimizer = torch.optim.SGD(prompt.parameters(), lr=config.prompts.lr, momentum=config.prompts.momentum)
    whole, pieces = config.loss.scope == "global", config.memory.micro_batches
    return Learner(strategy, build_loss(config), schedule, prompt, prompt_optimizer, whole, pieces)


def build_optimizer(spec: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of blocks and head; parameters that are not trained are not in it."""
    groups = parameter_groups(model, spec.weight_decay)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    return torch.optim.AdamW(groups, lr=spec.lr)


def evaluation_is_due(config: Config, schedule: Schedule, done: int) -> bool:
    return done == schedule.total_steps or done % (config.evaluate.every * schedule.steps_per_epoch) == 0


def facts_of(schedule: Schedule, step: int) -> dict[str, object]:
    facts: dict[str, object] = {"step": step, "epoch": schedule.epoch(step), "phase": schedule.phase(step)}
    facts["model_lr"] = schedule.model_lr_at(step)
    if schedule.phase_schedule != "model_only":
        facts["prompt_lr"] = schedule.prompt_lr_at(step)
    return facts


class Size(NamedTuple):
    """Numbers of parameters, of the whole model whatever holds it."""

    trained: int
    frozen: int
    prompt: int


def size_of(model: PromptedViT, prompt: Prompt | None) -> Size:
    """Count before a strategy takes the model apart."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Size(trained, total - trained, 0 if prompt is None else sum(p.numel() for p in prompt.parameters()))


def describe(
    config: Config, learner: Learner, manifest: Manifest, order: BatchOrder, size: Size, checkpoint: Path | None
) -> dict[str, object]:
    """The header of a run: what runs where, and what it trains."""
    strategy, schedule = learner.strategy, learner.schedule
    processes, batch = strategy.asked.world_size, config.data.batch_size
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    return {
        "method": config.method + (f", from {config.init}" if config.init else ""),
        "start": f"continues from {checkpoint}" if checkpoint else "from the first step",
        "strategy": f"{strategy.asked.strategy} ({strategy.wrapper}), {processes} x {strategy.device.type}",
        "mixed precision": strategy.asked.precision,
        "data": f"{manifest.name}: {counts}; {manifest.num_old} old classes of {len(manifest.classes)}",
        "batch": f"{batch} = {processes} x {batch // processes}, {order.steps_per_epoch} steps per epoch",
        "model": f"{config.model.backbone} at {config.model.image_size} px",
        "parameters": f"{size.trained:,} trained, {size.frozen:,} frozen, {size.prompt:,} prompt",
        "gradients reduced": f"{4 * size.trained:,} bytes per model step"
        + (f", {4 * size.prompt:,} per prompt step" if learner.prompt else ""),
        "schedule": f"{schedule.epochs} epochs = {schedule.total_steps} steps, {schedule.phase_schedule}"
        + (f", k = {schedule.k}" if learner.prompt else ""),
    }


if __name__ == "__main__":
    from sptnet.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
