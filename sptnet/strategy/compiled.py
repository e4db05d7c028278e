"""Blocks compiled by torch.compile, in training steps."""

from functools import partial

import torch

from sptnet.method.model import PromptedViT


def compile_blocks(model: PromptedViT) -> None:
    """Let torch compile what the blocks compute, each when it is first called, for the shapes that it is called with.

    A block's own `forward` is replaced, as by `checkpoint_blocks`, which is to come after: what sharding strategies
    hook to a block stays outside of what is compiled. Where tokens are rounded as a cache keeps them, the frozen blocks
    stay as they are: the cache is made by those, and a run from it is to have the numbers of one without.
    """
    begin = 0 if model.round_tokens is None else model.train_from_block
    for block in model.backbone.blocks[begin:]:
        block.forward = partial(torch.compile(type(block).forward, dynamic=False), block)
