"""From a configuration to the parts of a run: order, schedule, model, prompt, loss, and what learns with them."""

from itertools import zip_longest
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from sptnet.config import Config, ConfigError
from sptnet.config_sections import OptimizerConfig
from sptnet.data.format.manifest import MANIFEST, Manifest
from sptnet.data.order import BatchOrder
from sptnet.data.storage.store import Store, open_store
from sptnet.method.losses import GCDLoss
from sptnet.method.metrics import MAX_CLUSTERS
from sptnet.method.model import PromptedViT, create_model
from sptnet.method.prompts import Prompt, create_prompt
from sptnet.method.reference import load_reference
from sptnet.method.schedule import Schedule
from sptnet.run.folder import RunError
from sptnet.run.model_file import has_model, has_prompt, load_model, unfinished
from sptnet.steps import Learner
from sptnet.strategy.base import make_momentum, parameter_groups
from sptnet.strategy.compiled import compile_blocks
from sptnet.strategy.create import create_strategy
from sptnet.strategy.launcher import LaunchSettings, is_first_on_disk
from sptnet.strategy.recompute import checkpoint_blocks

OF_SPTNET = "was trained with prompts, without which its model is not whole: go on with method=sptnet"


def build_store(config: Config) -> Store:
    """The dataset, local or remote; all ranks call it.

    Raises:
        DatasetError: no dataset, or a damaged one. Files that are missing are told by one process of every disk.
    """
    look = is_first_on_disk(Path(config.data.root) / MANIFEST, config.collective_timeout_s)
    return open_store(config.data.root, **config.data.remote.model_dump(), look=look)


def build_data(config: Config) -> tuple[Store, BatchOrder]:
    """The dataset and its order.

    Raises:
        ConfigError: a dataset that this configuration cannot be run on.
        DatasetError: a damaged dataset.
    """
    data = config.data
    store = build_store(config)
    manifest = store.manifest
    for kind in ("labelled", "unlabelled"):
        for number, what in ((len(manifest.of_kind(kind)), "shards"), (manifest.samples(kind), "images")):
            if number < data.streams:
                raise ConfigError(
                    f"data.streams is {data.streams}, but {data.root} has {number} {kind} {what}: use at most {number}"
                )
    labelled, unlabelled = (manifest.of_kind(kind).samples for kind in ("labelled", "unlabelled"))
    order = BatchOrder(labelled, unlabelled, data.batch_size, data.streams, data.window, config.seed)
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"data.batch_size is {data.batch_size}, more than the {sum(labelled)} labelled and {sum(unlabelled)} "
            f"unlabelled images of {data.root}: use a smaller multiple of 2 x data.streams = {2 * data.streams}"
        )
    return store, order


def build_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    schedule, optimizer, loss = config.schedule, config.optimizer, config.loss
    return Schedule(
        epochs=schedule.epochs,
        steps_per_epoch=steps_per_epoch,
        phase_schedule="model_only" if config.method == "simgcd" else schedule.phase_schedule,
        k=schedule.k,
        prompt_lr=config.prompts.lr * config.lr_factor,
        prompt_warmup_steps=config.prompts.warmup_steps,
        model_lr=optimizer.lr * config.lr_factor,
        model_lr_shape=optimizer.shape,
        final_factor=optimizer.final_factor,
        warmup_fraction=optimizer.warmup_fraction,
        teacher_temperature=loss.teacher_temperature,
        teacher_warmup_temperature=loss.teacher_warmup_temperature,
        teacher_warmup_epochs=loss.teacher_warmup_epochs,
    )


def build_loss(config: Config) -> GCDLoss:
    loss = config.loss
    return GCDLoss(
        loss.sup_weight,
        loss.memax_weight,
        loss.student_temperature,
        loss.info_nce_temperature,
        loss.sup_con_temperature,
    )


def num_new_classes(config: Config, manifest: Manifest) -> int:
    """How many new classes the head has: as configured, or as the dataset says.

    Raises:
        ConfigError: nobody has said it, or it is more than an evaluation can match.
    """
    known, wanted = manifest.new_classes(), config.model.num_new
    if known is None and wanted is None:
        raise ConfigError(
            f"nobody has said how many new classes {config.data.root} has: set model.num_new=N, or ask "
            f"`sptnet estimate-k {config.data.root}`"
        )
    number = wanted if wanted is not None else known or 0
    if manifest.num_old + number > MAX_CLUSTERS:
        raise ConfigError(
            f"{manifest.num_old} old and {number} new classes are more than the {MAX_CLUSTERS} that can be matched: "
            "lower model.num_new"
        )
    return number


def build_model(config: Config, manifest: Manifest) -> tuple[PromptedViT, Prompt | None]:
    """Model and prompt as they stand before the first step: with what `model.weights` and `init` name.

    Raises:
        ConfigError, BackboneError, RunError: parts that do not fit together.
    """
    start = Path(config.init) if config.init is not None else None
    if start is not None and not has_model(start):
        return _from_reference(config, start, manifest)
    weights = config.model.weights if start is None else "none"
    model = _create(config, manifest.num_old, num_new_classes(config, manifest), weights)
    if start is not None:
        if how_far := unfinished(start):
            raise RunError(f"init: {how_far}; train it to its end first")
        facts = load_model(start, model, None, whole=False)
        if facts.classes is not None and facts.classes != tuple(manifest.classes):
            odd = next((a, b) for a, b in zip_longest(facts.classes, manifest.classes) if a != b)
            raise RunError(
                f"init {start} was trained for other classes than {config.data.root} has: {odd[0]!r} where the dataset "
                f"has {odd[1]!r}"
            )
        if config.method == "simgcd" and has_prompt(start):
            raise ConfigError(f"init {start} {OF_SPTNET}")
    return model, _new_prompt(config, model) if config.method == "sptnet" else None


