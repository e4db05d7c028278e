"""Join the processes of a run, and make sure they are the ones that were asked for."""

import os

import torch
from accelerate import Accelerator


class StrategyError(RuntimeError):
    """Another strategy or world size than was asked for."""


def connect() -> Accelerator:
    """Start accelerate with what `accelerate launch` put into the environment.

    On a machine without GPUs the processes talk over gloo; accelerate does so only if told to use the CPU.

    Raises:
        StrategyError: what was asked for and what accelerate gave differ. Accelerate falls back silently: without a
            CPU flag torchrun's N processes on a machine without GPUs would be N unconnected runs.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    asked, got = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if asked != got:
        raise StrategyError(
            f"{asked} processes were asked for, accelerate connected {got}: start with accelerate launch"
        )
    return accelerator
