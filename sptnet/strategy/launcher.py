"""What a launcher left in the environment: strategy, world and precision; its store; which processes share a disk."""

import hashlib
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sptnet.errors import SptnetError

Precision = Literal["no", "bf16", "fp16"]
StrategyName = Literal["single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
# keys of an accelerate configuration, by their variables, that would change nothing here: what they may say, and where
# what is meant is set
OF_ALL = {"ACCELERATE_DYNAMO_BACKEND": (("no",), "dynamo_backend", "leave it out")}
OF_FSDP = {
    **{
        f"PARALLELISM_CONFIG_{kind}_SIZE": (("1",), f"parallelism_config_{kind.lower()}_size", "leave it 1")
        for kind in ("TP", "CP", "SP")
    },
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "fsdp_auto_wrap_policy", "every block is wrapped"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (
        ("block,classtokenblock",), "fsdp_transformer_layer_cls_to_wrap", "every block is wrapped"
    ),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "fsdp_reshard_after_forward", "leave it true"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "fsdp_offload_params", "what is trained of a ViT is small"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        ("false",), "fsdp_activation_checkpointing", "set memory.gradient_checkpointing of the run"
    ),
    "FSDP_IGNORED_MODULES": ((), "fsdp_ignored_modules", "leave it out"),
}  # fmt: skip
OF_DEEPSPEED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("1",), "gradient_accumulation_steps", "set memory.micro_batches of the run"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (("0.0", "0", "none"), "gradient_clipping", "gradients are not clipped here"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (("none",), "deepspeed_config_file", "set what launch/zero2.yaml sets"),
}  # fmt: skip


class StrategyError(SptnetError, RuntimeError):
    """Another strategy, world size or precision than was asked for."""

    on_all_ranks = True


class LaunchSettings(NamedTuple):
    """What the accelerate configuration asks for; `shard_size`: ranks that share one copy of the weights (hsdp)."""

    strategy: StrategyName
    world_size: int
    precision: Precision
    shard_size: int


def launch_settings() -> LaunchSettings:
    """Read what `accelerate launch` put into the environment.

    Raises:
        StrategyError: something that this project does not run: FSDP1, fp8, ZeRO stage 0, offloading, or
            a hybrid of other than all processes; a key that nothing here would read; or an environment that no launcher
            made.
    """
    environment = os.environ
    world_size = _world_size()
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise StrategyError(f"mixed_precision is {precision}: use no, bf16 or fp16")
    # a launcher's process is wrapped by DDP even if it is the only one, as on a machine with one GPU (plain.py)
    name: str = "ddp" if "LOCAL_RANK" in environment else "single"
    shard_size = world_size
    _refuse_unread(OF_ALL)
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        _refuse_unread(OF_DEEPSPEED)
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if stage not in ("1", "2", "3"):
            raise StrategyError(
                f"DeepSpeed ZeRO stage {stage or 'unknown'} is not run here: use launch/zero1.yaml to 3"
            )
        if {
            environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")
        } != {"none"}:
            raise StrategyError("DeepSpeed offloading is not run here: what is trained of a ViT is small")
        name = f"zero{stage}"
    elif environment.get("ACCELERATE_USE_FSDP", "false") == "true":
        if environment.get("FSDP_VERSION", "1") != "2":
            raise StrategyError("FSDP version 1 is not run here: set fsdp_version: 2, as launch/fsdp2.yaml does")
        _refuse_unread(OF_FSDP)
        copies = _positive("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
        name = "hsdp" if copies != 1 else "fsdp2"
        shard_size = _positive("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1" if copies != 1 else str(world_size))
        if copies == 1 and shard_size != world_size:
            raise StrategyError(
                f"the accelerate configuration shards over {shard_size} of {world_size} processes: leave "
                "parallelism_config out (launch/fsdp2.yaml)"
            )
        if copies * shard_size != world_size:
            raise StrategyError(
                f"{copies} copies of {shard_size} shards are not {world_size} processes: set dp_replicate_size and "
                "dp_shard_size of the accelerate configuration (launch/hsdp.yaml)"
            )
    return LaunchSettings(name, world_size, precision, shard_size)  # type: ignore[arg-type]


def _refuse_unread(keys: Mapping[str, tuple[tuple[str, ...], str, str]]) -> None:
    for variable, (understood, key, remedy) in keys.items():
        said = os.environ.get(variable, "").strip()
        if said and said.lower() not in understood:
            raise StrategyError(f"{key} of the accelerate configuration is {said}, which nothing here reads: {remedy}")


def _world_size() -> int:
    size = _positive("WORLD_SIZE", "1")
    if size > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise StrategyError(
            f"WORLD_SIZE is {size}, but a launcher's other variables (RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are "
            "not all set: start with accelerate launch, or unset WORLD_SIZE"
        )
    if "LOCAL_RANK" in os.environ:
        _check_ranks(size)
    # accelerate's launcher for one process sets these two, and no rank, when it is asked for more
    if "RANK" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise StrategyError(
            "accelerate launch was asked for several processes by a configuration that starts one "
            "(launch/single.yaml): use launch/ddp.yaml, or --num_processes 1"
        )
    return size


def _check_ranks(size: int) -> None:
    """Raise StrategyError for variables that no launcher sets so: one of another launcher, left in a shell."""
    limits = {"RANK": size, "LOCAL_RANK": size, "MASTER_PORT": 2**16}
    for name, limit in limits.items():
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdigit() and int(text[:9]) < limit):
            raise StrategyError(
                f"the environment's {name} is {text!r:.40}, beside LOCAL_RANK and {size} processes: start with "
                "accelerate launch, or unset LOCAL_RANK, RANK and WORLD_SIZE"
            )


def _positive(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise StrategyError(f"the environment's {name} is {text!r}, which is no number of processes")
    return int(text)


def launcher_store(purpose: str, timeout_s: float) -> Store | None:
    """A connection of its own to the launcher's key-value store, which all ranks share; None without a launcher."""
    if "LOCAL_RANK" not in os.environ:
        return None
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return PrefixStore(f"sptnet/{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def is_on_one_node() -> bool:
    """Whether all processes of the launcher are on this machine."""
    size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", size) == size


def is_first_on_disk(path: Path, timeout_s: float) -> bool:
    """Whether this process is the one that looks at the disk of a file for all: rank 0, and a node's first elsewhere.

    A node has the disk of rank 0 where the file is the same one there: its inode and the times of its making are. A
    look at a million shards from each of 64 nodes would keep a shared disk busy for hours.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    if is_on_one_node() or (store := launcher_store("disks", timeout_s)) is None:
        return True
    try:
        found = os.stat(path)
        told = f"{found.st_ino} {found.st_ctime_ns} {found.st_mtime_ns} {found.st_size}"
    except (OSError, ValueError):
        told = f"{os.environ['RANK']} has none"  # who opens it says so
    key = hashlib.sha256(os.fsencode(path)).hexdigest()
    if os.environ["RANK"] == "0":
        store.set(key, told)
        return True
    store.wait([key], timedelta(seconds=timeout_s))
    return store.get(key).decode() != told
