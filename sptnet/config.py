"""The configuration of a run: a YAML file, what it inherits by `base:`, and `section.key=value` overrides.

Typed and frozen; unknown keys, wrong types and impossible values are errors before anything starts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sptnet.data.augment import AugmentName
from sptnet.errors import SptnetError
from sptnet.method.prompts import PromptKind
from sptnet.method.schedule import LrShape

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class ConfigError(SptnetError, ValueError):
    """A configuration that cannot be run; one line per mistake, naming file and key."""

    on_all_ranks = True
    exit_code = 2


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RemoteConfig(Section):
    """Shards behind a URL: how they are fetched, and where a node keeps them."""

    cache: str = "~/.cache/sptnet"  # on a disk of the node; shared by its processes
    cache_gb: float = Field(200.0, gt=0)  # 10^9 bytes; the least recently used shards leave first
    attempts: int = Field(5, gt=0)  # per file
    timeout_s: float = Field(60.0, gt=0)  # without a byte (http and s3)
    options: dict[str, Any] = {}  # of the fsspec filesystem, e.g. {anon: true}; keys and secrets belong elsewhere


class DataConfig(Section):
    """Which shards, and how they become batches."""

    root: str  # a folder made by shards/make_shards.py, or an fsspec URL of one (s3://, gs://, https://)
    remote: RemoteConfig = RemoteConfig()
    batch_size: int = Field(128, gt=0)  # images of the global batch, half of them labelled
    streams: int = Field(4, gt=0)  # canonical streams; part of the data order, unlike the number of processes
    window: int = Field(4, gt=0)  # shards of a stream that are shuffled together; part of the data order
    augment: AugmentName = "crop_flip"
    workers: int = Field(4, ge=0)  # loader processes per rank; changes speed only
    tolerate_bad_samples: int = Field(0, ge=0)  # damaged samples that a run replaces by the next of their stream


class ModelConfig(Section):
    """The backbone and what of it is trained."""

    backbone: str = "vit_base_patch16_224.dino"
    backbone_options: dict[str, Any] = {}  # further arguments of the timm model
    weights: str = "timm"  # timm (its hub), none, or a .safetensors or .pth file
    image_size: int = Field(224, gt=0)
    train_from_block: int = -1  # first trained block, negative from the end; 0 trains the whole backbone
    head_hidden: int = Field(2048, gt=0)
    head_bottleneck: int = Field(256, gt=0)


class PromptConfig(Section):
    """The spatial prompts and their optimizer (SGD)."""

    kind: PromptKind = "all"
    border: int = Field(1, gt=0)  # pixels inside every patch
    frame: int = Field(30, gt=0)  # pixels around the image
    lr: float = Field(1.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    warmup_steps: int = Field(1000, ge=0)


class OptimizerConfig(Section):
    """The optimizer of blocks and head."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.1, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(5e-5, ge=0)  # none on biases and one-dimensional parameters
    shape: LrShape = "cosine_epoch"
    final_factor: float = Field(1e-3, ge=0, le=1)  # the learning rate at the end, as a share of lr
    warmup_fraction: float = Field(0.3, ge=0, lt=1)  # of one_cycle


