"""The keys of a configuration: types, ranges, defaults and help; `sptnet config` prints them.

Typed and frozen: unknown keys, wrong types and impossible values are errors before anything starts. The sections are
in config_sections.py; how files, what they inherit and overrides become one configuration is in config_file.py.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sptnet.config_sections import (
    MANY,
    CheckpointConfig,
    DataConfig,
    DiskPath,
    EvaluateConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PathText,
    PromptConfig,
    ResumeConfig,
    ScheduleConfig,
    Section,
)
from sptnet.errors import SptnetError

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
LARGEST_SEED = 2**63 - 1  # keys of random numbers are 64 bits wide
MONTH = 30 * 86_400.0  # seconds


class ConfigError(SptnetError, ValueError):
    """A configuration that cannot be run; one line per mistake, naming file and key."""

    on_all_ranks = True
    exit_code = 2


class Config(Section):
    """One run."""

    method: Literal["simgcd", "sptnet"]
    """SimGCD, or SPTNet, which begins from a SimGCD run."""
    run: DiskPath
    """Folder of the results."""
    init: PathText | None = None
    """A SimGCD run, whose model it takes and goes on with, an authors' checkpoint, or null for a bare backbone."""
    trunk_cache: DiskPath = "auto"
    """Where the frozen trunk's tokens of data.views are kept: auto (where it pays), off, or a folder; changes speed."""
    trunk_cache_gb: float = Field(100.0, gt=0, le=1e9)
    """Size of that folder in 10^9 bytes; the least recently used tokens of other runs leave first."""
    init_num_heads: int | None = Field(None, gt=0, le=1024)
    """Of an authors' checkpoint whose heads are not 64 channels wide."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Of weights, prompts, data order and augmentations."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: GPUs, and an error where there should be some and none can be used; cpu: the CPU all the same."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """Of float32 products on GPUs: highest, high (TF32) or medium (often TF32 too); the CPU has the highest."""
    deterministic: bool = False
    """Kernels of GPUs whose sums have a fixed order: the same bits again on the same card, slower."""
    compile: bool = False
    """Blocks compiled by torch.compile in training steps: the first ones take minutes, rounding differs."""
    log_every: int = Field(10, gt=0, le=MANY)
    """Steps between two writes of metrics.jsonl."""
    trackers: tuple[TrackerName, ...] | None = None
    """Where metrics go beside metrics.jsonl; null: tensorboard where it is installed."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    collective_timeout_s: float = Field(600.0, ge=1, le=MONTH)
    """Seconds after which a collective counts as hung."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: stop the run, or skip the step."""
    skip_limit: int = Field(10, ge=0, le=MANY)
    """Steps that a run may leave out before it stops."""
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()

    @field_validator("resume", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("trunk_cache", mode="before")
    @classmethod
    def _off_is_false(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads it

    @property
    def lr_factor(self) -> float:
        """What the learning rates of model and prompts are multiplied by."""
        scaled = self.schedule.lr_scaling == "linear"
        return self.data.batch_size / self.schedule.lr_reference_batch if scaled else 1.0

    def told(self) -> dict[str, Any]:
        """As plain values that others may see: of a filesystem's own arguments, which may be keys, the names."""
        told = self.model_dump(mode="json")
        told["data"]["remote"]["options"] = dict.fromkeys(told["data"]["remote"]["options"], "(not shown)")
        return told

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.method == "simgcd" and self.prompts != PromptConfig():
            raise ValueError("prompts is for method sptnet, and the method is simgcd: leave it out")
        if self.data.views is None and self.trunk_cache not in ("auto", "off"):
            raise ValueError(
                f"trunk_cache is {self.trunk_cache}, and data.views is null: fresh views are never seen again, so "
                "there is nothing to keep; set data.views=4"
            )
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
