"""The families of timm's ViTs, by what a model *is*: how it is taken apart, and whether it can be.

In all of them the patch embedding is linear in the pixels, so that a prompt is a term of the patch tokens. They differ
in what comes between that and the blocks, and in what a block is given beside the tokens:

VisionTransformer   ViT, DeiT, DINO, DINOv2, CLIP, SigLIP, ...: positions are added
Eva                 EVA, DINOv3, PE, ...: queries and keys are rotated by their place
Beit, RelPos        scores have a bias by relative position
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, DropPath, PatchEmbed
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from sptnet.errors import SptnetError

WORKS = "vit_base_patch16_224.dino"
MODULES = ("vision_transformer", "vision_transformer_relpos", "deit", "eva", "beit")  # of timm, that define them

Triple = tuple[float, float, float]
Statistics = tuple[Triple, Triple]  # mean and deviation of the channels, by which pixels of 0 to 1 are normalised
State = dict[str, Tensor]
IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class BackboneError(SptnetError, ValueError):
    """A backbone or a weight file that cannot be used; the message says why."""

    on_all_ranks = True


class Family(NamedTuple):
    """How models of a class are taken apart.

    positions: (model, patch tokens [N, ...]) -> tokens that enter the first block [N, T, D], prefix tokens before them.
    block_arguments: model -> what each block is given beside the tokens.
    read_weights: (state dict as published, model) -> state dict of the model, with its sizes.
    adding_positions: arguments by which timm gives such a model absolute positions where it has none; None: it cannot.
    """

    positions: Callable[[Any, Tensor], Tensor]
    block_arguments: Callable[[Any], list[dict[str, Any]]]
    read_weights: Callable[[State, nn.Module], State]
    adding_positions: dict[str, Any] | None


class FixedRotary(nn.Module):
    """Rotary positions of the one grid that a model is built for, in place of timm's module.

    timm computes DINOv3's on the CPU in every forward pass, for which a device would wait.
    """

    table: Tensor

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def get_embed(self) -> Tensor:
        """[h * w, 2 * d]: sines and cosines."""
        return self.table


def _vit_positions(vit: Any, patches: Tensor) -> Tensor:
    return vit.norm_pre(vit._pos_embed(patches))


def _eva_positions(model: Any, patches: Tensor) -> Tensor:
    tokens = patches.flatten(1, -2)
    prefix = [t.expand(len(tokens), -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    if model.pos_embed is not None and model.no_embed_class:
        tokens = tokens + model.pos_embed
    tokens = torch.cat([*prefix, tokens], dim=1)
    if model.pos_embed is not None and not model.no_embed_class:
        tokens = tokens + model.pos_embed
    return model.norm_pre(tokens)


def _eva_arguments(model: Any) -> list[dict[str, Any]]:
    rope = None if model.rope is None else model.rope.get_embed()
    return [{"rope": rope[i] if model.rope_mixed and rope is not None else rope} for i in range(len(model.blocks))]


def _beit_positions(model: Any, patches: Tensor) -> Tensor:
    tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return tokens if model.pos_embed is None else tokens + model.pos_embed


def _beit_arguments(model: Any) -> list[dict[str, Any]]:
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
    return [{"shared_rel_pos_bias": shared}] * len(model.blocks)


def _relpos_positions(model: Any, patches: Tensor) -> Tensor:
    if model.cls_token is None:
        return patches
    return torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)


def _relpos_arguments(model: Any) -> list[dict[str, Any]]:
    shared = None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()
    return [{"shared_rel_pos": shared}] * len(model.blocks)


def _vit_arguments(model: Any) -> list[dict[str, Any]]:
    return [{}] * len(model.blocks)


_VIT = Family(_vit_positions, _vit_arguments, vision_transformer.checkpoint_filter_fn, {"pos_embed": "learn"})
_FAMILIES: dict[type, Family] = {
    VisionTransformer: _VIT,
    VisionTransformerDistilled: _VIT,
    eva.Eva: Family(_eva_positions, _eva_arguments, eva.checkpoint_filter_fn, {"use_abs_pos_emb": True}),
    beit.Beit: Family(_beit_positions, _beit_arguments, beit.checkpoint_filter_fn, {"use_abs_pos_emb": True}),
    VisionTransformerRelPos: Family(
        _relpos_positions, _relpos_arguments, vision_transformer_relpos.checkpoint_filter_fn, None
    ),
}


def family_of(model: nn.Module, name: str = "the backbone") -> Family:
    """The family of a timm model.

    Raises:
        BackboneError: it has none, or a prompt is no term of its tokens; the message names a model that would do.
    """
    kind, why = type(model).__name__, ""
    if type(model) not in _FAMILIES:
        why = f"it is a {kind}: hierarchical, convolutional or otherwise no plain ViT"
    elif type(model.patch_embed) is not PatchEmbed:
        why = f"its patch embedding is a {type(model.patch_embed).__name__}, not linear in the pixels"
    elif not reads_class_token(model) and not model.global_pool:
        why = "it has neither a class token nor a pooling, of which the head could read"
    if why:
        raise BackboneError(f"{name} cannot be used: {why}; {WORKS} can, and `sptnet backbones` lists all that can")
    return _FAMILIES[type(model)]


def adding_positions(model: nn.Module) -> dict[str, Any] | None:
    """Arguments by which timm gives a model absolute positions where it has none; None: it cannot."""
    return _FAMILIES[type(model)].adding_positions


def reads_class_token(model: nn.Module) -> bool:
    """Whether the head reads the class token; else what timm pools."""
    return getattr(model, "cls_token", None) is not None


def read_class_token(model: Any) -> None:
    """Let a model that has a class token be read at it, also where timm pools otherwise.

    One token is normalised the same before and after it is picked: the norm goes where timm has it for this pooling.
    """
    if not reads_class_token(model) or model.global_pool == "token":
        return
    model.reset_classifier(0, "token")
    if isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity):
        model.norm, model.fc_norm = model.fc_norm, model.norm


def without_chance(model: Any) -> None:
    """Let nothing of a model be random in training, and compute rotary positions that nothing changes once.

    timm has some dropout in the networks of relative positions, and turns Sapiens2's rotary positions at random.
    Another number of processes would draw otherwise, and a trunk whose tokens are kept would be another one.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    rope: Any = getattr(model, "rope", None)
    if rope is not None:
        rope.aug_active = False
        if not list(rope.parameters()):
            model.rope = FixedRotary(rope.get_embed(shape=model.patch_embed.grid_size).detach().clone())


def statistics_of(model: Any) -> Statistics:
    """By which mean and deviation images are normalised: timm's for the weights, or ImageNet's.

    ViTs that this project could take before it knew others had ImageNet's, whatever timm says, and keep them: what was
    trained with them would see other pixels.
    """
    attn: Any = getattr(model.blocks[-1], "attn", None)
    always = (
        isinstance(model, VisionTransformer) and reads_class_token(model) and not model.dynamic_img_size
        and type(model.blocks[-1]) is Block and type(attn) is Attention and attn.gate is None
    )  # fmt: skip
    if always:
        return IMAGENET
    told = model.pretrained_cfg
    mean, std = (tuple(float(value) for value in told[key]) for key in ("mean", "std"))
    return mean, std  # type: ignore[return-value]
