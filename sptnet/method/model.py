"""PromptedViT: a timm ViT that takes a prompt, with the DINO head of SimGCD on its class token.

Two modules of the timm backbone are replaced by ones that compute the same function for less:

- `PromptedPatchEmbed`: the patch embedding is linear, so embed(x + P) = embed(x) + W * P. Prompted pixels are never
  materialised, and the prompt's gradient is one transposed convolution for the whole batch.
- `ClassTokenBlock`: the head reads the class token only, so the last block computes query, projection and MLP for
  that one token, and attends with it without computing the others' keys and values.

Both *adopt* the children of what they replace instead of wrapping it: the state dict keeps timm's keys, and a sharding
strategy sees one module whose own forward runs.
"""

from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sptnet.method.weights import BackboneError, load_backbone

IMAGES_NDIM = 4  # [N, 3, H, W]; tokens have one fewer


class Outputs(NamedTuple):
    """features: [N, D] normalised class tokens; projections: [N, P] for the contrastive losses; logits: [N, K]."""

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

    def forward(self, images: Tensor, prompt: Tensor | None, with_clean: bool) -> Tensor:
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, the model takes {self.image_size}")
        tokens = self.proj(images)
        if prompt is not None:
            prompted = tokens + F.conv2d(prompt, self.proj.weight, stride=self.proj.stride)
            tokens = torch.cat([tokens, prompted]) if with_clean else prompted
        # [N, D, h, w] -> [N, h * w, D]
        return self.norm(tokens.flatten(2).transpose(1, 2))