class LossConfig(Section):
    """The GCD objective; see sptnet/method/losses.py."""

    sup_weight: float = Field(0.35, ge=0, le=1)
    memax_weight: float = Field(1.0, ge=0)
    student_temperature: float = Field(0.1, gt=0)
    info_nce_temperature: float = Field(1.0, gt=0)
    sup_con_temperature: float = Field(0.07, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    teacher_warmup_temperature: float = Field(0.07, gt=0)
    teacher_warmup_epochs: int = Field(10, ge=0)
    scope: Literal["global", "local"] = "global"  # local: SimGCD's losses, which see one rank only


class ScheduleConfig(Section):
    """How long, and how the phases alternate."""

    epochs: int = Field(200, gt=0)
    k: int = Field(20, gt=0)  # steps per phase
    phase_schedule: Literal["alternating", "reference"] = "alternating"
    lr_scaling: Literal["none", "linear"] = "none"  # linear: both learning rates grow with data.batch_size ...
    lr_reference_batch: int = Field(128, gt=0)  # ... and are as written at this one


class EvaluateConfig(Section):
    """When and how accuracy is measured."""

    every: int = Field(10, gt=0)  # epochs; the end of the run is always evaluated
    batch_size: int = Field(256, gt=0)  # images per forward pass


class CheckpointConfig(Section):
    """When the state of a run is saved; see sptnet/run/checkpoint.py."""

    every: int = Field(500, gt=0)  # steps; also when a run is asked to stop
    keep: int = Field(2, gt=0)  # the newest ones; those with a file KEEP in them stay too
    full: bool = False  # with the frozen backbone, which is otherwise named by source and digest


class ResumeConfig(Section):
    """Where a run continues. In a file or an override, `resume: auto` is short for `resume: {source: auto}`."""

    source: str = "auto"  # auto: the newest of the run's folder, or start; none: start, remove them; or a path
    allow: tuple[str, ...] = ()  # dotted keys, or sections, that may differ from the checkpoint's


class Every(Section):
    """Every n-th block."""

    every: int = Field(gt=0)


class MemoryConfig(Section):
    """Memory against time; changes no number beyond float rounding."""

    gradient_checkpointing: Literal["none", "full"] | Every = "none"  # or {every: n}: every n-th block
    micro_batches: int = Field(1, gt=0)  # pieces of a rank's slice: the loss stays that of the whole batch


class Config(Section):
    """One run."""

    method: Literal["simgcd", "sptnet"]
    run: str  # folder of the results
    init: str | None = None  # sptnet: a SimGCD run, an authors' checkpoint, or null for a bare backbone
    init_num_heads: int | None = None  # of an authors' checkpoint whose heads are not 64 channels wide
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, gt=0)  # steps between two writes of metrics.jsonl
    trackers: tuple[TrackerName, ...] | None = None  # beside metrics.jsonl; null: tensorboard where it is installed
    data: DataConfig
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    collective_timeout_s: float = Field(600.0, gt=0)  # after which a collective counts as hung
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is not finite; skip leaves the step out
    skip_limit: int = Field(10, ge=0)  # steps that a run may leave out before it stops
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()

    @field_validator("resume", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def lr_factor(self) -> float:
        """What the learning rates of model and prompts are multiplied by."""
        scaled = self.schedule.lr_scaling == "linear"
        return self.data.batch_size / self.schedule.lr_reference_batch if scaled else 1.0

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.method == "simgcd" and self.init is not None:
            raise ValueError("init is for method sptnet; a simgcd run takes its weights from model.weights")
        if self.data.batch_size % (2 * self.data.streams):
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of 2 x data.streams"
                f" = {2 * self.data.streams}"
            )
        return self


def flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping with their dotted keys; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # backbone_options are one value: a file that names another model does not inherit half of them
        if isinstance(below, dict) and isinstance(value, dict) and key != "backbone_options":
            value = _merged(below, value)
        merged[key] = value
    return merged


def _long_form(raw: dict[str, Any]) -> dict[str, Any]:
    """`resume: auto` is short for `resume: {source: auto}`; in the long form files and overrides add up."""
    if isinstance(raw.get("resume"), str):
        return raw | {"resume": {"source": raw["resume"]}}
    return raw


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file")
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of sections")
    base = raw.pop("base", None)
    if base is None:
        return _long_form(raw)
    return _merged(_read_yaml(path.parent / str(base), (*seen, path.resolve())), _long_form(raw))


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must read section.key=value")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merged(raw, _long_form(value))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file; `base: other.yaml`, beside it, is what it inherits from.
        overrides: `section.key=value`, applied last, the value being YAML.

    Raises:
        ConfigError: one line per mistake.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        raw = _override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_sentence(dict(e))}" for e in error.errors())) from None


def _sentence(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"{key} is not a known key"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            message = error["msg"].removeprefix("Input should be ")
            return f"{key} is {error['input']!r}, it should be {message}"
