"""What a run is and what it runs on: its header, and a line of `starts.jsonl` in its folder for every start."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sptnet.config import Config
from sptnet.data.format.files import read_regular
from sptnet.data.format.manifest import KINDS, Manifest
from sptnet.data.order import BatchOrder
from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt
from sptnet.method.schedule import Schedule
from sptnet.run.folder import writing
from sptnet.run.records import LARGEST
from sptnet.steps import Learner
from sptnet.strategy.base import Strategy
from sptnet.strategy.collectives import rank, world_size

STARTS = "starts.jsonl"
MOST_COVERED = 0.6  # of an image by the frame
PACKAGES = ("sptnet", "torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy", "safetensors")
ROOT = Path(__file__).parents[2]


def record_start(folder: Path, step: int, strategy: Strategy) -> None:
    """Append what this start runs on; all ranks call it, rank 0 writes. Raises RunError."""
    hosts = [os.uname().nodename]
    if dist.is_initialized():
        told: list[Any] = [None] * world_size()
        dist.all_gather_object(told, hosts[0])
        hosts = told
    if rank() != 0:
        return
    slurm = {k.lower(): v for k, v in os.environ.items() if k in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")}
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "git": git_revision(),
        "strategy": strategy.launch._asdict(),
        "nodes": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
        "device": _name_of(strategy.device),
        **slurm,
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "command": sys.argv,
    }
    with writing(folder / STARTS), open(folder / STARTS, "ab+") as starts:
        starts.seek(max(0, starts.tell() - 1))
        cut = starts.read() not in (b"", b"\n")  # by a full disk, or a kill
        starts.write(b"\n" * cut + json.dumps(facts).encode() + b"\n")


def _name_of(device: torch.device) -> str:
    """Of a GPU its own, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's starts.jsonl, the first start first; what is damaged, or not there, is left out."""
    try:
        lines = read_regular(folder / STARTS, LARGEST).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def git_revision() -> str | None:
    """The commit of the code that runs, with `+changes` where the checkout has any; None outside a checkout."""
    top, commit = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != ROOT.resolve():
        return None  # not a checkout, or installed somewhere inside another project's
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Size(NamedTuple):
    """Numbers of parameters, of the whole model whatever holds it."""

    trained: int
    frozen: int
    prompt: int


def size_of(model: PromptedViT, prompt: Prompt | None) -> Size:
    """Count before a strategy takes the model apart."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Size(trained, total - trained, 0 if prompt is None else sum(p.numel() for p in prompt.parameters()))


def describe(
    config: Config, learner: Learner, manifest: Manifest, order: BatchOrder, size: Size, checkpoint: Path | None
) -> dict[str, object]:
    """The facts of the header, by name."""
    strategy, schedule = learner.strategy, learner.schedule
    processes, batch = strategy.launch.world_size, config.data.batch_size
    module = strategy.module
    num_new = module.head.num_classes - manifest.num_old
    counts = ", ".join(f"{manifest.samples(kind)} {kind}" for kind in KINDS)
    frozen = {"frozen blocks": strategy.frozen.told} if strategy.frozen and strategy.frozen.told else {}
    return {
        "method": config.method + (f", from {config.init}" if config.init else ""),
        "start": f"continues from {checkpoint}" if checkpoint else "from the first step",
        "strategy": f"{strategy.launch.strategy} ({strategy.wrapper}), {processes} x {strategy.device.type}",
        **frozen,
        "mixed precision": strategy.launch.precision,
        "data": f"{manifest.name}: {counts}; {manifest.num_old} old classes, {num_new} new",
        "batch": f"{batch} = {processes} x {batch // processes}, {order.steps_per_epoch} steps per epoch",
        "model": f"{config.model.backbone} at {config.model.image_size} px",
        "normalised by": "mean {}, deviation {}".format(*(" ".join(f"{v:g}" for v in t) for t in module.statistics)),
        "parameters": f"{size.trained:,} trained, {size.frozen:,} frozen, {size.prompt:,} prompt",
        "gradients reduced": f"{4 * size.trained:,} bytes per model step"
        + (f", {4 * size.prompt:,} per prompt step" if learner.prompt else ""),
        "schedule": f"{schedule.epochs} epochs = {schedule.total_steps} steps, {schedule.phase_schedule}"
        + (f", k = {schedule.k}" if learner.prompt else ""),
    }


def warnings(config: Config, schedule: Schedule, train_from_block: int) -> Iterator[str]:
    """Sentences on what is allowed, and rarely meant; `train_from_block` as the model counts it, from 0."""
    if told := schedule.warning():
        yield told
    cores = len(os.sched_getaffinity(0))
    if config.data.workers > cores:
        yield f"data.workers is {config.data.workers} for every rank, more than the {cores} cores that it may use"
    steps = schedule.total_steps
    if schedule.teacher_warmup_epochs > schedule.epochs:
        yield (
            f"loss.teacher_warmup_epochs is {schedule.teacher_warmup_epochs}, and the run has {schedule.epochs} "
            "epochs: the teacher never reaches its temperature"
        )
    if config.method == "sptnet" and schedule.prompt_warmup_steps >= steps:
        yield (
            f"prompts.warmup_steps is {schedule.prompt_warmup_steps}, and the run has {steps} steps: the prompts never "
            "reach their learning rate"
        )
    size = config.model.image_size
    covered = 1 - (max(0, size - 2 * config.prompts.frame) / size) ** 2
    if config.method == "sptnet" and config.prompts.kind in ("all", "global") and covered > MOST_COVERED:
        yield (
            f"prompts.frame is {config.prompts.frame} pixels, which cover {100 * covered:.0f}% of an image of {size}: "
            "the paper's 30 of 224 cover 46%"
        )
    if config.init is None and config.model.weights == "none" and train_from_block != 0:
        yield (
            f"model.weights is none, so the backbone is random, and what lies before block {train_from_block} stays "
            "so: model.train_from_block=0 trains all of it"
        )
