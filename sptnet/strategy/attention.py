"""Attention by explicit products where torch's fused kernel is slower: a gradient in bf16, on CPUs that multiply so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sptnet.method.model import PromptedViT

# tokens; matrices of longer sequences leave a core's cache, take memory by their square, and were not timed
LONGEST = 577


def choose_attention(model: PromptedViT, device: torch.device, precision: str) -> None:
    """Let a model that is to be trained attend as is fastest in this precision."""
    if multiplies_bf16(device, precision):
        attend_by_products(model)


def multiplies_bf16(device: torch.device, precision: str) -> bool:
    """Whether a run computes in bf16 on a CPU that has instructions for it; others make it up, slower than float32."""
    if device.type != "cpu" or precision != "bf16":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend_by_products(model: PromptedViT) -> None:
    """Let blocks compute attention by explicit products where a gradient goes through it, and else as before.

    The fused kernel's backward takes three times as long there (ViT-B/16, 224 px: 0.33 s of a prompt step of 1.2 s,
    explicit products 0.11 s). What has no gradient is what a trunk cache keeps and an evaluation writes, whose bits
    stay. A block's own `forward` is replaced, as by `compile_blocks` and `checkpoint_blocks`, which are to come after.
    """
    tokens = (model.image_size // model.patch_size) ** 2 + int(model.backbone.num_prefix_tokens)
    for block in model.backbone.blocks if tokens <= LONGEST else ():
        if getattr(block.attn, "fused_attn", False):
            block.forward = partial(_forward, block.forward, block.attn)


def _forward(forward: Callable[..., Tensor], attention: Any, tokens: Tensor, **beside: Any) -> Tensor:
    led_through = tokens.requires_grad or any(p.requires_grad for p in attention.parameters())
    attention.fused_attn = not (led_through and torch.is_grad_enabled())  # timm's switch
    return forward(tokens, **beside)
