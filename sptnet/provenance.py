"""What a run was started with: a line of `starts.jsonl` in its folder for every start."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sptnet.collectives import rank, world_size
from sptnet.run_folder import writing
from sptnet.strategy.connect import Asked

STARTS = "starts.jsonl"
PACKAGES = ("sptnet", "torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy", "safetensors")
ROOT = Path(__file__).parents[1]


def record_start(folder: Path, step: int, asked: Asked) -> None:
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
        "strategy": asked._asdict(),
        "nodes": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
        **slurm,
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "command": sys.argv,
    }
    with writing(folder / STARTS), open(folder / STARTS, "a") as starts:
        starts.write(json.dumps(facts) + "\n")


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
