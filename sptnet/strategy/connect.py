"""Join the processes of a run as `accelerate launch` asked, and make sure that this is what one got."""

import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from sptnet.strategy.freed import keep_freed_memory
from sptnet.strategy.launcher import LaunchSettings, StrategyError, launch_settings, launcher_store

DEVICES = Path("/dev")
# the only buffers are tables of positions, the same on all ranks: DDP would send them with every step. Gradients are
# views of DDP's buckets: else it holds them twice. No static graph: it would only spare a search for unused parameters,
# which is off, and its first step waits with every reduction until the backward pass is over
DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}


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
            "installed (in the checkout: pip install -c constraints.txt -e '.[deepspeed]'), and ACCELERATE_USE_CPU not "
            "set?"
        )
