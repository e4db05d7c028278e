"""Checkpoints in the formats of the authors: SPTNet's published ones and SimGCD's.

Their keys tell them apart: `0.0.pad_up`, `0.1.patch` hold SPTNet's prompts and `1.0.*`, `1.1.*` backbone and head; in
SimGCD's `0.*` and `1.*` are backbone and head.
"""

from pathlib import Path

import timm
import torch
from torch import Tensor

from sptnet.method.families import BackboneError
from sptnet.method.model import DINOHead, PromptedViT
from sptnet.method.prompts import Prompt, create_prompt
from sptnet.method.weights import read_state_dict
from sptnet.names import PromptKind

FRAME_SIDES = ("pad_up", "pad_down", "pad_left", "pad_right")
DEEPEST = 256  # blocks
HEAD_WIDTH = 64  # of every published ViT; not visible in any shape


def load_reference(
    path: str | Path, num_heads: int | None = None, border: int = 1, train_from_block: int = -1
) -> tuple[PromptedViT, Prompt | None]:
    """Build model and prompt from an authors' checkpoint; the prompt is None for SimGCD's.

    Args:
        num_heads: attention heads; None takes 64 channels a head, as in all published models.
        border: width of the border inside a patch, which the file does not say.
        train_from_block: as for `create_model`.

    Raises:
        BackboneError: not such a checkpoint; the message names the first keys that do not belong. Or a border that
            does not fit into its patches.
    """
    state = read_state_dict(path)
    try:
        return _built(path, state, num_heads, border, train_from_block)
    except BackboneError:
        raise
    except Exception as error:  # timm and torch raise whatever odd shapes break in them
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BackboneError(
            f"{path} has shapes of no ViT with a DINO head, or num_heads does not fit: {reason}"
        ) from None


def _built(
    path: str | Path, state: dict[str, Tensor], num_heads: int | None, border: int, train_from_block: int
) -> tuple[PromptedViT, Prompt | None]:
    if "1.0.cls_token" in state:
        body, head, prompts = "1.0.", "1.1.", {k: v for k, v in state.items() if k.startswith("0.")}
    elif "0.cls_token" in state:
        body, head, prompts = "0.", "1.", {}
    else:
        raise BackboneError(
            f"{path} is neither an SPTNet nor a SimGCD checkpoint: its keys begin with {next(iter(state))!r}"
        )
    model = _model(path, _below(state, body), _below(state, head), num_heads, train_from_block)
    known = len(prompts) + len(_below(state, body)) + len(_below(state, head))
    if known != len(state):
        odd = [k for k in state if not k.startswith((body, head)) and k not in prompts]
        raise BackboneError(f"{path} has unexpected keys: {', '.join(odd[:4])}")
    return model, _prompt(path, prompts, model, border) if prompts else None


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _model(
    path: str | Path, body: dict[str, Tensor], head: dict[str, Tensor], num_heads: int | None, train_from_block: int
) -> PromptedViT:
    try:
        width, _, patch_size, _ = body["patch_embed.proj.weight"].shape
        grid = round((body["pos_embed"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(k.split(".")[1]) for k in body if k.startswith("blocks."))
        mlp_ratio = body["blocks.0.mlp.fc1.weight"].shape[0] / width
        hidden, bottleneck = head["mlp.0.weight"].shape[0], head["mlp.4.weight"].shape[0]
        gain, prototypes = head.pop("last_layer.weight_g"), head.pop("last_layer.weight_v")
    except (KeyError, ValueError) as error:
        raise BackboneError(f"{path} lacks {error} of a ViT with a DINO head") from None
    if depth > DEEPEST:
        raise BackboneError(f"{path} has a block {depth - 1}: no published model has more than {DEEPEST}")
    if num_heads is None and width % HEAD_WIDTH:
        raise BackboneError(f"{path} has width {width}, not a multiple of {HEAD_WIDTH}: give num_heads")
    if not torch.all(gain == 1):
        raise BackboneError(f"{path} has a last_layer.weight_g that is not 1 throughout, which this head fixes")
    vit = timm.create_model(
        "vit_base_patch16_224", num_classes=0, global_pool="token", img_size=grid * patch_size, patch_size=patch_size,
        embed_dim=width, depth=depth, num_heads=num_heads or width // HEAD_WIDTH, mlp_ratio=mlp_ratio,
    )  # fmt: skip
    model = PromptedViT(vit, DINOHead(width, len(prototypes), hidden, bottleneck), train_from_block)
    loaded = {f"backbone.{k}": v for k, v in body.items()} | {f"head.{k}": v for k, v in head.items()}
    try:
        model.load_state_dict(loaded | {"head.prototypes": prototypes})
    except RuntimeError as error:
        raise BackboneError(f"{path} does not fit: {' '.join(str(error).split()[:60])}") from None
    return model


def _prompt(path: str | Path, state: dict[str, Tensor], model: PromptedViT, border: int) -> Prompt:
    names = {k.split(".")[-1]: v for k, v in state.items()}
    odd = [k for k in state if k.split(".")[-1] not in (*FRAME_SIDES, "patch")]
    if odd or ("pad_up" in names and not all(side in names for side in FRAME_SIDES)):
        raise BackboneError(f"{path} has prompts that are neither patch borders nor a frame: {', '.join(odd or state)}")
    frame = names["pad_up"].shape[2] if "pad_up" in names else 0
    tile = "patch" in names and names["patch"].shape[-1] == model.patch_size < model.image_size
    kind: PromptKind = "global" if "patch" not in names else "all" if frame else "shared" if tile else "spatial"
    if frame and tile:
        raise BackboneError(f"{path} combines a frame with a shared border, which is none of the published prompts")
    try:
        prompt = create_prompt(kind, model.image_size, model.patch_size, border, frame)
    except ValueError as error:
        raise BackboneError(f"{path} has prompts that cannot be: {error}") from None
    with torch.no_grad():
        if "patch" in names:
            prompt.part("spatial").copy_from(names["patch"])
        if frame:
            prompt.part("global").copy_from(_frame_image(names))
    return prompt


def _frame_image(names: dict[str, Tensor]) -> Tensor:
    """Lay the four sides of a frame around an empty middle: [1, 3, H, W]."""
    up, down, left, right = (names[side] for side in FRAME_SIDES)
    middle = left.new_zeros(1, 3, left.shape[2], up.shape[3] - left.shape[3] - right.shape[3])
    return torch.cat([up, torch.cat([left, middle, right], dim=3), down], dim=2)
