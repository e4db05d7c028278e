"""A run's model as a plain timm ViT, and the `config.json` by which timm and transformers build it.

The patch embedding is linear, embed(x + P) = embed(x) + W * P, and position embeddings are added right behind it: what
the prompt P adds to the tokens is a constant, and belongs into theirs. A model without position embeddings gets some,
of zeros but for the prompt, where timm lets one add them. The head becomes linear, its rows the prototypes
at unit length: its outputs are our cosines times the length of the image's class token, so the largest is the same one.
"""

from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from sptnet.data.augment import CROP_RATIO
from sptnet.errors import SptnetError
from sptnet.method.families import Statistics, adding_positions
from sptnet.method.model import PromptedPatchEmbed, PromptedViT
from sptnet.names import AugmentName
from sptnet.trained import TrainedRun


class ExportError(SptnetError, ValueError):
    """A run that cannot be exported as asked; the message says why."""


def folded_position_embedding(backbone: Any, prompt: Tensor) -> Tensor:
    """The position embedding [1, T, D] with a prompt [1, 3, H, W] in it.

    Raises:
        ExportError: a patch embedding with a norm, in which the prompt is no constant; a prompt of another image size,
            which timm would resample; or a backbone to which timm cannot add position embeddings.
    """
    embed = backbone.patch_embed
    if not isinstance(embed.norm, nn.Identity):
        raise ExportError(
            f"the patch embedding has a norm of its own ({type(embed.norm).__name__}): what the prompt adds behind it "
            "depends on the image, and cannot be folded into a plain ViT"
        )
    size = embed.image_size if isinstance(embed, PromptedPatchEmbed) else embed.img_size
    if tuple(prompt.shape[-2:]) != tuple(size):
        raise ExportError(
            f"the prompt is of images of {prompt.shape[-2]} x {prompt.shape[-1]} pixels, the backbone of "
            f"{size[0]} x {size[1]}: a prompt holds at its own size only, and timm would resample it without a word"
        )
    positions = _positions(backbone)
    weight = embed.proj.weight.detach().double()
    # [1, D, h, w] -> [1, h * w, D]; in double: this rounds once where the run's own sum rounds for every image
    tokens = F.conv2d(prompt.detach().double(), weight, stride=embed.proj.stride).flatten(2).transpose(1, 2)
    folded = positions.detach().double().clone()
    folded[:, -tokens.shape[1] :] += tokens
    return folded.to(positions.dtype)


def _positions(backbone: Any) -> Tensor:
    """The position embeddings [1, T, D]; zeros where there are none and timm lets one add them. Raises ExportError."""
    if getattr(backbone, "pos_embed", None) is not None:
        return backbone.pos_embed
    if adding_positions(backbone) is None:
        raise ExportError(
            f"a {type(backbone).__name__} has no position embedding, into which the prompt could be folded, and timm "
            "cannot add one: a run without a prompt (SimGCD) can be exported, or one of another backbone"
        )
    patches = backbone.patch_embed.grid_size[0] * backbone.patch_embed.grid_size[1]
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    return backbone.patch_embed.proj.weight.new_zeros(1, prefix + patches, backbone.num_features)


def plain_state(model: PromptedViT, prompt: Tensor | None) -> dict[str, Tensor]:
    """The state dict of a plain timm ViT that does what model and prompt do. Raises ExportError."""
    state = {name: value.detach().clone().contiguous() for name, value in model.backbone.state_dict().items()}
    if prompt is not None:
        state["pos_embed"] = folded_position_embedding(model.backbone, prompt)
    prototypes = F.normalize(model.head.prototypes.detach().float(), dim=1)
    return state | {"head.weight": prototypes.contiguous(), "head.bias": torch.zeros(len(prototypes))}


def model_args(run: TrainedRun) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside name and number of classes, which breaks transformers' timm wrapper."""
    backbone, added = run.encoder.module.backbone, {}
    if run.encoder.prompt is not None and getattr(backbone, "pos_embed", None) is None:
        added = adding_positions(backbone) or {}
    if getattr(backbone, "dynamic_img_size", False):  # timm would resample the prompt for images of another size
        added = added | {"dynamic_img_size": False}
    return {
        "img_size": run.encoder.image_size, "global_pool": backbone.global_pool, **run.config.model.backbone_options,
        **added,
    }  # fmt: skip


def plain_vit(run: TrainedRun) -> Any:
    """The run's model as a timm ViT, in evaluation mode. Raises ExportError."""
    name = run.config.model.backbone
    if isinstance(run.encoder.module.backbone, VisionTransformerDistilled):
        raise ExportError(f"{name} has two heads, on class and distillation token: timm has no plain model of one")
    state = plain_state(run.encoder.module, run.encoder.prompt)
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=len(run.classes.names), **model_args(run))
        if isinstance(vit.norm, nn.Identity):  # timm has the norm behind the pooling, where it does the same to a token
            state = {f"fc_{k}" if k.startswith("norm.") else k: v for k, v in state.items()}
        vit.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise ExportError(f"timm cannot build {name} with the prompt in its positions: {told}") from None
    return vit.eval()


def hub_config(run: TrainedRun, vit: Any) -> dict[str, Any]:
    """What `config.json` says; `sptnet` in it is for people, timm and transformers pass it over."""
    size = run.encoder.image_size
    return {
        "architecture": vit.pretrained_cfg["architecture"],
        "num_classes": len(run.classes.names),
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "label_names": run.classes.names,
        "model_args": model_args(run),
        "pretrained_cfg": {
            "tag": "sptnet",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            **preprocessing(run.encoder.augment, run.encoder.module.statistics),
            "num_classes": len(run.classes.names),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "sptnet": {
            "num_old": run.classes.num_old,
            "temperature": run.temperature,
            "prompt": run.encoder.prompt is not None,
        },
    }


def preprocessing(augment: AugmentName, statistics: Statistics) -> dict[str, Any]:
    """How an evaluation brings images to size, in timm's words."""
    whole = augment == "affine"  # the whole image, squeezed to a square
    return {
        "interpolation": "bicubic",
        "crop_pct": 1.0 if whole else CROP_RATIO,
        "crop_mode": "squash" if whole else "center",
        "mean": list(statistics[0]),
        "std": list(statistics[1]),
    }
