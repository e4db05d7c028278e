"""A run's model as a plain timm ViT, and the `config.json` by which timm and transformers build it.

The patch embedding is linear, embed(x + P) = embed(x) + W * P, and position embeddings are added right behind it: what
the prompt P adds to the tokens is a constant, and belongs into theirs. The head becomes linear, its rows the prototypes
at unit length: its outputs are our cosines times the length of the image's class token, so the largest is the same one.
"""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sptnet.data.augment import CROP_RATIO, MEAN, STD, AugmentName
from sptnet.errors import SptnetError
from sptnet.method.model import PromptedPatchEmbed, PromptedViT
from sptnet.trained import TrainedRun


class ExportError(SptnetError, ValueError):
    """A run that cannot be exported as asked; the message says why."""


def folded_position_embedding(backbone: VisionTransformer, prompt: Tensor) -> Tensor:
    """The position embedding [1, T, D] with a prompt [1, 3, H, W] in it.

    Raises:
        ExportError: a patch embedding with a norm, in which the prompt is no constant; a prompt of another image size,
            which timm would resample; or a backbone without position embeddings.
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
    if backbone.pos_embed is None:
        raise ExportError("the backbone has no position embedding, into which the prompt could be folded")
    weight = embed.proj.weight.detach().double()
    # [1, D, h, w] -> [1, h * w, D]; in double: this rounds once where the run's own sum rounds for every image
    tokens = F.conv2d(prompt.detach().double(), weight, stride=embed.proj.stride).flatten(2).transpose(1, 2)
    folded = backbone.pos_embed.detach().double().clone()
    folded[:, 0 if backbone.no_embed_class else backbone.num_prefix_tokens :] += tokens
    return folded.to(backbone.pos_embed.dtype)


def plain_state(model: PromptedViT, prompt: Tensor | None) -> dict[str, Tensor]:
    """The state dict of a plain timm ViT that does what model and prompt do. Raises ExportError."""
    state = {name: value.detach().clone().contiguous() for name, value in model.backbone.state_dict().items()}
    if prompt is not None:
        state["pos_embed"] = folded_position_embedding(model.backbone, prompt)
    prototypes = F.normalize(model.head.prototypes.detach().float(), dim=1)
    return state | {"head.weight": prototypes.contiguous(), "head.bias": torch.zeros(len(prototypes))}


def model_args(run: TrainedRun) -> dict[str, Any]:
    """Arguments of `timm.create_model` beside name and number of classes, which breaks transformers' timm wrapper."""
    return {"img_size": run.encoder.image_size, "global_pool": "token", **run.config.model.backbone_options}


def plain_vit(run: TrainedRun) -> VisionTransformer:
    """The run's model as a timm ViT, in evaluation mode. Raises ExportError."""
    state = plain_state(run.encoder.module, run.encoder.prompt)
    vit = timm.create_model(
        run.config.model.backbone, pretrained=False, num_classes=len(run.classes.names), **model_args(run)
    )
    vit.load_state_dict(state)
    return vit.eval()


def hub_config(run: TrainedRun, vit: VisionTransformer) -> dict[str, Any]:
    """What `config.json` says; `sptnet` in it is for people, timm and transformers pass it over."""
    size = run.encoder.image_size
    return {
        "architecture": vit.pretrained_cfg["architecture"],
        "num_classes": len(run.classes.names),
        "num_features": vit.num_features,
        "global_pool": "token",
        "label_names": run.classes.names,
        "model_args": model_args(run),
        "pretrained_cfg": {
            "tag": "sptnet",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            **preprocessing(run.encoder.augment),
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


def preprocessing(augment: AugmentName) -> dict[str, Any]:
    """How an evaluation brings images to size, in timm's words."""
    whole = augment == "affine"  # the whole image, squeezed to a square
    return {
        "interpolation": "bicubic",
        "crop_pct": 1.0 if whole else CROP_RATIO,
        "crop_mode": "squash" if whole else "center",
        "mean": list(MEAN),
        "std": list(STD),
    }
