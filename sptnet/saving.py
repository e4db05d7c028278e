"""What a run saves, and when its training waits for it."""

import secrets
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sptnet.checkpoint import Facts, Writer
from sptnet.collectives import rank, world_size
from sptnet.config import Config
from sptnet.resume import prompt_state
from sptnet.steps import Learner


class Saver:
    """Checkpoints of one run: gathers the state, which training waits for, and hands it to a background writer.

    Args:
        numbers, backbone: what every checkpoint of this run says of itself; see sptnet/resume.py.
    """

    def __init__(self, config: Config, learner: Learner, numbers: dict[str, Any], backbone: dict[str, str]):
        self.learner, self.numbers, self.backbone, self.full = learner, numbers, backbone, config.checkpoint.full
        self._stall = 0.0
        token = [secrets.token_hex(4)]
        if dist.is_initialized():
            dist.broadcast_object_list(token)
        self._writer = Writer(Path(config.run), rank(), world_size(), config.checkpoint.keep, token[0])

    def save(self, step: int, counters: dict[str, float]) -> None:
        """Begin a checkpoint of the state before `step`; all ranks call it.

        Raises:
            CheckpointError: the one before could not be written.
        """
        start = time.perf_counter()
        self._writer.wait()
        strategy, mine = self.learner.strategy, lambda i: i % world_size() == rank()
        tensors = strategy.trained_state(mine)
        if self.full:
            frozen = {n: p for n, p in strategy.module.named_parameters() if not p.requires_grad}
            for i, (name, parameter) in enumerate(frozen.items()):
                whole = strategy.full_parameter(parameter)
                if mine(i):
                    tensors[f"model.{name}"] = whole.to("cpu", copy=True)
        if rank() == 0:
            tensors |= prompt_state(self.learner)
        asked = strategy.asked
        written_by = {"strategy": asked.strategy, "world_size": asked.world_size, "precision": asked.precision}
        if strategy.scaler is not None:
            scaling = strategy.scaler.state_dict()
            counters = counters | {"loss_scale": scaling["scale"], "steps_at_scale": scaling["_growth_tracker"]}
        self._writer.begin(Facts(step, self.numbers, self.backbone, written_by, counters), tensors)
        self._stall += time.perf_counter() - start

    def told_stall(self) -> float:
        """Seconds that training waited for checkpoints since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def poll(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written."""
        self._writer.poll()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises CheckpointError if it could not be written."""
        self._writer.wait()
