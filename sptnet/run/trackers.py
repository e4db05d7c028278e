"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow or trackio, by accelerate's trackers."""

import logging
import secrets
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from sptnet.config import Config, ConfigError, flat

PROJECT = "sptnet"
log = logging.getLogger(__name__)


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
        self._trackers: list[GeneralTracker] = []
        for name in names:
            try:
                tracker = _tracker(name, Path(config.run), start)
                tracker.start()
                tracker.store_init_configuration({key: _plain(v) for key, v in flat(config.told())})
            except Exception as error:  # trackers have no error class in common
                if config.trackers is None:  # nobody asked for it
                    log.warning(
                        "%s is installed and does not start: %s; trackers=[] leaves it out", name, _one_line(error)
                    )
                    continue
                raise ConfigError(f"trackers: {name} does not start: {_one_line(error)}") from error
            self._trackers.append(tracker)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers of one step; what is none is left out: not every tracker takes words."""
        told = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._each(lambda tracker: tracker.log(told, step=step))

    def close(self) -> None:
        """Write what is left."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, act: Callable[[GeneralTracker], object]) -> None:
        """A tracker that fails is left out from then on: metrics.jsonl has everything, and training is worth more."""
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                log.warning("%s failed, no more is sent to it: %s", tracker.name, _one_line(error))
                self._trackers.remove(tracker)


def _tracker(name: str, run: Path, start: int) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker(name, run, purge_step=start)
    if name == "wandb":
        identity = run / "wandb-id"  # in the folder: the next start of the same run finds it again
        if not identity.exists():
            identity.write_text(secrets.token_hex(8))
        return WandBTracker(PROJECT, name=str(run), id=identity.read_text(), resume="allow", dir=str(run))
    if name == "trackio":
        return TrackioTracker(PROJECT, name=str(run).replace("/", "-"), resume="allow")
    return MLflowTracker(PROJECT, run_name=str(run))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | str) else str(value)
