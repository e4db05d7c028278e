"""A run's folder: what is in it, how it is written and read.

config.yaml           the configuration, complete
log.txt               plain lines of what was printed
metrics.jsonl         one line per step: losses, learning rates, phase, images/s; one per evaluation
model.safetensors     `model.*` and `prompt.*`, written whole or not at all, after every evaluation
metrics.json          the last evaluation
predictions.npz       its uid, target and prediction of every sample, per protocol
"""

import os
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sptnet.config import Config, ConfigError, load_config
from sptnet.model import PromptedViT
from sptnet.prompts import Prompt

CONFIG, MODEL, METRICS, PREDICTIONS, STEPS, LOG = (
    "config.yaml", "model.safetensors", "metrics.json", "predictions.npz", "metrics.jsonl", "log.txt",
)  # fmt: skip


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why."""


def open_run(config: Config) -> Path:
    """Make the folder of a new run and write its configuration.

    Raises:
        RunError: the folder holds a finished run already.
    """
    folder = Path(config.run)
    if (folder / METRICS).exists() and (folder / MODEL).exists():
        raise RunError(f"{folder} holds a finished run: remove it, or choose another folder with run=FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STEPS).unlink(missing_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    return folder


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        RunError: not a run's folder.
    """
    try:
        return load_config(folder / CONFIG)
    except ConfigError as error:
        raise RunError(f"{folder} is not a run: {error}") from None


def save_model(folder: Path, model: PromptedViT, prompt: Prompt | None) -> None:
    """Write model and prompt whole or not at all."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    if prompt is not None:
        state |= {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    temporary = folder / (MODEL + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    temporary.replace(folder / MODEL)


def load_model(folder: Path, model: PromptedViT, prompt: Prompt | None) -> None:
    """Load a run's weights into a model, and its prompt into `prompt` where one is given.

    Raises:
        RunError: no model there, or one of another shape; the message names the first differences.
    """
    path = folder / MODEL
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}): has the run been trained?") from None
    _load(path, model, {k[6:]: v for k, v in state.items() if k.startswith("model.")})
    if prompt is not None:
        _load(path, prompt, {k[7:]: v for k, v in state.items() if k.startswith("prompt.")})


def has_model(path: Path) -> bool:
    """Whether a path is a run's folder, or the model file in one."""
    if not (path / MODEL).is_file():
        return False
    with safe_open(path / MODEL, "pt") as opened:
        return any(key.startswith("model.") for key in opened.keys())  # noqa: SIM118  (not a dict)


def _load(path: Path, module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    expected = module.state_dict()
    odd = sorted(expected.keys() ^ state.keys())
    shared = sorted(expected.keys() & state.keys())
    wrong = [key for key in shared if expected[key].shape != state[key].shape]
    odd += [f"{key} {list(state[key].shape)} for {list(expected[key].shape)}" for key in wrong]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise RunError(
            f"{path} is of another {type(module).__name__} than the configuration says: {', '.join(odd[:3])}{more}"
        )
    module.load_state_dict(state)
