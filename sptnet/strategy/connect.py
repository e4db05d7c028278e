"""Join the processes of a run as `accelerate launch` asked, and make sure that this is what one got."""

import os
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from sptnet.errors import SptnetError

Precision = Literal["no", "bf16", "fp16"]
StrategyName = Literal["single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]


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
            a hybrid of other than all processes.
    """
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE", "1"))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise StrategyError(f"mixed_precision is {precision}: use no, bf16 or fp16")
    name: str = "ddp" if world_size > 1 else "single"
    shard_size = world_size
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
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
        hybrid = environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1") != "1"
        name = "hsdp" if hybrid else "fsdp2"
        shard_size = int(environment.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1")) if hybrid else world_size
        copies = int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
        if hybrid and copies * shard_size != world_size:
            raise StrategyError(
                f"{copies} copies of {shard_size} shards are not {world_size} processes: set dp_replicate_size and "
                "dp_shard_size of the accelerate configuration (launch/hsdp.yaml)"
            )
    return LaunchSettings(name, world_size, precision, shard_size)  # type: ignore[arg-type]


def connect(timeout_s: float) -> tuple[Accelerator, LaunchSettings]:
    """Start accelerate, over NCCL on GPUs, over gloo without them.

    Args:
        timeout_s: after which a collective counts as hung; on GPUs the flight recorder then writes what each rank did.

    Raises:
        StrategyError: what was asked for and what accelerate gave differ. Accelerate falls back silently: on a machine
            without GPUs a CPU flag makes it forget DeepSpeed, and no CPU flag makes N processes N unconnected runs.
    """
    launch, on_gpu = launch_settings(), torch.cuda.is_available()
    zero = launch.strategy.startswith("zero")
    if zero and not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    if not on_gpu:
        # accelerate knows hybrid sharding on GPUs only; FSDPStrategy makes its own mesh
        os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    else:
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    group = InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    accelerator = Accelerator(
        cpu=not on_gpu and not zero,
        # precision is the strategies' own affair: accelerate would turn the parameters to bf16 under DeepSpeed
        mixed_precision="no",
        kwargs_handlers=[group] if launch.world_size > 1 or zero else None,
    )
    _check(launch, accelerator)
    return accelerator, launch


def _check(launch: LaunchSettings, accelerator: Accelerator) -> None:
    got = accelerator.num_processes
    if launch.world_size != got:
        raise StrategyError(
            f"{launch.world_size} processes were asked for, accelerate connected {got}: start with accelerate launch"
        )
    if launch.strategy.startswith("zero") != (accelerator.distributed_type == DistributedType.DEEPSPEED):
        raise StrategyError(
            f"{launch.strategy} was asked for, accelerate gives {accelerator.distributed_type.value}: is deepspeed "
            "installed (pip install -c constraints.txt -e '.[deepspeed]'), and ACCELERATE_USE_CPU not set?"
        )
