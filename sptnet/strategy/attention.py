"""Attention by explicit products where torch's fused kernel is slower: a gradient in bf16, on CPUs that multiply so."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sptnet.method.model import PromptedViT

# tokens; matrices of longer sequences leave a core's cache, take memory by their square, and were not timed
LONGEST = 577


def choose_attention(model: PromptedViT, device: torch.device, precision: str, micro_batches: int) -> None:
    """Let a model that is to be trained attend as is fastest in this precision.

    In pieces a step looks at every image twice, first without a gradient: both looks are to be the fused kernel's.
    """
    if micro_batches == 1 and multiplies_bf16(device, precision):
        attend_by_products(model)


def multiplies_bf16(device: torch.device, precision: str) -> bool:
    """Whether a run computes in bf16 on a CPU that has instructions for it; others make it up, slower than float32."""
    return device.type == "cpu" and precision == "bf16" and cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attend_by_products(model: PromptedViT) -> None:
    """Let blocks compute attention by explicit products where a gradient goes through it, and else as before.

    The fused kernel's backward takes three times as long there (ViT-B/16, 224 px: 0.33 s of a prompt step of 1.2 s,
    explicit products 0.11 s). What has no gradient is what a trunk cache keeps and an evaluation writes, whose bits
    stay. Blocks are told by hooks: their own `forward` is others' to replace.
    """
    tokens = model.num_tokens
    for block in model.backbone.blocks if tokens <= LONGEST else ():
        # an attention of its own, several side by side, or the block itself
        if attentions := [module for module in block.modules() if getattr(module, "fused_attn", False)]:
            block.register_forward_pre_hook(partial(_choose, attentions))


def _choose(attentions: Sequence[Any], block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    led_through = arguments[0].requires_grad or any(p.requires_grad for p in block.parameters())
    for attention in attentions:
        attention.fused_attn = not (led_through and torch.is_grad_enabled())  # timm's switch
