"""Seconds of a few steps of both stages on this machine, at several image sizes.

`[accelerate launch ...] -m sptnet.discover.measure FIRST.yaml SECOND.yaml OUT.json ONE_SIZE`, on as many processes as
will train.
A step is taken on fewer images than a batch has where it is slow, and what it took is scaled.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sptnet.build import assemble, build_data, build_schedule, build_untrained, num_new_classes
from sptnet.config import Config
from sptnet.config_file import load_config
from sptnet.data.augment import normalise
from sptnet.data.format.files import write_whole
from sptnet.data.format.manifest import KINDS
from sptnet.data.loader import train_batches
from sptnet.data.storage.store import Store
from sptnet.data.tokens import TokenShape
from sptnet.discover.free_memory import free_memory
from sptnet.discover.plan import Cost
from sptnet.errors import SptnetError
from sptnet.run.parts import PartsError
from sptnet.steps import Learner
from sptnet.strategy.attention import choose_attention
from sptnet.strategy.collectives import rank, world_size
from sptnet.strategy.connect import connect
from sptnet.strategy.kernels import choose_kernels
from sptnet.trunk_cache import limit_of, root_of, stored_type

SHARES = (1.0, 0.75, 0.5)  # of the recipe's image size
LONG_ENOUGH = 1.0  # seconds of a step that needs no larger batch to be believed
REPEATS = 3
SMALLEST, GROWTH = 4, 4  # images of the first trial, and so many times as many of the next
LONGEST = 4.0  # seconds for the same step, again and again
PATIENCE = 60.0  # seconds for all of it, beyond which a step is taken once, and other sizes are reckoned
LEAST_SLOPE = 0.3  # of what an image took on average: a line through noise may fall


def image_sizes(largest: int, patch: int) -> list[int]:
    """The sizes that are tried: multiples of the patch size."""
    return sorted({max(1, round(share * largest / patch)) * patch for share in SHARES}, reverse=True)


def measure(first: Config, second: Config, one_size: bool) -> dict[str, Any]:
    """Costs by image size, and how many bytes a rank may take; all ranks call it, and get the same but for bytes."""
    accelerator, launch = connect(first.collective_timeout_s, first.device)
    choose_kernels(accelerator.device, first.matmul_precision, first.deterministic)
    store, order = build_data(first)
    available = memory_of_rank(accelerator.device)  # before a step has taken any
    bench = Bench(first, second, store, accelerator.device, time.monotonic() + PATIENCE, available)
    classes = store.manifest.num_old, num_new_classes(first, store.manifest)
    patch = build_untrained(first, *classes)[0].patch_size
    found: dict[int, Cost] = {}
    for size in [first.model.image_size] if one_size else image_sizes(first.model.image_size, patch):
        if found and bench.is_late():
            found[size] = _by_pixels(found[min(found)], (size / min(found)) ** 2)
            continue
        learners = []  # those of the size before are let go of
        for config in (first, second) if second.method == "sptnet" else (first,):
            config = _at_size(config, size)
            built, prompt = build_untrained(config, *classes)
            choose_attention(built, accelerator.device, launch.precision, config.memory.micro_batches)
            schedule = build_schedule(config, order.steps_per_epoch)
            learners.append(assemble(config, accelerator, launch, built, prompt, schedule))
        cost = bench.cost(learners[0], learners[-1], size)
        found[size] = cost if not found else _at_most(cost, found[min(found)])
    return {
        "costs": {size: cost._asdict() for size, cost in found.items()},
        "available": available, "processes": world_size(), "precision": launch.precision,
        "device": accelerator.device.type,
    }  # fmt: skip


def _at_size(config: Config, size: int) -> Config:
    frame = max(1, int(config.prompts.frame * size / config.model.image_size))
    prompts = config.prompts.model_copy(update={"frame": frame})
    model = config.model.model_copy(update={"image_size": size})
    return config.model_copy(update={"model": model, "prompts": prompts, "init": None})


def _by_pixels(cost: Cost, share: float) -> Cost:
    """About what fewer pixels take, where there is no time to measure it: a ViT's work goes with its tokens."""
    return Cost(*(None if value is None else share * value for value in cost))  # type: ignore[arg-type]


