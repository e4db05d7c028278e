"""How fast a run is: images per second, time spent waiting for data, memory, and the share of the matmul peak."""

import copy
import resource
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sptnet.method.model import PromptedViT
from sptnet.method.prompts import Prompt

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
KIB = 1024  # bytes in which Linux tells a process's memory
MEASURED_FOR = 0.2  # seconds; a matrix product reaches its speed after milliseconds


class Throughput:
    """Times the steps between two writes of the metrics; never asks the device for anything.

    Args:
        batch_size, world_size: images of the global batch, and ranks that share it.
        device: whose memory is told; of a CPU, this process's.
        work: floating-point operations of this rank's step, by phase.
        peak: operations per second of the fastest matrix product.
    """

    def __init__(self, batch_size: int, world_size: int, device: torch.device, work: dict[str, float], peak: float):
        self.batch_size, self.world_size, self.device, self.work, self.peak = batch_size, world_size, device, work, peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of the matmul peak, of making tokens
        self.restart()

    def restart(self) -> None:
        """Begin an interval now: what came before, an evaluation for example, is not part of it."""
        self._begin(time.perf_counter())

    def _begin(self, since: float) -> None:
        self._since = self._until = since
        self._waited = 0.0
        self._phases: list[str] = []

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; how long each was waited for is noted."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def step(self, phase: str, launched: float) -> None:
        """Note a step, and when it had been launched: of two the host may learn at once, before a checkpoint."""
        self._phases.append(phase)
        self._until = launched

    def interval(self) -> dict[str, float]:
        """The figures of the steps since the last call; begins a new interval."""
        elapsed, steps = max(self._until - self._since, 1e-9), len(self._phases)
        speed = steps * self.batch_size / elapsed
        figures = {
            "images_per_s": _rounded(speed),
            "images_per_s_per_rank": _rounded(speed / self.world_size),
            "data_wait_s_per_step": round(self._waited / max(steps, 1), 6),
            "peak_memory_mb": round(peak_memory_mb(self.device), 1),
            "share_of_matmul_peak": round(sum(self.work[phase] for phase in self._phases) / elapsed / self.peak, 4),
        }
        self._begin(self._until)
        return figures


def _rounded(speed: float) -> float:
    """To four digits, however slow."""
    return float(f"{speed:.4g}")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that was taken so far, 10^6 bytes: of a GPU by torch's allocator, of a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1e6


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of the square matrix products of a fifth of a second, at least one."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    torch.mm(a, a)  # on a GPU the first one loads the library, which may take longer than all of it
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    fastest, end = float("inf"), time.perf_counter() + MEASURED_FOR
    while fastest == float("inf") or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size**3 / fastest


def work_of_steps(
    model: PromptedViT, prompt: Prompt | None, images: int, tokens: tuple[int, int] | None = None
) -> dict[str, float]:
    """Floating-point operations of a step in each phase, as torch counts them, forward and backward.

    Counted on copies without storage, before a strategy takes the model apart. What gradient checkpointing computes
    again is not counted: it is the price of memory, not work done.

    Args:
        images: of the rank's slice of the batch.
        tokens: (T, D), where the trunk's tokens take the place of images.
    """
    shadow = _without_numbers(model)
    head = shadow.head
    # the same products; its own forward asks for autocast, which tensors without storage do not know
    head.forward = lambda features: (head.mlp(features), features @ head.prototypes.T)  # type: ignore[method-assign]
    weights = [p for p in shadow.parameters() if p.requires_grad]
    views = torch.empty(2 * images, *(tokens or (3, model.image_size, model.image_size)), device="meta")
    if prompt is None:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(_total(shadow(views)), weights)
        return {"model": float(counter.get_total_flops())}
    pixels = _without_numbers(prompt)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(_total(shadow(views, pixels())), list(pixels.parameters()))
    work = {"prompt": float(counter.get_total_flops())}
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(_total(shadow(views[:images], pixels().detach(), with_clean=True)), weights)
    return work | {"model": float(counter.get_total_flops())}


def _without_numbers(module: M) -> M:
    """A copy on the meta device; the numbers are not copied on the way, which of a large model are gigabytes a rank."""
    empty: dict[int, object] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for p in module.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(module, empty)


def _total(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    _, projections, logits = outputs
    return projections.sum() + logits.sum()
