"""How long a step takes, by what it computes, moves, launches, sends and loads.

A kernel takes as long as its operations or its bytes, whichever is more. The host launches kernels while the GPU
computes, and the loader loads meanwhile: a step takes as long as the slowest of these three. Collectives come on top:
that a part of them is hidden behind the backward pass is not counted on.
"""

from typing import Literal, NamedTuple

import torch

from sptnet.plan.hardware import BETWEEN_NODES, LATENCY, LATENCY_BETWEEN, Machine
from sptnet.plan.work import Collective, Work

Bound = Literal["matmul", "memory", "host", "loader", "network"]


class Seconds(NamedTuple):
    """Seconds of a step. `matmul` and `memory`: kernels that wait for their operations, and for their bytes."""

    matmul: float
    memory: float
    host: float
    loader: float
    network: float

    @property
    def total(self) -> float:
        return max(self.matmul + self.memory, self.host, self.loader) + self.network

    @property
    def bound(self) -> Bound:
        """What takes most of it."""
        kernels = self.matmul + self.memory  # one after the other, beside the host and the loader
        if max(self.host, self.loader, self.network) <= kernels:
            return "matmul" if self.matmul >= self.memory else "memory"
        names: tuple[Bound, ...] = ("host", "loader", "network")
        return max(names, key=lambda name: float(getattr(self, name)))


class Network(NamedTuple):
    """How many GPUs share a node, and bytes/s of one of them to other nodes."""

    gpus: int
    between: float = BETWEEN_NODES


def seconds_of(work: Work, machine: Machine, network: Network, loading: float, workers: int) -> Seconds:
    """Seconds of a rank's step.

    Args:
        loading: seconds of a core for what the loader does; 0 where it does nothing.
        workers: loader processes of the rank, each on a core; 0 counts as one.
    """
    matmul = memory = 0.0
    for kernel, count in work.kernels.items():
        computing = (
            kernel.flops / machine.matmul.get(kernel.dtype, machine.matmul[torch.float32]) if kernel.flops else 0.0
        )
        moving = kernel.bytes / machine.bandwidth
        if computing > moving:
            matmul += count * computing
        else:
            memory += count * moving
    host = machine.launch * work.kernels.total()
    sent = sum(count * _sending(call, machine, network) for call, count in work.collectives.items())
    return Seconds(matmul, memory, host, loading / max(workers, 1), sent)


def _sending(call: Collective, machine: Machine, network: Network) -> float:
    """Of a ring: every rank sends (R - 1) / R of the bytes, twice for a sum that all are to have."""
    if call.ranks == 1:
        return 0.0
    reduces = call.name == "allreduce"
    within = (call.ranks - 1) * call.apart < network.gpus
    bus = machine.reduce if reduces else machine.gather
    if not within:
        bus = network.between if bus is None else min(bus, network.between)
    passes = 2 if reduces else 1
    moved = passes * call.bytes * (call.ranks - 1) / call.ranks
    return (LATENCY if within else LATENCY_BETWEEN) + (0.0 if bus is None else moved / bus)
