"""A run's folder: what is in it, how it is written and read.

checkpoints/          to continue from; see sptnet/run/checkpoint.py
config.yaml           the configuration, complete
starts.jsonl          a line per start: git revision, nodes, strategy, package versions; see sptnet/run/provenance.py
log.txt               plain lines of what was printed
metrics.jsonl         one line per step: losses, learning rates, phase, images/s; one per evaluation
model.safetensors     `model.*` and `prompt.*`; written whole or not at all, after every evaluation; see
                      sptnet/run/model_file.py
metrics.json          the evaluation at the end, or the last by `sptnet eval`
predictions.npz       its uid, target and prediction of every sample, per protocol; see sptnet/run/predictions.py
predictions/          parts of it, where an evaluation is of more than four million images
finished              there when the run is; written last
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from sptnet.config import Config, ConfigError
from sptnet.config_file import load_config
from sptnet.data.format.files import is_url, is_utf8, write_whole
from sptnet.data.format.manifest import is_dataset
from sptnet.data.format.temporary import remove_leftovers
from sptnet.errors import Outcome, SptnetError, in_the_way, outcome_of_writing
from sptnet.run.records import forget_from

CONFIG, MODEL, METRICS, PREDICTIONS, STEPS, LOG, FINISHED = (
    "config.yaml", "model.safetensors", "metrics.json", "predictions.npz", "metrics.jsonl", "log.txt", "finished",
)  # fmt: skip
# what an evaluation may have otherwise than the run
FREE = (
    "data.root",
    "data.remote",
    "data.workers",
    "evaluate.",
    "device",
    "matmul_precision",
    "deterministic",
    "compile",
    "collective_timeout_s",
)


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
        where = in_the_way(error, path)
        told = RunError(f"{where} cannot be written: {error.strerror or error}; what was written before stays")
        raise told.with_outcome(outcome_of_writing(error)) from error


def check_unfinished(config: Config) -> None:
    """Raise RunError if the run's folder holds a finished run, or its configuration could not be read again."""
    folder = Path(config.run)
    for path in (config.run, config.init, config.data.root):
        if not is_utf8(whole := os.path.abspath(path or "")):
            raise RunError(f"the path {whole!r} is not UTF-8, in which {CONFIG} names it: rename the folder")
    if is_dataset(folder):
        raise RunError(f"{folder} holds a dataset: choose a folder of its own for the run, run=FOLDER")
    if (folder / FINISHED).exists():
        raise RunError(f"{folder} holds a finished run: remove it, or choose another folder with run=FOLDER")


def mark_finished(folder: Path) -> None:
    """Say that a run has taken its last step; an evaluation alone may be of an unfinished one. Raises RunError."""
    with writing(folder / FINISHED):
        write_whole(folder / FINISHED, b"")


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that was not trained to its end."""
    # listed, not looked up: a shared disk may remember for a minute that a name was not there
    there = os.listdir(folder) if folder.is_dir() else []
    return CONFIG in there and FINISHED not in there


def open_run(config: Config, start: int) -> None:
    """Write a run's configuration; forget what was told of steps from `start` on. Raises RunError."""
    folder = Path(config.run)
    steps = folder / STEPS
    with writing(steps):
        remove_leftovers(folder)
        if start == 0:
            steps.unlink(missing_ok=True)
        elif steps.exists():
            forget_from(steps, start)
    told = config.model_dump(mode="json")
    # so that the run can be evaluated from any folder, and is found again where all of it was moved
    told["run"] = os.path.abspath(config.run)
    if not is_url(config.data.root):
        told["data"]["root"] = os.path.abspath(config.data.root)
    if config.init is not None:
        told["init"] = os.path.abspath(config.init)
    with writing(folder / CONFIG):
        write_whole(folder / CONFIG, yaml.safe_dump(told, sort_keys=False).encode())


def read_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, with overrides of where things are and how they are computed.

    Raises:
        RunError: not a run's folder.
        ConfigError: an override of something else.
    """
    for override in overrides:
        if not override.startswith(FREE):
            raise ConfigError(f"override {override[:80]!r}: cannot differ from the run; these can: {', '.join(FREE)}")
    try:
        if (folder / CONFIG).exists() and not (folder / CONFIG).is_file():
            raise ConfigError(f"{folder / CONFIG} is no regular file")
        config = load_config(folder / CONFIG, overrides, complete=True)
        return config if any(map(_names_root, overrides)) else _beside(folder, config)
    except ConfigError as error:
        first, *others = str(error).splitlines()
        more = f", and {len(others)} more mistakes" if others else ""
        raise RunError(f"{folder} is not a run: {first}{more}") from None


def _names_root(override: str) -> bool:
    return override.partition("=")[0].strip() in ("data", "data.root")


def _beside(folder: Path, config: Config) -> Config:
    """The configuration of a run that was moved or copied together with its dataset, or with what it began from."""
    if not os.path.isabs(config.run) or os.path.abspath(folder) == config.run:
        return config

    def there(path: str) -> str:
        if is_url(path) or not os.path.isabs(path) or os.path.exists(path):
            return path
        moved = os.path.normpath(folder / os.path.relpath(path, config.run))
        return moved if os.path.exists(moved) else path

    data = config.data.model_copy(update={"root": there(config.data.root)})
    return config.model_copy(update={"data": data, "init": config.init and there(config.init)})
