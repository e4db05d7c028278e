"""PromptedViT: a timm ViT that takes a prompt, with the DINO head of SimGCD on its class token, or on what it pools.

Two modules of the timm backbone are replaced by ones that compute the same function for less:

- `PromptedPatchEmbed`: the patch embedding is linear, so embed(x + P) = embed(x) + W * P. Prompted pixels are never
  materialised, and the prompt's gradient is one transposed convolution for the whole batch.
- the last block, where the head reads the class token only: sptnet/method/last_block.py.

Both *adopt* the children of what they replace instead of wrapping it: the state dict keeps timm's keys, and a sharding
strategy sees one module whose own forward runs. What differs between families of ViTs is in sptnet/method/families.py.
"""

from typing import Any, NamedTuple

import timm
import torch
from timm.layers import PatchEmbed
from timm.layers.format import Format, nchw_to
from torch import Tensor, nn
from torch.nn import functional as F

from sptnet.method.families import (
    WORKS,
    BackboneError,
    family_of,
    read_class_token,
    reads_class_token,
    statistics_of,
    without_chance,
)
from sptnet.method.last_block import for_class_token
from sptnet.method.weights import load_backbone

IMAGES_NDIM = 4  # [N, 3, H, W]; tokens have one fewer


class Outputs(NamedTuple):
    """features: [N, D], what the head reads: the normalised class token, or what timm pools; projections: [N, P]
    for the contrastive losses; logits: [N, K].
    """

    features: Tensor
    projections: Tensor
    logits: Tensor


