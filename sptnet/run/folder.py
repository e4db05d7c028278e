"""A run's folder: what is in it, how it is written and read.

checkpoints/          to continue from; see sptnet/run/checkpoint.py
config.yaml           the configuration, complete
starts.jsonl          a line per start: git revision, nodes, strategy, package versions; see sptnet/run/provenance.py
log.txt               plain lines of what was printed
metrics.jsonl         one line per step: losses, learning rates, phase, images/s; one per evaluation
model.safetensors     `model.*` and `prompt.*`, with the number of steps done; written whole or not at all, after every
                      evaluation
metrics.json          the evaluation at the end, or the last by `sptnet eval`
predictions.npz       its uid, target and prediction of every sample, per protocol
finished              there when the run is; written last
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sptnet.config import Config, ConfigError
from sptnet.config_file import load_config
from sptnet.errors import Outcome, SptnetError
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.run.checkpoint import checkpoints
from sptnet.run.durable import write_whole
from sptnet.run.outcome import STAYING

CONFIG, MODEL, METRICS, PREDICTIONS, STEPS, LOG, LOCK, FINISHED = (
    "config.yaml", "model.safetensors", "metrics.json", "predictions.npz", "metrics.jsonl", "log.txt", "run.lock",
    "finished",
)  # fmt: skip


class RunError(SptnetError, ValueError):
    """A run folder that cannot be used as asked; the message says why."""

    on_all_ranks = True


class OccupiedError(RunError):
    """A run folder that another process trains in; it may be about to end."""

    outcome: Outcome = "retry"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a RunError that names the path."""
    try:
        yield
    except OSError as error:
        told = RunError(f"{path} cannot be written: {error.strerror}; what was written before stays")
        told.outcome = "final" if error.errno in STAYING else "retry"
        raise told from error


def check_unfinished(config: Config) -> None:
    """Raise RunError if the run's folder holds a finished run."""
    folder = Path(config.run)
    if (folder / FINISHED).exists():
        raise RunError(f"{folder} holds a finished run: remove it, or choose another folder with run=FOLDER")


def mark_finished(folder: Path) -> None:
    """Say that a run has taken its last step; an evaluation alone may be of an unfinished one. Raises RunError."""
    with writing(folder / FINISHED):
        write_whole(folder / FINISHED, b"")


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that was not trained to its end."""
    return (folder / CONFIG).exists() and not (folder / FINISHED).exists()


def how_far(folder: Path) -> str:
    """A sentence on the model of an unfinished run."""
    with safe_open(folder / MODEL, "pt") as opened:
        step = (opened.metadata() or {}).get("step", "unknown")
    newest = [f", its newest checkpoint {path.name}" for path in checkpoints(folder)[-1:]]
    return f"{folder} is not finished: its model.safetensors is of step {step}{''.join(newest)}"


def lock_run(config: Config) -> FileLock:
    """Make a run's folder, and keep others from training in it for as long as the lock lives.

    Raises:
        OccupiedError: another process trains there, perhaps one whose launcher was killed.
        RunError: the folder cannot be made.
    """
    folder = Path(config.run)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OccupiedError(
                f"{folder} is being trained by another process: stop it, or choose another folder"
            ) from None
    return lock


def open_run(config: Config, start: int) -> None:
    """Write a run's configuration; forget what was told of steps from `start` on. Raises RunError."""
    folder = Path(config.run)
    steps = folder / STEPS
    with writing(steps):
        if start == 0:
            steps.unlink(missing_ok=True)
        elif steps.exists():
            kept = [line for line in steps.read_text().splitlines(keepends=True) if _is_before(line, start)]
            write_whole(steps, "".join(kept).encode())
    with writing(folder / CONFIG):
        write_whole(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def _is_before(line: str, start: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # half a line, of a run that was killed while it wrote
    # an evaluation is numbered by the steps done before it
    return bool(record["step"] < start + ("evaluation" in record))


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        RunError: not a run's folder.
    """
    try:
        return load_config(folder / CONFIG)
    except ConfigError as error:
        raise RunError(f"{folder} is not a run: {error}") from None


def save_model(folder: Path, model: dict[str, Tensor], prompt: Prompt | None, step: int) -> None:
    """Write a model's whole state dict and a prompt as they are when `step` steps are done. Raises RunError."""
    state = {f"model.{k}": v for k, v in model.items()}
    if prompt is not None:
        state |= {f"prompt.{k}": v for k, v in prompt.state_dict().items()}
    encoded = save({k: v.detach().cpu().contiguous() for k, v in state.items()}, metadata={"step": str(step)})
    with writing(folder / MODEL):
        write_whole(folder / MODEL, encoded)


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
