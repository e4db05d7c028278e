"""Gradient checkpointing: blocks that keep their input only and compute the rest again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sptnet.config_sections import Every
from sptnet.method.model import PromptedViT


def checkpoint_blocks(model: PromptedViT, spec: str | Every) -> None:
    """Make blocks forget what their backward needs.

    A block's own `forward` is replaced, not wrapped from outside: what sharding strategies hook to a block then happens
    once, around both computations, and the state dict keeps its names.

    Args:
        spec: none, full (every block), or every n-th block, counted from the last, which is always trained.
    """
    if spec == "none":
        return
    every = spec.every if isinstance(spec, Every) else 1
    for block in list(model.backbone.blocks)[::-1][::every]:
        block.forward = partial(_forward, block.forward)


def _forward(forward: Callable[..., Tensor], tokens: Tensor, **beside: Any) -> Tensor:
    forward = partial(forward, **beside)
    if not torch.is_grad_enabled():
        return forward(tokens)
    # blocks draw no random numbers, so there is no generator state to keep
    return checkpoint(forward, tokens, use_reentrant=False, preserve_rng_state=False)
