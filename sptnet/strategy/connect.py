"""Join the processes of a run as `accelerate launch` asked, and make sure that this is what one got."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sptnet.errors import SptnetError
from sptnet.strategy.freed import keep_freed_memory

Precision = Literal["no", "bf16", "fp16"]
DEVICES = Path("/dev")
# the only buffers are tables of positions, the same on all ranks: DDP would send them with every step. Gradients are
# views of DDP's buckets: else it holds them twice. No static graph: it would only spare a search for unused parameters,
# which is off, and its first step waits with every reduction until the backward pass is over
DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
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
    for variable, (understood, key, way_out) in keys.items():
        said = os.environ.get(variable, "").strip()
        if said and said.lower() not in understood:
            raise StrategyError(f"{key} of the accelerate configuration is {said}, which nothing here reads: {way_out}")


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


def gpus_said() -> str | None:
    """What says that this process should find a GPU, for a message; None where nothing does.

    A driver that does not load leaves torch without one, and a job would train on the CPU until its time limit.
    """
    environment = os.environ
    if environment.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1", "NoDevFiles"):
        return None  # hidden by name
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"):
        if environment.get(name, "").strip() not in ("", "0" if name == "SLURM_GPUS_ON_NODE" else ""):
            return f"{name}={environment[name]}"
    devices = sorted(DEVICES.glob("nvidia[0-9]*"))
    return str(devices[0]) if devices else None


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


def _agree_on_device(on_cpu: bool, timeout_s: float) -> bool:
    """Whether all ranks compute on GPUs; all ranks call it, before NCCL or gloo is chosen.

    By counters in the launcher's store: a rank that takes part with the other backend would hang them all.

    Raises:
        StrategyError: on every rank, where one has no GPU and should, where some have one and others not, or where two
            have the same: NCCL would say so in words for programmers.
    """
    found = not on_cpu and torch.cuda.is_available()
    said = None if on_cpu or found else gpus_said()
    where = f"{os.uname().nodename} ({said})" if said else os.uname().nodename
    with_gpu, without, missing, shared = int(found), "" if found else where, where if said else "", ""
    size = 1
    if (store := launcher_store("devices", timeout_s)) is not None:
        size = int(os.environ["WORLD_SIZE"])
        if not found:
            store.set("missing" if said else "without", where)
            store.add("missing-count" if said else "without-count", 1)
        elif store.compare_set(f"gpu {_gpu_here()}", "", os.environ["RANK"]).decode() != os.environ["RANK"]:
            store.set("shared", _too_few_here())
            store.add("shared-count", 1)
        store.add("with-gpu", with_gpu)
        if store.add("arrived", 1) == size:
            store.set("all", "here")
        store.wait(["all"], timedelta(seconds=timeout_s))
        with_gpu = store.add("with-gpu", 0)
        missing = store.get("missing").decode() if store.add("missing-count", 0) else ""
        without = store.get("without").decode() if store.add("without-count", 0) else ""
        shared = store.get("shared").decode() if store.add("shared-count", 0) else ""
    if missing:
        raise StrategyError(
            f"there should be a GPU on {missing}, and torch finds none: look at nvidia-smi there, or set device=cpu "
            "(in the environment ACCELERATE_USE_CPU=true) to compute on the CPU all the same"
        )
    if 0 < with_gpu < size:
        raise StrategyError(
            f"{with_gpu} of {size} processes have a GPU, and {without} has none: all must have one, or device=cpu"
        )
    if shared:
        raise StrategyError(f"two processes of {shared}")
    return found


def _too_few_here() -> str:
    """This machine, on which two processes have one GPU, and what to do."""
    host, there = os.uname().nodename, torch.cuda.device_count()
    given, chosen = os.environ.get("SLURM_GPUS_ON_NODE", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    if given.isdecimal() and there < min(int(given), len(chosen.split(",")) if chosen else int(given)):
        return (
            f"{host} have the same GPU: torch finds {there} there, and the job was given {given} "
            f"(SLURM_GPUS_ON_NODE): look at nvidia-smi there, or leave the node out (sbatch --exclude={host})"
        )
    return f"{host} have the same GPU: start as many as it has (--num_processes), and look at CUDA_VISIBLE_DEVICES"


def _gpu_here() -> str:
    """The card that accelerate gives to this process, whatever number it has here."""
    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    return f"{os.uname().nodename} {torch.cuda.get_device_properties(number).uuid}"


def connect(timeout_s: float, device: Literal["auto", "cpu"] = "auto") -> tuple[Accelerator, LaunchSettings]:
    """Start accelerate, over NCCL on GPUs, over gloo without them.

    Args:
        timeout_s: after which a collective counts as hung; on GPUs the flight recorder then writes what each rank did.
        device: cpu computes on the CPU although there are GPUs, or should be.

    Raises:
        StrategyError: what was asked for and what accelerate gave differ. Accelerate falls back silently: on a machine
            without GPUs a CPU flag makes it forget DeepSpeed, and no CPU flag makes N processes N unconnected runs.
    """
    launch = launch_settings()
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    on_gpu = _agree_on_device(on_cpu, timeout_s)
    zero = launch.strategy.startswith("zero")
    if not on_gpu:
        keep_freed_memory()
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, by accelerate where nobody asked for it
    if zero and not on_gpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # accelerate takes a GPU for DeepSpeed where it finds one
        _leave_uncompiled()
    # FSDPStrategy makes its own mesh; accelerate would make another, and on GPUs only
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    group = InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    accelerator = Accelerator(
        cpu=not on_gpu and not zero,
        # precision is the strategies' own affair: accelerate would turn the parameters to bf16 under DeepSpeed
        mixed_precision="no",
        kwargs_handlers=[group, DistributedDataParallelKwargs(**DDP)] if "LOCAL_RANK" in os.environ or zero else None,
    )
    _check(launch, accelerator)
    return accelerator, launch


def limit_waiting(groups: Iterable[ProcessGroup]) -> None:
    """Give groups the time limit of the whole one: torch gives those that are made later its own."""
    whole = distributed_c10d._get_default_group()
    limit = whole._get_backend(whole._device_types[0]).options._timeout
    # its name from torch 2.14 on, and the one before
    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else distributed_c10d._set_pg_timeout
    for group in groups:
        set_timeout(limit, group)


def _leave_uncompiled() -> None:
    """Keep DeepSpeed from compiling a kernel that only its inference calls: two minutes, and a C++ compiler."""
    with suppress(ModuleNotFoundError):  # an extra; that it is missing is told where accelerate went without it
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it keeps what is changed there


def record_collectives(folder: Path) -> None:
    """Let NCCL's flight recorder keep what each rank was doing, and write it below `folder` when a collective hangs.

    The names that torch 2.14 reads; it calls TORCH_NCCL_TRACE_BUFFER_SIZE deprecated. What the user has set stays.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "flight-recorder-rank-"))


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