class ClassTokenBlock(nn.Module):
    """timm's transformer block, computed for the class token only: [N, T, D] -> [N, 1, D]."""

    attn: Any
    norm1: nn.Module
    norm2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    drop_path1: nn.Module
    drop_path2: nn.Module
    mlp: nn.Module

    def __init__(self, block: Block):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        attn = self.attn
        y = self.norm1(x)
        token = self._by_keys(y) if self._needs_keys() else self._by_tokens(y)
        token = attn.proj_drop(attn.proj(attn.norm(token)))
        token = x[:, :1] + self.drop_path1(self.ls1(token))
        return token + self.drop_path2(self.ls2(self.mlp(self.norm2(token))))

    def _needs_keys(self) -> bool:
        attn = self.attn
        return not isinstance(attn.k_norm, nn.Identity) or (self.training and attn.attn_drop.p > 0)

    def _by_tokens(self, y: Tensor) -> Tensor:
        """Attention of the first of `y` [N, T, D] to all, [N, 1, D], with keys and values folded away.

        A score is q . (W_k y) = (W_k^T q) . y, and what it weighs is W_v y, so W_v serves once, on the weighed sum:
        two products of size D x D for an image instead of 2 T. The bias of the keys moves all scores of a head alike.
        """
        attn = self.attn
        heads, depth = attn.num_heads, attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        # [3 * H * d, D] -> 3 x [H, d, D]
        w_query, w_key, w_value = weight.unflatten(0, (3, heads, depth)).unbind(0)
        width = heads * depth
        query = F.linear(y[:, 0], w_query.flatten(0, 1), None if bias is None else bias[:width])
        query = attn.q_norm(query.unflatten(1, (heads, depth))) * attn.scale
        folded = torch.einsum("nhd,hdc->nhc", query, w_key)
        shares = torch.softmax(folded @ y.transpose(1, 2), dim=-1)
        # [N, H, T] @ [N, T, D] -> [N, H, D] -> [N, H, d]
        value = torch.einsum("nhc,hdc->nhd", shares.to(y.dtype) @ y, w_value).flatten(1)
        if bias is not None:
            value = value + bias[2 * width :]
        return value[:, None]

    def _by_keys(self, y: Tensor) -> Tensor:
        """The same by keys and values of all tokens: keys that are normalised do not fold."""
        attn = self.attn
        width = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        query = F.linear(y[:, :1], weight[:width], None if bias is None else bias[:width])
        key_value = F.linear(y, weight[width:], None if bias is None else bias[width:])
        # [N, 1, H * d] -> [N, H, 1, d]; [N, T, 2 * H * d] -> 2 x [N, H, T, d]
        query = query.unflatten(2, (attn.num_heads, attn.head_dim)).transpose(1, 2)
        key, value = key_value.unflatten(2, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = attn.attn_drop.p if self.training else 0.0
        token = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value, dropout_p=dropout)
        return token.transpose(1, 2).flatten(2)


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
        backbone: a timm VisionTransformer; its patch embedding and last block are replaced in place.
        head: the DINO head.
        train_from_block: the first block that is trained; see `create_model`.

    Attributes:
        round_tokens: to which type the tokens of clean images are rounded before they enter the first trained block:
            as a cache of them keeps them, so that a run has the same numbers without it; None: not at all.
    """

    round_tokens: torch.dtype | None = None

    def __init__(self, backbone: VisionTransformer, head: DINOHead, train_from_block: int):
        super().__init__()
        _check_architecture(backbone)
        backbone.patch_embed = PromptedPatchEmbed(backbone.patch_embed)
        backbone.blocks[-1] = ClassTokenBlock(backbone.blocks[-1])
        self.backbone = backbone
        self.head = head
        self.image_size = int(backbone.patch_embed.image_size[0])
        self.patch_size = self.image_size // int(backbone.patch_embed.grid_size[0])
        self.train_from_block = _resolve_block(train_from_block, len(backbone.blocks))
        if self.train_from_block > 0:
            backbone.requires_grad_(False)
            for block in backbone.blocks[self.train_from_block :]:
                block.requires_grad_(True)

    def forward(self, images: Tensor, prompt: Tensor | None = None, with_clean: bool = False) -> Outputs:
        """Compute class tokens, projections and logits.

        Args:
            images: [N, 3, H, W], normalised; or [N, T, D], the tokens of clean ones as `trunk` computes them.
            prompt: [1, 3, H, W], added to every image; None for clean images.
            with_clean: with a prompt, compute 2N outputs: the clean images first, then the prompted ones.
        """
        if images.ndim == IMAGES_NDIM:
            tokens = self.trunk(images, prompt, with_clean)
            if self.round_tokens is not None and prompt is None:
                tokens = tokens.detach().to(self.round_tokens).to(tokens.dtype)
        else:
            tokens = images.float()
        for block in self.backbone.blocks[self.train_from_block :]:
            tokens = block(tokens)
        features = self.backbone.norm(tokens)[:, 0]
        return Outputs(features, *self.head(features))

    def trunk(self, images: Tensor, prompt: Tensor | None = None, with_clean: bool = False) -> Tensor:
        """The tokens that enter the first trained block, [N, T, D]; arguments as for `forward`, images not tokens."""
        tokens = self.backbone.patch_embed(images, prompt, with_clean)
        tokens = self.backbone.norm_pre(self.backbone._pos_embed(tokens))
        for block in self.backbone.blocks[: self.train_from_block]:
            tokens = block(tokens)
        return tokens


def _check_architecture(backbone: nn.Module) -> None:
    if not isinstance(backbone, VisionTransformer) or not isinstance(backbone.patch_embed, PatchEmbed):
        raise BackboneError(f"{type(backbone).__name__} is not a ViT with a convolutional patch embedding")
    last = backbone.blocks[-1]
    if backbone.cls_token is None:
        raise BackboneError("the backbone has no class token, which the head reads")
    if type(last) is not Block or type(last.attn) is not Attention or last.attn.gate is not None:
        raise BackboneError(
            f"the backbone's blocks are {type(last).__name__} with {type(last.attn).__name__}, not plain ones"
        )


def _check_size(vit: VisionTransformer, image_size: int) -> None:
    patch = vit.patch_embed.proj.kernel_size[0]
    if vit.patch_embed.img_size != (image_size, image_size) or image_size % patch:
        down = max(patch, image_size // patch * patch)
        raise BackboneError(f"the image size {image_size} is not a multiple of the patch size {patch}: use {down}")


def _resolve_block(train_from_block: int, depth: int) -> int:
    resolved = train_from_block + depth if train_from_block < 0 else train_from_block
    if not 0 <= resolved <= depth:
        raise BackboneError(f"train_from_block is {train_from_block}, but the backbone has {depth} blocks")
    return resolved


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
        BackboneError: an unknown or unsuitable backbone, or weights that do not fit it.
    """
    if min(num_old, num_new) < 0 or num_old + num_new < 2:
        raise BackboneError(f"{num_old} old and {num_new} new classes: at least 2 in all are needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"num_classes": 0, "global_pool": "token", "img_size": image_size, **(backbone_options or {})}
        try:
            vit = timm.create_model(backbone, pretrained=weights == "timm", **options)
        except Exception as error:  # timm and its layers check little: what they raise is what the arguments broke
            way_out = "; without a network set model.weights to a file, or none" if weights == "timm" else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise BackboneError(f"timm cannot build {backbone!r} at {image_size} px: {reason}{way_out}") from None
        _check_architecture(vit)
        _check_size(vit, image_size)
        if weights not in ("timm", "none"):
            load_backbone(vit, weights)
        head = DINOHead(vit.num_features, num_old + num_new, head_hidden, head_bottleneck)
        return PromptedViT(vit, head, train_from_block)