class PromptedPatchEmbed(nn.Module):
    """timm's patch embedding with a prompt image as a second input."""

    proj: nn.Conv2d

    def __init__(self, embed: PatchEmbed):
        super().__init__()
        self.proj = embed.proj
        self.norm = embed.norm
        self.image_size = embed.img_size
        self.grid_size = embed.grid_size
        # models that take any size keep the grid until positions are added
        self.output_fmt = Format.NLC if embed.flatten else embed.output_fmt

    def forward(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Tensor:
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, the model takes {self.image_size}")
        tokens = self.proj(images)
        if prompt is not None:
            prompted = tokens + F.conv2d(prompt, self.proj.weight, stride=self.proj.stride)
            tokens = torch.cat([tokens, prompted]) if with_clean else prompted
        # [N, D, h, w] -> [N, h * w, D], or [N, h, w, D]
        return self.norm(nchw_to(tokens, self.output_fmt))


class DINOHead(nn.Module):
    """An MLP for the contrastive losses and a cosine classifier for the logits (SimGCD, section 4.2).

    The classifier is a weight-normalised linear layer with its gain fixed at 1, so only directions are kept.
    """

    def __init__(self, width: int, num_classes: int, hidden: int = 2048, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.num_classes = num_classes
        self.prototypes = nn.Parameter(torch.empty(num_classes, width))
        for parameter in self.parameters():
            nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        projections = self.mlp(features)
        # a cosine divided by a temperature of 0.04 leaves nothing of what bf16 keeps of it
        with torch.autocast(features.device.type, enabled=False):
            logits = F.normalize(features.float(), dim=1) @ F.normalize(self.prototypes.float(), dim=1).T
        return projections, logits


class PromptedViT(nn.Module):
    """Backbone and head. Prompts live outside: `model(images, prompt)` takes the composed prompt image.

    Args:
        backbone: a timm ViT as `read_class_token` leaves it; its patch embedding and last block are replaced in place.
        head: the DINO head.
        train_from_block: the first block that is trained; see `create_model`.

    Attributes:
        statistics: mean and deviation by which images are to be normalised.
        round_tokens: to which type the tokens of clean images are rounded before they enter the first trained block:
            as a cache of them keeps them, so that a run has the same numbers without it; None: not at all.

    Raises:
        BackboneError: a backbone that cannot be used.
    """

    round_tokens: torch.dtype | None = None

    def __init__(self, backbone: Any, head: DINOHead, train_from_block: int):
        super().__init__()
        self.family = family_of(backbone)
        self.statistics = statistics_of(backbone)
        without_chance(backbone)
        backbone.patch_embed = PromptedPatchEmbed(backbone.patch_embed)
        if reads_class_token(backbone):
            backbone.blocks[-1] = for_class_token(backbone.blocks[-1])
        self.backbone = backbone
        self.head = head
        self.image_size = int(backbone.patch_embed.image_size[0])
        self.patch_size = self.image_size // int(backbone.patch_embed.grid_size[0])
        self.train_from_block = _resolve_block(train_from_block, len(backbone.blocks))
        if self.train_from_block > 0:
            backbone.requires_grad_(False)
            for block in backbone.blocks[self.train_from_block :]:
                block.requires_grad_(True)

    def forward(
        self, images: Tensor, prompt: Tensor | None = None, with_clean: bool = False, only_trunk: bool = False
    ) -> Outputs | Tensor:
        """Compute features, projections and logits.

        Args:
            images: [N, 3, H, W], normalised; or [N, T, D], the tokens of clean ones as `trunk` computes them.
            prompt: [1, 3, H, W], added to every image; None for clean images.
            with_clean: with a prompt, compute 2N outputs: the clean images first, then the prompted ones.
            only_trunk: the tokens that enter the first trained block instead, [N, T, D]; given back, they have the
                outputs of their images. Here, since what gathers sharded weights is hooked to this function.
        """
        arguments = self.family.block_arguments(self.backbone)
        if images.ndim == IMAGES_NDIM:
            tokens = self._trunk(images, prompt, with_clean, arguments)
            if self.round_tokens is not None and prompt is None:
                tokens = tokens.detach().to(self.round_tokens).to(tokens.dtype)
        elif images.shape[1] in (self.num_tokens, 1):  # one behind the last block, where nothing of it is trained
            tokens = images.float()
        else:
            size, tokens_of = self.image_size, [self.num_tokens, self.backbone.embed_dim]
            told = f"give [N, 3, {size}, {size}], or tokens [N, {', '.join(map(str, tokens_of))}]"
            raise ValueError(f"images are {list(images.shape)}: {told}")
        if only_trunk:
            return tokens
        begin = self.train_from_block
        for block, beside in zip(self.backbone.blocks[begin:], arguments[begin:], strict=True):
            tokens = block(tokens, **beside)
        tokens = self.backbone.norm(tokens)
        by_token = reads_class_token(self.backbone)
        features = tokens[:, 0] if by_token else self.backbone.forward_head(tokens, pre_logits=True)
        return Outputs(features, *self.head(features))

    @property
    def num_tokens(self) -> int:
        """Of an image: its patches, and what the backbone has before them."""
        return (self.image_size // self.patch_size) ** 2 + int(self.backbone.num_prefix_tokens)

    def trunk(self, images: Tensor) -> Tensor:
        """uint8 or float [N, 3, H, W] as for `forward` -> the tokens that enter the first trained block, [N, T, D]."""
        return self._trunk(images, None, False, self.family.block_arguments(self.backbone))

    def _trunk(
        self, images: Tensor, prompt: Tensor | None, with_clean: bool, arguments: list[dict[str, Any]]
    ) -> Tensor:
        tokens = self.family.positions(self.backbone, self.backbone.patch_embed(images, prompt, with_clean))
        before = self.train_from_block
        for block, beside in zip(self.backbone.blocks[:before], arguments[:before], strict=True):
            tokens = block(tokens, **beside)
        return tokens


def _check_size(vit: Any, image_size: int) -> None:
    patch = vit.patch_embed.proj.kernel_size[0]
    if vit.patch_embed.img_size != (image_size, image_size) or image_size % patch:
        down = max(patch, image_size // patch * patch)
        raise BackboneError(f"the image size {image_size} is not a multiple of the patch size {patch}: use {down}")


def _resolve_block(train_from_block: int, depth: int) -> int:
    resolved = train_from_block + depth if train_from_block < 0 else train_from_block
    if not 0 <= resolved <= depth:
        raise BackboneError(f"train_from_block is {train_from_block}, but the backbone has {depth} blocks")
    return resolved


def plain_backbone(name: str, image_size: int | None, pretrained: bool, options: dict[str, Any] | None = None) -> Any:
    """A timm ViT without a head, read at its class token if it has one.

    Args:
        image_size: pixels; None for the model's own.
        pretrained: with the weights of timm's hub.
        options: further arguments of the timm model.

    Raises:
        BackboneError: a model that timm cannot build, or that cannot be used; it names one that can.
    """
    size = {} if image_size is None else {"img_size": image_size}
    try:
        vit: Any = timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **size, **(options or {})})
    except Exception as error:  # timm and its layers check little: what they raise is what the arguments broke
        remedy = "without a network set model.weights to a file, or none" if pretrained else f"{WORKS} can be built"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        where = "" if image_size is None else f" at {image_size} px"
        told = BackboneError(
            f"timm cannot build {name!r}{where}: {reason}; {remedy}; `sptnet backbones` lists what works"
        )
        raise _why_never(name) or told.with_outcome("retry" if _is_of_a_busy_hub(error) else "final") from None
    family_of(vit, name)
    if image_size is not None:
        _check_size(vit, image_size)
    read_class_token(vit)
    return vit


def _is_of_a_busy_hub(error: BaseException | None) -> bool:
    """Whether a hub answered that it has too much to do or failed, or did not answer in time; not: there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__name__ == "ReadTimeout" or (isinstance(status, int) and (status == 429 or status >= 500)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _why_never(name: str) -> BackboneError | None:
    """Why a model cannot be used whatever its arguments and weights; None where timm cannot build it at all."""
    try:
        with torch.device("meta"):
            family_of(timm.create_model(name, num_classes=0), name)
    except BackboneError as error:
        return error
    except Exception:  # as it was with the arguments: that is told
        return None
    return None


def create_model(
    backbone: str,
    num_old: int,
    num_new: int,
    *,
    image_size: int = 224,
    weights: str = "timm",
    train_from_block: int = -1,
    head_hidden: int = 2048,
    head_bottleneck: int = 256,
    backbone_options: dict[str, Any] | None = None,
    seed: int = 0,
) -> PromptedViT:
    """Build a PromptedViT for num_old + num_new classes.

    Args:
        backbone: name of a timm ViT, e.g. `vit_base_patch16_224.dino`.
        image_size: pixels; position embeddings are resized to it.
        weights: `timm` (its hub), `none` (random), or a `.safetensors` or `.pth` file, DINO's own included.
        train_from_block: first block trained in the model phase; negative counts from the end, as an index does. 0
            trains the whole backbone, embeddings and final norm too; otherwise those stay frozen, as published (11 of
            12 in the papers).
        head_hidden, head_bottleneck: widths of the projection MLP.
        backbone_options: further arguments of the timm model, e.g. `{"depth": 4}`.
        seed: of all random initial weights; torch's global generator is left as it was.

    Raises:
        BackboneError: an unknown or unsuitable backbone, weights that do not fit it, or fewer than two classes.
    """
    if min(num_old, num_new) < 0 or num_old + num_new < 2:
        raise BackboneError(f"{num_old} old and {num_new} new classes: at least 2 in all are needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = plain_backbone(backbone, image_size, weights == "timm", backbone_options)
        if weights not in ("timm", "none"):
            load_backbone(vit, weights)
        head = DINOHead(vit.num_features, num_old + num_new, head_hidden, head_bottleneck)
        return PromptedViT(vit, head, train_from_block)
