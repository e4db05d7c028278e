"""The strategy that was asked for."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from sptnet.config_sections import FrozenBlocks
from sptnet.method.model import PromptedViT
from sptnet.strategy.base import Strategy, parameter_groups
from sptnet.strategy.fsdp import FSDPStrategy
from sptnet.strategy.launcher import LaunchSettings, StrategyError
from sptnet.strategy.plain import PlainStrategy
from sptnet.strategy.zero import ZeroStrategy

WRAPPERS = {"single": "PromptedViT", "ddp": "DistributedDataParallel", "fsdp2": "FSDPPromptedViT",
            "hsdp": "FSDPPromptedViT", "zero1": "DeepSpeedEngine", "zero2": "DeepSpeedEngine",
            "zero3": "DeepSpeedEngine"}  # fmt: skip


def create_strategy(
    accelerator: Accelerator,
    launch: LaunchSettings,
    model: PromptedViT,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    images_per_rank: int,
    frozen_blocks: FrozenBlocks = "auto",
) -> Strategy:
    """Spread the model as asked, and check that it was.

    Args:
        optimizer_of: makes the optimizer of a model; FSDP2 needs it made after sharding.
        images_per_rank: of the global batch, which DeepSpeed insists on knowing.
        frozen_blocks: where FSDP2 keeps them.

    Raises:
        StrategyError: what was asked for and what one got differ.
    """
    strategy: Strategy
    if launch.strategy.startswith("zero"):
        strategy = ZeroStrategy(accelerator, launch, model, optimizer_of, images_per_rank)
        if (got := f"zero{strategy.stage}") != launch.strategy:
            raise StrategyError(f"{launch.strategy} was asked for, DeepSpeed runs {got}")
    elif launch.strategy in ("fsdp2", "hsdp"):
        strategy = FSDPStrategy(accelerator, launch, model, optimizer_of, frozen_blocks)
    else:
        strategy = PlainStrategy(accelerator, launch, model, optimizer_of)
    if strategy.wrapper != WRAPPERS[launch.strategy]:
        wanted = WRAPPERS[launch.strategy]
        raise StrategyError(f"{launch.strategy} was asked for, which makes a {wanted}, not a {strategy.wrapper}")
    return strategy


def create_evaluator(
    accelerator: Accelerator, launch: LaunchSettings, model: PromptedViT, frozen_blocks: FrozenBlocks = "auto"
) -> Strategy:
    """The same for a model that is not trained: strategies insist on an optimizer, and this one never steps."""
    return create_strategy(
        accelerator, launch, model, lambda m: torch.optim.SGD(parameter_groups(m, 0.0)), 1, frozen_blocks
    )