def build_untrained(config: Config, num_old: int, num_new: int) -> tuple[PromptedViT, Prompt | None]:
    """Model and prompt into which a run's own weights are loaded.

    Raises:
        ConfigError, BackboneError: parts that do not fit together.
    """
    model = _create(config, num_old, num_new, "none")
    return model, _new_prompt(config, model) if config.method == "sptnet" else None


def _create(config: Config, num_old: int, num_new: int, weights: str) -> PromptedViT:
    spec = config.model
    return create_model(
        spec.backbone,
        num_old,
        num_new,
        image_size=spec.image_size,
        weights=weights,
        train_from_block=spec.train_from_block,
        head_hidden=spec.head_hidden,
        head_bottleneck=spec.head_bottleneck,
        backbone_options=spec.backbone_options,
        seed=config.seed,
    )


def _new_prompt(config: Config, model: PromptedViT) -> Prompt:
    spec = config.prompts
    generator = torch.Generator().manual_seed(config.seed)
    deviation = 0.0 if spec.init == "zero" else spec.init_scale
    try:
        return create_prompt(
            spec.kind, model.image_size, model.patch_size, spec.border, spec.frame, generator, deviation
        )
    except ValueError as error:
        raise ConfigError(f"prompts: {error}") from None


def _from_reference(config: Config, path: Path, manifest: Manifest) -> tuple[PromptedViT, Prompt | None]:
    if not path.is_file():
        raise ConfigError(f"init {path} is neither a trained run's folder nor a file")
    spec = config.prompts
    model, prompt = load_reference(path, config.init_num_heads, spec.border, config.model.train_from_block)
    classes = len(model.head.prototypes)
    expected = manifest.num_old + num_new_classes(config, manifest)
    if classes != expected or model.image_size != config.model.image_size:
        raise ConfigError(
            f"init {path} has {classes} classes at {model.image_size} pixels, "
            f"the run {expected} at {config.model.image_size}"
        )
    if config.method == "simgcd":
        if prompt is not None:
            raise ConfigError(f"init {path} {OF_SPTNET}")
        return model, None
    if prompt is None:
        return model, _new_prompt(config, model)
    wanted = _new_prompt(config, model)
    if {k: v.shape for k, v in prompt.state_dict().items()} != {k: v.shape for k, v in wanted.state_dict().items()}:
        raise ConfigError(
            f"init {path} has {prompt.kind} prompts, not prompts.kind {spec.kind} of the configured width"
        )
    return model, prompt


def images_of_rank(config: Config, ranks: int, where: str) -> int:
    """A rank's part of the batch.

    Args:
        where: the ranks in words, for messages.

    Raises:
        ConfigError: the batch cannot be dealt evenly, or a part has fewer images than it is to have pieces.
    """
    batch, pieces = config.data.batch_size, config.memory.micro_batches
    if batch % ranks:
        raise ConfigError(f"data.batch_size {batch} cannot be dealt to {where}")
    if pieces > batch // ranks:
        raise ConfigError(f"memory.micro_batches is {pieces}, more than a rank's {batch // ranks} images")
    return batch // ranks


def check_strategy(config: Config, launch: LaunchSettings) -> None:
    """Raises ConfigError: blocks that are to be compiled under a strategy that takes them apart."""
    if config.compile and launch.strategy == "zero3":
        raise ConfigError(
            "compile: ZeRO-3 gathers weights in the middle of a block, which torch.compile cannot follow: set "
            "compile=false, or use ZeRO-2 or FSDP2"
        )


def assemble(
    config: Config,
    accelerator: Accelerator,
    launch: LaunchSettings,
    model: PromptedViT,
    prompt: Prompt | None,
    schedule: Schedule,
) -> Learner:
    """Put model, prompt, their optimizers, the strategy and the loss together."""
    if config.compile:
        compile_blocks(model)
    checkpoint_blocks(model, config.memory.gradient_checkpointing)
    images_per_rank = config.data.batch_size // launch.world_size
    strategy = create_strategy(
        accelerator, launch, model, lambda m: build_optimizer(config.optimizer, m), images_per_rank,
        config.memory.frozen_blocks,
    )  # fmt: skip
    strategy.compiled = config.compile
    prompt_optimizer = None
    if prompt is not None:
        prompt.to(accelerator.device)
        prompt_optimizer = torch.optim.SGD(
            prompt.parameters(), lr=config.prompts.lr, momentum=config.prompts.momentum, fused=True
        )
        make_momentum(prompt_optimizer, prompt.parameters())
    whole, pieces = config.loss.scope == "global", config.memory.micro_batches
    loss, pair = build_loss(config), config.prompts.pair
    return Learner(strategy, loss, schedule, prompt, prompt_optimizer, whole, pieces, pair)


def build_optimizer(spec: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of blocks and head; parameters that are not trained are not in it.

    Fused: one kernel for all parameters, which leaves out a step without the host's knowledge.
    """
    groups = parameter_groups(model, spec.weight_decay)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=spec.lr, fused=True)
