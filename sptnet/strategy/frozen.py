"""Where the frozen blocks of a sharded model lie: whole on every rank, or in shards, gathered for every pass."""

import os
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sptnet.config_sections import FrozenBlocks
from sptnet.method.model import PromptedViT

LITTLE = 0.05  # of a rank's memory: below it a gather in every pass costs more than the memory that it saves


class Frozen(NamedTuple):
    """Whether the frozen blocks are whole on every rank, and why, for the header of a run; it is empty without any."""

    whole: bool
    told: str


def frozen_bytes(model: PromptedViT) -> int:
    """Bytes of the weights of blocks that are not trained."""
    return sum(p.numel() * p.element_size() for p in model.backbone.blocks.parameters() if not p.requires_grad)


def place_frozen(asked: FrozenBlocks, taken: int, memory: int) -> Frozen:
    """Decide where frozen blocks lie.

    Args:
        taken: their bytes.
        memory: bytes of the rank that has least, so that all decide alike.
    """
    if not taken:
        return Frozen(True, "")
    if asked != "auto":
        where = "whole on every rank" if asked == "whole" else "sharded"
        return Frozen(asked == "whole", f"{where}, as memory.frozen_blocks says: {taken / 1e9:.3g} GB in all")
    whole = taken < LITTLE * memory
    share = f"{taken / 1e9:.3g} GB are {100 * taken / memory:.2g}% of a rank's {memory / 1e9:.3g} GB"
    if whole:
        return Frozen(True, f"whole on every rank: {share}, below {100 * LITTLE:.0f}%")
    return Frozen(False, f"sharded: {share}, not below {100 * LITTLE:.0f}%")


def least_memory(device: torch.device) -> int:
    """Bytes of memory of the rank that has least: its GPU's, or its part of the machine's. All ranks call it."""
    if device.type == "cuda":
        mine = torch.cuda.get_device_properties(device).total_memory
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        mine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks
    with unset_fake_temporarily():  # read here also where the model is planned, without numbers
        least = torch.tensor(mine, device=device)
        if dist.is_initialized():
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)


def matrices(block: nn.Module) -> set[nn.Parameter]:
    """What of a frozen block is worth gathering: weights that autocast rounds to its dtype before it multiplies.

    The rest, norms and biases and scales and tables of positions, is small, and is read in float32.
    """
    return {cast(nn.Parameter, part.weight) for part in block.modules() if isinstance(part, nn.Linear)}