def _at_most(cost: Cost, larger: Cost) -> Cost:
    """Fewer pixels do not take longer than more: where they did, something else ran meanwhile."""
    pairs = zip(cost, larger, strict=True)
    return Cost(*(a if a is None or b is None else min(a, b) for a, b in pairs))  # type: ignore[arg-type]


@dataclass
class Bench:
    """Times steps; all ranks call the same, and decide alike.

    Attributes:
        until: by time.monotonic; once it is past, nothing is repeated and no larger count is tried.
        available: bytes for activations; steps that would need more are not taken, but reckoned from smaller ones.
    """

    first: Config
    second: Config
    store: Store
    device: torch.device
    until: float
    available: float

    def is_late(self) -> bool:
        """Whether measuring has taken as long as it may."""
        return _slowest(float(time.monotonic() > self.until)) > 0

    def cost(self, first: Learner, second: Learner, size: int) -> Cost:
        """What the learners of both stages take at an image size; `second` is `first` where SimGCD goes on."""
        batch, ranks = self.first.data.batch_size, world_size()
        share, images = batch // ranks, 2 * batch // ranks
        fresh = self._step(first, 0, share, size)
        loaded, kept_bytes = self._with_loading(fresh[0], 1.0), fresh[1]

        def forward(n: int) -> None:
            views = torch.zeros(n, 3, size, size, device=self.device)
            first.strategy.forward_evaluation(views, None).logits.sum().item()

        behind, behind_bytes = loaded, kept_bytes  # of SimGCD again, through the trunk
        if second.prompt is not None:
            prompt, model = (self._step(second, step, share, size) for step in (0, self.second.schedule.k))
            behind = (self._with_loading(prompt[0], 1.0) + self._with_loading(model[0], 0.5)) / 2
            behind_bytes = max(prompt[1], model[1])
        image = self._scaled(forward, images) / images / ranks
        kept, once = self._kept(first, share, size, image)
        return Cost(loaded, behind, image, kept, once, kept_bytes, behind_bytes)

    @cached_property
    def _loading(self) -> float:
        """Seconds that one process takes to load the two views of a batch's images."""
        some = self.first.data.model_copy(update={"batch_size": 2 * self.first.data.streams})
        _, order = build_data(self.first.model_copy(update={"data": some}))
        size = self.first.model.image_size
        steps = range(1 + REPEATS)
        batches = train_batches(self.store, order, augment=some.augment, image_size=size, seed=0, steps=steps)
        next(batches)  # opens the shards
        times: list[float] = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - begin)
        return min(times) / some.batch_size * self.first.data.batch_size

    def _with_loading(self, step: float, share: float) -> float:
        """On a CPU loading takes its share of the same cores, elsewhere it is done meanwhile."""
        if self.device.type == "cpu":
            return step + share * self._loading / (torch.get_num_threads() * world_size())
        return max(step, share * self._loading / (max(1, self.first.data.workers) * world_size()))

    def _targets(self, images: int) -> Tensor:
        """Of a slice, [n]."""
        return torch.zeros(images, dtype=torch.int64, device=self.device)

    def _kept(self, learner: Learner, share: int, size: int, image: float) -> tuple[float | None, float]:
        """Seconds of a step from kept tokens of known views, and of making these; None where none are kept."""
        config, module, manifest = self.first, learner.strategy.module, self.store.manifest
        dtype, views = stored_type(config, module), config.data.views
        if dtype is None or views is None or config.trunk_cache == "off":
            return None, 0.0
        with torch.no_grad(), learner.strategy.autocast():
            row = module.trunk(torch.zeros(1, 3, size, size, device=self.device))[0]  # [T, D]
        shape = TokenShape(views, row.shape[0], row.shape[1], config.data.tokens)
        rows = sum(shape.rows_of(kind) * manifest.samples(kind) for kind in KINDS)
        if not _has_room(config, rows * shape.row_bytes):
            return None, 0.0

        kept = torch.randn(2, share, *row.shape, device=self.device).to(dtype)

        def take(n: int) -> None:
            learner.step(0, kept[:, :n].float(), self._targets(n), None).terms.total.item()

        return self._scaled(take, share), rows * image

    def _step(self, learner: Learner, step: int, share: int, size: int) -> tuple[float, float]:
        """Seconds of a step on a rank's whole share of a batch, and the bytes that it keeps for the backward pass."""

        def take(n: int) -> None:
            views = torch.zeros(learner.views_at(step), n, 3, size, size, dtype=torch.uint8, device=self.device)
            views = normalise(views, learner.strategy.module.statistics)
            learner.step(step, views + torch.randn_like(views), self._targets(n), None).terms.total.item()

        counts = sorted({max(1, min(SMALLEST, share) // 2), min(SMALLEST, share)})
        fewer, more = counts[0], counts[-1]
        kept = {n: _kept_for_backward(learner, take, n) for n in counts}
        # weights that autocast has copied are kept too, whatever the batch
        an_image = (kept[more] - kept[fewer]) / (more - fewer) if more > fewer else kept[more]
        fit = -_slowest(-self.available / max(an_image, 1))  # the fewest of all ranks
        return self._scaled(take, share, max(more, int(fit))), kept[more] + an_image * (share - more)

    def _scaled(self, take: Callable[[int], object], whole: int, most: int | None = None) -> float:
        """Seconds of `take(whole)`, from as few images as take long enough: by a line through the last two counts.

        Args:
            most: images that there is memory for.
        """
        top = whole if most is None else min(whole, most)
        images, before = min(SMALLEST, whole), (0, 0.0)
        while True:
            take(images)
            times: list[float] = []
            late = False
            while len(times) < REPEATS and sum(times) < LONGEST and not late:
                begin = time.perf_counter()
                take(images)
                times.append(_slowest(time.perf_counter() - begin))
                late = self.is_late()
            taken = min(times)  # whatever else runs here, it does not run always
            if images == top or taken > LONG_ENOUGH or late:
                # what a step costs whatever its batch, the optimizer above all, is not to be scaled
                slope = max((taken - before[1]) / (images - before[0]), LEAST_SLOPE * taken / images)
                return taken + slope * (whole - images)
            images, before = min(top, GROWTH * images), (images, taken)


def _kept_for_backward(learner: Learner, take: Callable[[int], None], images: int) -> int:
    """Bytes of the activations that a step keeps."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in learner.strategy.module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        take(images)
    return sum(kept.values())


def _has_room(config: Config, needed: int) -> bool:
    """Whether the disk holds the tokens, within what their folder may take."""
    try:
        folder = root_of(config).resolve()
    except PartsError:
        return False
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(there, os.W_OK | os.X_OK) and needed <= min(limit_of(config), shutil.disk_usage(there).free)


def _slowest(seconds: float) -> float:
    """The most of all ranks, which then decide alike."""
    if world_size() == 1:
        return seconds
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    told = torch.tensor(seconds, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return float(told)


def memory_of_rank(device: torch.device) -> float:
    """Bytes that a rank may take for activations: part of what is free now."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.6 * free_memory() / world_size()


def main(arguments: list[str]) -> int:
    """Measure and write; a mistake of the user is one line."""
    first, second, out, one_size = arguments
    try:
        configs = load_config(first), load_config(second, ["init=null"])
        found = measure(configs[0], configs[1].model_copy(update={"model": configs[0].model}), one_size == "True")
        if rank() == 0:
            write_whole(Path(out), (json.dumps(found, indent=1) + "\n").encode())
    except SptnetError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    from sptnet.strategy.collectives import exit_process

    exit_process(main(sys.argv[1:]))
