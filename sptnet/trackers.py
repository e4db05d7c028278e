"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow or trackio, by accelerate's trackers."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from sptnet.config import Config, ConfigError

PROJECT = "sptnet"


def named_trackers(config: Config) -> tuple[str, ...]:
    """The trackers of a run: those it names, or TensorBoard where it is installed.

    Raises:
        ConfigError: one that is named is not installed.
    """
    if config.trackers is None:
        return ("tensorboard",) if find_spec("tensorboard") else ()
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"trackers names {name}, which is not installed: pip install {name}")
    return config.trackers


class Trackers:
    """The trackers of one run, written by rank 0.

    A continued run goes on in the same TensorBoard folder, W&B run and trackio run; MLflow gets a run per start.

    Args:
        names: of `named_trackers`; none on other ranks.
        start: the first step to come; TensorBoard forgets what was told from there on.
    """

    def __init__(self, config: Config, names: tuple[str, ...], start: int):
        self._trackers = [_tracker(name, Path(config.run), start) for name in names]
        for tracker in self._trackers:
            tracker.start()
            tracker.store_init_configuration(_flat(config.model_dump(mode="json")))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers of one step; what is none is left out: not every tracker takes words."""
        told = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(told, step=step)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def _tracker(name: str, run: Path, start: int) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker(name, run, purge_step=start)
    if name == "wandb":
        # an id of the folder: the next start of the same run finds it again
        same = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        return WandBTracker(PROJECT, name=str(run), id=same, resume="allow", dir=str(run))
    if name == "trackio":
        return TrackioTracker(PROJECT, name=str(run).replace("/", "-"), resume="allow")
    return MLflowTracker(PROJECT, run_name=str(run))


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[above + key] = value if isinstance(value, int | float | str) else str(value)
    return flat
