"""Weights from files: backbones in timm's formats and in those of their authors. Nothing pickled is executed."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sptnet.method.families import BackboneError, family_of, reads_class_token

WRAPPERS = ("model", "state_dict", "teacher")  # teacher: DINO's full training checkpoints
PREFIXES = ("module.", "backbone.")
NOT_BACKBONE = ("head.", "fc.", "mask_token", "dino_head", "ibot_head")


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
    except Exception as error:  # the readers raise whatever damage makes of a file
        why = (str(error).splitlines() or ["it is empty, or cut off"])[0]
        if "weights_only" in str(error):  # torch advises to execute what it holds
            why = "reading it would execute code, or it is damaged"
        raise BackboneError(f"{path} is not a plain file of weights: {why}") from None
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


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load a weight file into a timm ViT, resizing its positions to the model's grid.

    Where the class token is read, `fc_norm`, as timm calls the norm behind another pooling, is `norm`.

    Raises:
        BackboneError: keys or shapes that do not fit; the message names them.
    """
    state = {k: v for k, v in read_state_dict(path).items() if not k.startswith(NOT_BACKBONE)}
    try:
        with redirect_stdout(io.StringIO()):  # timm prints what DINOv3's files have and a model has not
            state = family_of(backbone).read_weights(state, backbone)
    except (AttributeError, KeyError, RuntimeError, ValueError, AssertionError) as error:  # what misfits break
        told = " ".join(str(error).split())[:200]
        raise BackboneError(f"{path} does not fit the backbone: {type(error).__name__}: {told}") from None
    if reads_class_token(backbone) and "norm.weight" not in state:
        state = {f"norm.{k[8:]}" if k.startswith("fc_norm.") else k: v for k, v in state.items()}
    expected = backbone.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has another shape for", sorted(wrong))):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise BackboneError(f"{path} does not fit the backbone: it {what} {', '.join(keys[:4])}{more}")
    backbone.load_state_dict(state)
