"""`model.safetensors` of a run: weights and prompt as they are evaluated, with what they were trained as.

    model.NAME      the model's whole state dict, float32
    prompt.NAME     the prompt's, of SPTNet

The one key `facts` of its metadata (several would come in any order) is JSON: `step` (how many are done), `precision`
(that they were computed in), `num_old` and `classes` of the dataset, `mean` and `std` by which images are normalised
(ImageNet's where a file does not say), `sha256` over the tensors. Files of earlier versions have `step` alone and are
read too.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sptnet.config_sections import PromptConfig
from sptnet.data.format.fields import Count, Digest
from sptnet.data.format.files import check_regular, write_whole
from sptnet.errors import outcome_of_reading
from sptnet.method.families import IMAGENET, Triple
from sptnet.method.metrics import MAX_CLUSTERS
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt, create_prompt
from sptnet.run.checkpoint import checkpoints, digest
from sptnet.run.folder import CONFIG, MODEL, RunError, is_unfinished, writing
from sptnet.run.records import DamagedError, parse_json
from sptnet.strategy.launcher import Precision


@dataclass(frozen=True)
class ModelFacts:
    """What a model file says of itself; None where an earlier version did not."""

    step: Count | None = None
    precision: Precision | None = None
    num_old: Count | None = None
    classes: tuple[str, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    sha256: Digest | None = None


def save_model(folder: Path, model: dict[str, Tensor], prompt: Prompt | None, facts: ModelFacts) -> None:
    """Write a model's whole state dict and a prompt. Raises RunError."""
    state = {f"model.{k}": v for k, v in model.items()}
    if prompt is not None:
        state |= {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    told = asdict(replace(facts, sha256=digest(state.items())))
    encoded = save(state, metadata={"facts": json.dumps(told)})
    with writing(folder / MODEL):
        write_whole(folder / MODEL, encoded)


def read_facts(folder: Path) -> ModelFacts:
    """What a run's model file says of itself; raises RunError."""
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        return _facts(path, opened.metadata() or {})


def has_model(folder: Path) -> bool:
    """Whether a folder holds a run's model; raises RunError for one that is damaged."""
    return (folder / MODEL).is_file() and _holds(folder, "model.")


def has_prompt(folder: Path) -> bool:
    """Whether the model of a run's folder was trained with prompts; raises RunError for one that is damaged."""
    return _holds(folder, "prompt.")


def _holds(folder: Path, start: str) -> bool:
    """Whether the name of a tensor begins so."""
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        return any(key.startswith(start) for key in opened.keys())  # noqa: SIM118  (not a dict)


def number_of_classes(folder: Path) -> int:
    """How many classes a run's head has; raises RunError."""
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        shape = opened.get_slice("model.head.prototypes").get_shape()
    if len(shape) != 2 or shape[1] < 1 or not 0 < shape[0] <= MAX_CLUSTERS:
        raise RunError(f"{path} is damaged: prototypes of shape {shape} are of no head")
    return int(shape[0])


def unfinished(folder: Path) -> str:
    """A sentence on the model of a run that was not trained to its end, empty of any other; raises RunError."""
    if not is_unfinished(folder):
        return ""
    step = read_facts(folder).step
    newest = [f", its newest checkpoint {path.name}" for path in checkpoints(folder)[-1:]]
    told = "an unknown step" if step is None else f"step {step}"
    return f"{folder} is not finished: its {MODEL} is of {told}{''.join(newest)}"


def load_model(folder: Path, model: PromptedViT, prompt: Prompt | None, whole: bool = True) -> ModelFacts:
    """Load a run's weights into a model, and its prompt into `prompt`.

    Args:
        whole: the file is to have a prompt where there is one to load, and none elsewhere; False: its prompt is left.

    Raises:
        RunError: no model there, a damaged one, or one of another shape; the message names the first differences.
    """
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        facts = _facts(path, opened.metadata() or {})
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if whole and prompt is None and any(key.startswith("prompt.") for key in state):
        raise RunError(f"{path} was trained with prompts, and {CONFIG} beside it says simgcd: they are of two runs")
    if facts.sha256 is not None and digest(state.items()) != facts.sha256:
        raise RunError(f"{path} is damaged (sha256): copy it again, or continue the run from its checkpoint")
    if wrong := [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]:
        raise RunError(f"{path} has values that are not finite in {wrong[0]}: it is damaged, or its training diverged")
    told = (facts.mean or IMAGENET[0], facts.std or IMAGENET[1])
    if told != model.statistics:
        raise RunError(
            f"{path} was trained on images normalised by mean and deviation {told}, and timm now says "
            f"{model.statistics} of this backbone: use the version of timm that it was trained with"
        )
    _load(path, model, {k[6:]: v for k, v in state.items() if k.startswith("model.")})
    if prompt is not None:
        _load(path, prompt, {k[7:]: v for k, v in state.items() if k.startswith("prompt.")})
    return facts


def load_prompt(folder: Path, spec: PromptConfig, image_size: int) -> Prompt | None:
    """A run's prompt without its model; None where it has none.

    Raises:
        RunError: no model file there, or a damaged one.
    """
    path = folder / MODEL
    with _reading(path), safe_open(path, "pt") as opened:
        state = {key[7:]: opened.get_tensor(key) for key in opened.keys() if key.startswith("prompt.")}  # noqa: SIM118
        if not state:
            return None
        shape = opened.get_slice("model.backbone.patch_embed.proj.weight").get_shape()
        patch = int(shape[-1]) if shape else 0
        if patch < 1:
            raise RunError(f"{path} is damaged: its patches have {patch} pixels")
    try:
        prompt = create_prompt(spec.kind, image_size, patch, spec.border, spec.frame)
    except ValueError as error:
        raise RunError(f"{path} is of another prompt than the configuration says: {error}") from None
    _load(path, prompt, state)
    return prompt


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a model file raises into a RunError that names it."""
    try:
        check_regular(path)
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is not there: has the run been trained?") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}").with_outcome(
            outcome_of_reading(error)
        ) from None
    except (SafetensorError, UnicodeDecodeError, MemoryError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}): is it damaged?") from None


def _facts(path: Path, metadata: dict[str, str]) -> ModelFacts:
    try:
        # without `facts`, of an earlier version
        facts = parse_json(metadata.get("facts", json.dumps(metadata)), ModelFacts)
        if facts.classes is not None and len(set(facts.classes)) < len(facts.classes):
            raise DamagedError("a class is named twice")
        if facts.num_old is not None and not 0 < facts.num_old <= (len(facts.classes) if facts.classes else math.inf):
            raise DamagedError(f"{facts.num_old} old classes")
        return facts
    except DamagedError as error:
        raise RunError(f"{path} is damaged, its metadata is not what a run writes: {error}") from None


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
