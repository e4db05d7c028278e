"""The training loop: SPTNet's two alternating phases, or SimGCD's single one.

`accelerate launch --config_file launch/ddp.yaml -m sptnet.train CONFIG [section.key=value ...]`
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from sptnet.build import build_data, build_loss, build_model, build_schedule
from sptnet.collectives import rank, world_size
from sptnet.config import Config, ConfigError
from sptnet.data.augment import normalise
from sptnet.data.loader import train_batches
from sptnet.data.manifest import KINDS, Manifest
from sptnet.data.order import BatchOrder
from sptnet.evaluate import evaluate, save_evaluation
from sptnet.journal import Journal
from sptnet.model import PromptedViT
from sptnet.prompts import Prompt
from sptnet.run_folder import open_run, save_model
from sptnet.schedule import Schedule
from sptnet.steps import Learner
from sptnet.strategy.connect import connect
from sptnet.strategy.plain import PlainStrategy, trained_parameters


def train(config: Config) -> Path:
    """Train a run from its first step to its last, evaluating on the way and at the end.

    The model that counts is the last one: nothing is selected on labels that a method must not see.

    Returns:
        The run's folder.

    Raises:
        ConfigError, DatasetError, BackboneError, RunError, StrategyError: before the first step.
        DatasetError, EvaluationError, FloatingPointError: damage, or a loss that is not finite, on the way.
    """
    manifest, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, manifest)
    accelerator = connect()
    if config.data.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} cannot be dealt to {accelerator.num_processes} processes"
        )
    learner = assemble(config, accelerator, model, prompt, schedule)
    folder = open_run(config) if rank() == 0 else Path(config.run)
    steps = range(schedule.total_steps)
    batches = train_batches(
        Path(config.data.root), manifest, order, augment=config.data.augment, image_size=config.model.image_size,
        seed=config.seed, steps=steps, views_at=learner.views_at, workers=config.data.workers,
        rank=rank(), world_size=world_size(),
    )  # fmt: skip

    with Journal(folder, len(steps), config.log_every, active=rank() == 0) as journal:
        journal.summary(f"sptnet train: {config.run}", describe(config, learner, manifest, order))
        if warning := schedule.warning():
            journal.line(f"warning: {warning}")
        for batch in batches:
            pieces = (batch.views, batch.targets, batch.labelled)
            views, targets, labelled = (piece.to(accelerator.device, non_blocking=True) for piece in pieces)

            terms = learner.step(batch.step, normalise(views), targets, labelled)

            journal.step(facts_of(schedule, batch.step), terms, config.data.batch_size)
            if evaluation_is_due(config, schedule, batch.step + 1):
                journal.flush()
                if evaluated := evaluate(learner.strategy, prompt, config, manifest):
                    save_model(folder, learner.strategy.module, prompt)
                    journal.evaluation(batch.step + 1, evaluated[0])
                    if batch.step + 1 == len(steps):
                        save_evaluation(folder, config.method, *evaluated)
    accelerator.wait_for_everyone()
    return folder


def assemble(
    config: Config, accelerator: Accelerator, model: PromptedViT, prompt: Prompt | None, schedule: Schedule
) -> Learner:
    """Put model, prompt, their optimizers, the strategy and the loss together."""
    spec = config.optimizer
    groups = trained_parameters(model, spec.weight_decay)
    optimizer: torch.optim.Optimizer
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=spec.lr)
    strategy = PlainStrategy(accelerator, model, optimizer)
    prompt_optimizer = None
    if prompt is not None:
        prompt.to(accelerator.device)
        prompt_optimizer = torch.optim.SGD(prompt.parameters(), lr=config.prompts.lr, momentum=config.prompts.momentum)
    return Learner(strategy, build_loss(config), schedule, prompt, prompt_optimizer, config.loss.scope == "global")


def evaluation_is_due(config: Config, schedule: Schedule, done: int) -> bool:
    return done == schedule.total_steps or done % (config.evaluate.every * schedule.steps_per_epoch) == 0


def facts_of(schedule: Schedule, step: int) -> dict[str, object]:
    facts: dict[str, object] = {"step": step, "epoch": schedule.epoch(step), "phase": schedule.phase(step)}
    facts["model_lr"] = schedule.model_lr_at(step)
    if schedule.phase_schedule != "model_only":
        facts["prompt_lr"] = schedule.prompt_lr_at(step)
    return facts


def describe(config: Config, learner: Learner, manifest: Manifest, order: BatchOrder) -> dict[str, object]:
    """The header of a run: what runs where, and what it trains."""
    strategy, schedule = learner.strategy, learner.schedule
    processes, batch = strategy.accelerator.num_processes, config.data.batch_size
    total = sum(p.numel() for p in strategy.module.parameters())
    trained = sum(p.numel() for p in strategy.module.parameters() if p.requires_grad)
    prompts = sum(p.numel() for p in learner.prompt.parameters()) if learner.prompt else 0
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    return {
        "method": config.method + (f", from {config.init}" if config.init else ""),
        "strategy": f"{strategy.name} ({strategy.wrapper}), {processes} x {strategy.accelerator.device.type}",
        "mixed precision": strategy.accelerator.mixed_precision,
        "data": f"{manifest.name}: {counts}; {manifest.num_old} old classes of {len(manifest.classes)}",
        "batch": f"{batch} = {processes} x {batch // processes}, {order.steps_per_epoch} steps per epoch",
        "model": f"{config.model.backbone} at {config.model.image_size} px",
        "parameters": f"{trained:,} trained, {total - trained:,} frozen, {prompts:,} prompt",
        "schedule": f"{schedule.epochs} epochs = {schedule.total_steps} steps, {schedule.phase_schedule}"
        + (f", k = {schedule.k}" if learner.prompt else ""),
    }


if __name__ == "__main__":
    from sptnet.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
