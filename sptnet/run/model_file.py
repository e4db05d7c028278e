"""`model.safetensors` of a run: weights and prompt as they are evaluated, with what they were trained as.

    model.NAME      the model's whole state dict, float32
    prompt.NAME     the prompt's, of SPTNet

Its metadata says `step` (how many are done), `precision` (that they were computed in), `num_old` and `classes` (JSON)
of the dataset, and `sha256` over the tensors. Files of earlier versions lack some of it and are read too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.run.checkpoint import checkpoints, digest
from sptnet.run.durable import write_whole
from sptnet.run.folder import MODEL, RunError, writing
from sptnet.strategy.connect import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class ModelFacts:
    """What a model file says of itself; None where an earlier version did not."""

    step: int | None = None
    precision: Precision | None = None
    num_old: int | None = None
    classes: tuple[str, ...] | None = None


def save_model(folder: Path, model: dict[str, Tensor], prompt: Prompt | None, facts: ModelFacts) -> None:
    """Write a model's whole state dict and a prompt. Raises RunError."""
    state = {f"model.{k}": v for k, v in model.items()}
    if prompt is not None:
        state |= {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    told = {"sha256": digest(state.items())}
    for name in ("step", "precision", "num_old"):
        if (value := getattr(facts, name)) is not None:
            told[name] = str(value)
    if facts.classes is not None:
        told["classes"] = json.dumps(facts.classes)
    encoded = save(state, metadata=told)
    with writing(folder / MODEL):
        write_whole(folder / MODEL, encoded)


def read_facts(folder: Path) -> ModelFacts:
    """What a run's model file says of itself; raises RunError."""
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        return _facts(path, opened.metadata() or {})


def has_model(folder: Path) -> bool:
    """Whether a folder holds a run's model; raises RunError for one that is damaged."""
    path = folder / MODEL
    if not path.is_file():
        return False
    with _reading(path), safe_open(path, "pt") as opened:
        return any(key.startswith("model.") for key in opened.keys())  # noqa: SIM118  (not a dict)


def how_far(folder: Path) -> str:
    """A sentence on the model of an unfinished run; raises RunError."""
    step = read_facts(folder).step
    newest = [f", its newest checkpoint {path.name}" for path in checkpoints(folder)[-1:]]
    told = "an unknown step" if step is None else f"step {step}"
    return f"{folder} is not finished: its {MODEL} is of {told}{''.join(newest)}"


def load_model(folder: Path, model: PromptedViT, prompt: Prompt | None) -> ModelFacts:
    """Load a run's weights into a model, and its prompt into `prompt` where one is given.

    Raises:
        RunError: no model there, a damaged one, or one of another shape; the message names the first differences.
    """
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if "sha256" in metadata and digest(state.items()) != metadata["sha256"]:
        raise RunError(f"{path} is damaged (sha256): copy it again, or continue the run from its checkpoint")
    if wrong := [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]:
        raise RunError(f"{path} has values that are not finite in {wrong[0]}: it is damaged, or its training diverged")
    _load(path, model, {k[6:]: v for k, v in state.items() if k.startswith("model.")})
    if prompt is not None:
        _load(path, prompt, {k[7:]: v for k, v in state.items() if k.startswith("prompt.")})
    return _facts(path, metadata)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a model file raises into a RunError that names it."""
    if not path.is_file():
        raise RunError(f"{path} is not there: has the run been trained?")
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError, MemoryError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}): is it damaged?") from None


def _facts(path: Path, metadata: dict[str, str]) -> ModelFacts:
    step, num_old, precision = metadata.get("step"), metadata.get("num_old"), metadata.get("precision")
    counts = [text for text in (step, num_old) if text is not None]
    try:
        classes = json.loads(metadata["classes"]) if "classes" in metadata else None
    except (ValueError, RecursionError):
        classes = 0
    sound = all(text.isascii() and text.isdigit() and len(text) < 16 for text in counts)
    sound = sound and (precision is None or precision in PRECISIONS)
    sound = sound and (classes is None or (isinstance(classes, list) and all(isinstance(c, str) for c in classes)))
    if not sound:
        raise RunError(f"{path} has metadata that no run writes: it is damaged")
    return ModelFacts(
        None if step is None else int(step),
        cast("Precision | None", precision),
        None if num_old is None else int(num_old),
        None if classes is None else tuple(classes),
    )


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
