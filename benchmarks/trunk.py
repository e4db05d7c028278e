"""Time of an epoch of SimGCD from the trunk's tokens, beside one through the trunk; prints a table.

Both kinds of steps are timed in turn, in one process, on random pixels and tokens of the shapes that training has; the
views through the trunk are fresh, so what making the tokens costs, once, is told too. Decoding is in neither.

`python benchmarks/trunk.py --backbone vit_small_patch14_dinov2 --image-size 112 --images 2936 --views 4`
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from sptnet import GCDLoss, create_model
from sptnet.method.model import PromptedViT
from sptnet.run.throughput import matmul_peak
from sptnet.strategy.freed import keep_freed_memory

CLASSES = (41, 40)


def step_on(model: PromptedViT, batch: int, bf16: bool) -> Callable[[torch.Tensor], None]:
    """A step of forward, loss, backward and update on images [2 B, 3, S, S] or tokens [2 B, T, D]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)  # as training's
    loss, targets = GCDLoss(), torch.arange(batch) % 2
    labelled = targets == 0

    def step(inputs: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            _, projections, logits = model(inputs)
        optimizer.zero_grad()
        loss(projections.float(), logits.float(), targets, labelled, 0.04).total.backward()
        optimizer.step()

    return step


def timed(work: Callable[[torch.Tensor], object], inputs: torch.Tensor) -> float:
    begin = time.perf_counter()
    work(inputs)
    return time.perf_counter() - begin


def _has_bf16() -> bool:
    """Whether this CPU computes in it; where it does not, a single step takes minutes."""
    cpu = torch.device("cpu")
    return matmul_peak(cpu, torch.bfloat16) > matmul_peak(cpu, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--images", type=int, default=2936, help="of an epoch")
    parser.add_argument("--views", type=int, default=4, help="that are kept of an image")
    parser.add_argument("--batch", type=int, default=128, help="images of a step, two views each")
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    console = Console(width=110)
    keep_freed_memory()  # as commands do
    model = create_model(given.backbone, *CLASSES, image_size=given.image_size, weights="none")
    images = torch.randn(2 * given.batch, 3, given.image_size, given.image_size)
    table = Table(
        title=f"{given.backbone}, {given.image_size} px, batch {given.batch}, {torch.get_num_threads()} x cpu"
    )
    for column in ("precision", "trunk, s", "tokens, s", "trunk / tokens", "an epoch, s", "made once, s", "MB read"):
        table.add_column(column)
    precisions = (False, True) if _has_bf16() else (False,)
    for bf16 in precisions:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokens = torch.cat([model.trunk(piece) for piece in images.split(32)]).half()
        step = step_on(model, given.batch, bf16)
        step(tokens)
        trunk, kept, made = float("inf"), float("inf"), float("inf")
        for _ in range(given.pairs):
            trunk = min(trunk, timed(step, images))
            kept = min(kept, timed(step, tokens))  # of as many: the fastest of more is faster
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                made = min(made, timed(model.trunk, images[:32]) / 32)
        steps = given.images // given.batch
        table.add_row(
            "bf16" if bf16 else "float32", f"{trunk:.3f}", f"{kept:.3f}", f"{trunk / kept:.1f}",
            f"{steps * trunk:.0f} / {steps * kept:.1f}", f"{given.images * given.views * made:.0f}",
            f"{tokens.nbytes / 1e6:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"Where a step from tokens goes ({'bf16' if bf16 else 'float32'}):")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(tokens)
    ops = sorted(profiled.key_averages(), key=lambda op: -op.self_cpu_time_total)[:8]
    whole = sum(op.self_cpu_time_total for op in profiled.key_averages())
    for op in ops:
        console.print(f"  {op.key:<40} {100 * op.self_cpu_time_total / whole:4.0f}%", highlight=False)


if __name__ == "__main__":
    main()
