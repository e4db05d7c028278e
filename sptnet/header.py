"""The header of a run: what runs where, and what it trains."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sptnet.config import Config
from sptnet.data.manifest import KINDS, Manifest
from sptnet.data.order import BatchOrder
from sptnet.model import PromptedViT
from sptnet.prompts import Prompt
from sptnet.schedule import Schedule
from sptnet.steps import Learner


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
    """The facts of the header, by name."""
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


def warnings(config: Config, schedule: Schedule, train_from_block: int) -> Iterator[str]:
    """Sentences on what is allowed, and rarely meant; `train_from_block` as the model counts it, from 0."""
    if told := schedule.warning():
        yield told
    if config.init is None and config.model.weights == "none" and train_from_block != 0:
        yield (
            f"model.weights is none, so the backbone is random, and what lies before block {train_from_block} stays "
            "so: model.train_from_block=0 trains all of it"
        )
