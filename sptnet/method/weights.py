"""Weights from files: backbones in timm's, DINO's and DINOv2's formats. Nothing pickled is executed."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from sptnet.errors import SptnetError

WRAPPERS = ("model", "state_dict", "teacher")  # teacher: DINO's full training checkpoints
PREFIXES = ("module.", "backbone.")
NOT_BACKBONE = ("head.", "fc.", "mask_token", "dino_head", "ibot_head")


class BackboneError(SptnetError, ValueError):
    """A backbone or a weight file that cannot be used; the message says why."""

    on_all_ranks = True


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a flat state dict from a `.safetensors` file or a torch file, out of its usual wrappers and prefixes.

    Raises:
        BackboneError: no such file, not a state dict, or one that would need to execute code to be read.
    """
    path = Path(path)
    try:
        raw: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError as error:
        raise BackboneError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BackboneError(f"{path} is not a plain file of weights: {str(error).splitlines()[0]}") from None
    for wrapper in WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    if not isinstance(raw, dict) or not raw or not all(isinstance(value, Tensor) for value in raw.values()):
        raise BackboneError(f"{path} does not hold a state dict of tensors")
    state = {str(key): value for key, value in raw.items()}
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_backbone(backbone: VisionTransformer, path: str | Path) -> None:
    """Load a weight file into a timm ViT, resizing its position embeddings to the model's grid.

    Raises:
        BackboneError: keys or shapes that do not fit; the message names them.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(NOT_BACKBONE)}
    state = checkpoint_filter_fn(state, backbone)
    expected = backbone.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has another shape for", sorted(wrong))):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise BackboneError(f"{path} does not fit the backbone: it {what} {', '.join(keys[:4])}{more}")
    backbone.load_state_dict(state)
