"""The sections of a configuration: types, ranges, defaults and help of their keys; config.py puts them together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from sptnet.data.format.files import check_url, is_url
from sptnet.names import AugmentName, LrShape, PromptedPair, PromptKind

FrozenBlocks = Literal["auto", "whole", "sharded"]
MANY = 2**31 - 1  # of steps, epochs, images: more is a slip of the keyboard


def _path(text: str) -> str:
    _text(text)
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise PydanticCustomError("path", "Input should be a path whose home folder exists") from None


def _text(text: str) -> str:
    if not text or "\0" in text:
        raise PydanticCustomError("path", "Input should be a path, which is not empty and has no NUL in it")
    return text


def _on_disk(text: str) -> str:
    if is_url(text):
        raise ValueError("is a URL: name a folder on a disk")
    return text


def _place(text: str) -> str:
    if is_url(text):
        check_url(text)
    return text


PathText = Annotated[str, AfterValidator(_path)]
# `~` stays: whoever evaluates a run has a home of his own, or none, and need not fetch anything
CachePath = Annotated[str, AfterValidator(_text), AfterValidator(_on_disk)]
DiskPath = Annotated[PathText, AfterValidator(_on_disk)]  # what is written to


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation not in (bool, bool | None):
            raise PydanticCustomError(
                "bool", "Input should not be true or false (YAML reads yes, no, on and off as these too)"
            )
        return value


class RemoteConfig(Section):
    """Shards behind a URL: how they are fetched, and where a node keeps them."""

    cache: CachePath = "~/.cache/sptnet"
    """Folder on a disk of the node, shared by its processes; `~/.cache` is $XDG_CACHE_HOME where that is set."""
    cache_gb: float = Field(200.0, gt=0, le=1e9)
    """Its size in 10^9 bytes; the least recently used shards leave first."""
    attempts: int = Field(5, gt=0, le=1000)
    """How often a file is tried."""
    timeout_s: float = Field(60.0, gt=0, le=86_400)
    """Seconds that a fetch may go without a byte (http and s3)."""
    options: dict[str, Any] = {}
    """Further arguments of the fsspec filesystem, e.g. {anon: true}; keys and secrets belong elsewhere."""


class DataConfig(Section):
    """Which shards, and how they become batches."""

    root: Annotated[PathText, AfterValidator(_place)]
    """A folder made by sptnet-shards, or an fsspec URL of one (s3://, gs://, https://)."""
    remote: RemoteConfig = RemoteConfig()
    batch_size: int = Field(128, gt=0, le=2**24)
    """Images of the global batch, half of them labelled; a multiple of 2 x data.streams and of the processes."""
    streams: int = Field(4, gt=0, le=2**20)
    """Parts that a pass over the data is cut into, at most as many as shards; decides the order, as window does."""
    window: int = Field(4, gt=0, le=2**20)
    """Shards of a stream that are shuffled together; part of the data order."""
    augment: AugmentName = "crop_flip"
    """Of the training views: crop_flip (photographs), affine (digits: never mirrored)."""
    views: int | None = Field(None, ge=2, le=1024)
    """How many augmented views an image has, the same in every run; null: fresh ones in every step."""
    tokens: Literal["float16", "float32"] = "float16"
    """With views, the type to which the tokens of a frozen trunk are rounded (simgcd), kept in a cache or not."""
    workers: int = Field(4, ge=0, le=1024)
    """Loader processes per rank; changes speed only."""
    tolerate_bad_samples: int = Field(0, ge=0, le=MANY)
    """Damaged samples that a run replaces by the next of their stream."""


class BackboneOptions(Section):
    """What of a ViT may differ from what its name says.

    The other options of timm decide what the head reads, or draw random numbers that no key decides.
    """

    patch_size: int = Field(16, gt=0, le=512)
    embed_dim: int = Field(768, gt=0, le=16_384)
    depth: int = Field(12, gt=0, le=256)
    num_heads: int = Field(12, gt=0, le=1024)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = Field(None, gt=0, le=1e3)
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: int = Field(0, ge=0, le=256)
    pre_norm: bool = False


def _backbone_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are given, checked; the name of the backbone decides the others."""
    try:
        return BackboneOptions.model_validate(options).model_dump(include=set(options))
    except ValidationError as error:
        first = error.errors()[0]
        key, wrong = first["loc"][0], str(first["input"])[:40]
        if first["type"] == "extra_forbidden":
            told = f"Input should hold {', '.join(BackboneOptions.model_fields)} only, not {key}"
        else:
            told = f"Input should have another {key} than {wrong}: {first['msg'].removeprefix('Input should be ')}"
        raise PydanticCustomError("backbone_options", "{told}", {"told": told}) from None


class ModelConfig(Section):
    """The backbone and what of it is trained."""

    backbone: str = Field("vit_base_patch16_224.dino", pattern=r"^[\w.\-/:]+$", max_length=200)
    """Name of a timm ViT; `sptnet backbones` lists those that can be used."""
    backbone_options: Annotated[dict[str, Any], AfterValidator(_backbone_options)] = {}
    """Sizes of a ViT that is not as its name says, e.g. {patch_size: 8, embed_dim: 192, depth: 6, num_heads: 3}."""
    weights: PathText = "timm"
    """The pretrained weights: timm (its hub), none, or a .safetensors or .pth file."""
    image_size: int = Field(224, gt=0, le=4096)
    """Pixels; a multiple of the patch size."""
    train_from_block: int = Field(-1, ge=-1000, le=1000)
    """First trained block, negative from the end; 0 trains the whole backbone."""
    num_new: int | None = Field(None, gt=0, le=10**6)
    """How many new classes the head has; null: as many as the dataset says."""
    head_hidden: int = Field(2048, gt=0, le=2**17)
    """Width of the projection head."""
    head_bottleneck: int = Field(256, gt=0, le=2**17)
    """Width of the projections that the contrastive losses compare."""


class PromptConfig(Section):
    """The spatial prompts and their optimizer (SGD)."""

    kind: PromptKind = "all"
    """Where they are: spatial (a border in every patch), shared (one for all patches), global (a frame), all (both)."""
    border: int = Field(1, gt=0, le=4096)
    """Width in pixels, inside every patch."""
    frame: int = Field(30, gt=0, le=4096)
    """Width in pixels, around the image."""
    init: Literal["normal", "zero"] = "normal"
    """Where they begin: normal, random pixels as published; zero, where the model stands without them."""
    init_scale: float = Field(1.0, gt=0, le=100)
    """Deviation of the random pixels, in units of the normalised image."""
    pair: PromptedPair = "copy"
    """What the model phase pairs: copy, a view and its prompted copy, as published; views, two, one prompted."""
    lr: float = Field(1.0, ge=0)
    """Learning rate after the warm-up; a cosine leads it to 0."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD."""
    warmup_steps: int = Field(1000, ge=0, le=MANY)
    """Steps in which the learning rate rises from 0."""


class OptimizerConfig(Section):
    """The optimizer of blocks and head."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW."""
    lr: float = Field(0.1, ge=0)
    """Learning rate at its highest."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd."""
    weight_decay: float = Field(5e-5, ge=0, le=1e3)
    """Not applied to biases and one-dimensional parameters."""
    shape: LrShape = "cosine_epoch"
    """Of the learning rate: cosine_epoch (a value per epoch), one_cycle (warm-up, then a cosine per step)."""
    final_factor: float = Field(1e-3, ge=0, le=1)
    """The learning rate at the end, as a share of lr."""
    warmup_fraction: float = Field(0.3, ge=0, lt=1)
    """Share of the run in which one_cycle rises."""


class LossConfig(Section):
    """The GCD objective; see sptnet/method/losses.py."""

    sup_weight: float = Field(0.35, ge=0, le=1)
    """Of the supervised terms; the unsupervised ones have the rest."""
    memax_weight: float = Field(1.0, ge=0, le=1e6)
    """Of the mean-entropy maximisation (xi), which keeps classes in use."""
    student_temperature: float = Field(0.1, ge=1e-4, le=1e4)
    """Of the logits that are trained."""
    info_nce_temperature: float = Field(1.0, ge=1e-4, le=1e4)
    """Of the contrastive loss between two views."""
    sup_con_temperature: float = Field(0.07, ge=1e-4, le=1e4)
    """Of the supervised contrastive loss."""
    teacher_temperature: float = Field(0.04, ge=1e-4, le=1e4)
    """Of the logits that are the target, after their warm-up."""
    teacher_warmup_temperature: float = Field(0.07, ge=1e-4, le=1e4)
    """Of the logits that are the target, at the first epoch."""
    teacher_warmup_epochs: int = Field(10, ge=0, le=MANY)
    """Epochs from the one to the other."""
    scope: Literal["global", "local"] = "global"
    """Images that it compares: global, of the whole batch; local, of one rank, as SimGCD: ranks decide its numbers."""


class ScheduleConfig(Section):
    """How long, and how the phases alternate."""

    epochs: int = Field(200, gt=0, le=MANY)
    """An epoch has as many steps as the training images, labelled and unlabelled, fill batches."""
    k: int = Field(20, gt=0, le=MANY)
    """Steps per phase (sptnet)."""
    phase_schedule: Literal["alternating", "reference"] = "alternating"
    """alternating: k and k steps over the whole run; reference: begun anew in every epoch, as in the authors' code."""
    lr_scaling: Literal["none", "linear"] = "none"
    """none: as written; linear: both learning rates grow with data.batch_size ..."""
    lr_reference_batch: int = Field(128, gt=0, le=2**24)
    """... and are as written at this one."""


class EvaluateConfig(Section):
    """When and how accuracy is measured."""

    every: int = Field(10, gt=0, le=MANY)
    """Epochs; the end of the run is always evaluated."""
    batch_size: int = Field(256, gt=0, le=2**20)
    """Images of a rank's forward pass."""


class CheckpointConfig(Section):
    """When the state of a run is saved; see sptnet/run/checkpoint.py."""

    every: int = Field(500, gt=0, le=MANY)
    """Steps; also when a run is asked to stop."""
    keep: int = Field(2, gt=0, le=MANY)
    """How many of the newest stay; those with a file KEEP in them stay too."""
    full: bool = False
    """With the frozen backbone, which is otherwise named by source and digest."""


class ResumeConfig(Section):
    """Where a run continues. In a file or an override, `resume: auto` is short for `resume: {source: auto}`."""

    source: PathText = "auto"
    """auto: the newest of the run's folder, or start; none: start, remove them; or a path."""
    allow: tuple[str, ...] = ()
    """Dotted keys, or sections, that may differ from the checkpoint's."""


class Every(Section):
    """Every n-th block."""

    every: int = Field(gt=0, le=1000)
    """n."""


class MemoryConfig(Section):
    """Memory against time; changes no number beyond float rounding."""

    gradient_checkpointing: Literal["none", "full"] | Every = "none"
    """Blocks whose activations are computed again: none, full (all), or {every: n} (every n-th)."""
    micro_batches: int = Field(1, gt=0, le=2**20)
    """Pieces of a rank's slice: the loss stays that of the whole batch."""
    frozen_blocks: FrozenBlocks = "auto"
    """Under FSDP2: whole on every rank, sharded, or auto: whole where they take below 5% of a rank's memory."""
