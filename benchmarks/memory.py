"""Peak memory and time of both phases for every memory setting, and how long training waits for a checkpoint.

Every setting runs in a process of its own; on a GPU the memory is what torch allocated there, else the process's. The
model is ViT-B/16 at 224 with random weights, its last block and head trained.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sptnet import GCDLoss, create_model, create_prompt
from sptnet.config_sections import Every
from sptnet.method.schedule import Schedule
from sptnet.run.checkpoint import Facts
from sptnet.run.resume import prompt_state
from sptnet.run.saving import Writer
from sptnet.run.throughput import peak_memory_mb
from sptnet.steps import Learner
from sptnet.strategy.base import parameter_groups
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_strategy
from sptnet.strategy.recompute import checkpoint_blocks

SETTINGS: list[tuple[str, int]] = [("none", 1), ("every 3", 1), ("full", 1), ("none", 2), ("full", 2)]


def learner_of(checkpointing: str, micro_batches: int, batch: int) -> Learner:
    model = create_model("vit_base_patch16_224", 100, 100, weights="none")
    prompt = create_prompt("all", 224, 16, 1, 30, torch.Generator().manual_seed(0))
    checkpoint_blocks(model, Every(every=3) if checkpointing == "every 3" else checkpointing)
    accelerator, launch = connect(600)

    def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(model, 5e-4), lr=0.01, momentum=0.9, fused=True)

    strategy = create_strategy(accelerator, launch, model, optimizer_of, batch)
    prompt.to(strategy.device)
    schedule = Schedule(epochs=10, steps_per_epoch=100, k=20, prompt_lr=1.0, model_lr=0.01)
    optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0, momentum=0.9, fused=True)
    return Learner(strategy, GCDLoss(), schedule, prompt, optimizer, True, micro_batches)


def measure(checkpointing: str, micro_batches: int, phase: str, batch: int) -> dict[str, float]:
    """Seconds of a step after the first, peak MB, and, of the model phase, the stall and the time of a checkpoint."""
    learner = learner_of(checkpointing, micro_batches, batch)
    device = learner.strategy.device
    first = 0 if phase == "prompt" else 20
    views = torch.randn(learner.views_at(first), batch, 3, 224, 224, device=device)
    targets = torch.arange(batch, device=device) % 100
    for step in (first, first + 1):
        start = time.perf_counter()
        learner.step(step, views, targets, None).terms.total.item()
        seconds = time.perf_counter() - start
    told = {"s": seconds, "MB": peak_memory_mb(device)}
    with tempfile.TemporaryDirectory() as run:
        writer = Writer(Path(run), 0, [0], 1, "benchmark")
        start = time.perf_counter()
        tensors = learner.strategy.trained_state(lambda i: True) | prompt_state(learner)
        writer.begin(Facts(1, {}, {}, {}, {}), tensors)
        told["stall"] = time.perf_counter() - start
        writer.wait()
        told["write"] = time.perf_counter() - start
        told["size"] = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4, help="images of a batch, two views each (default: %(default)s)")
    parser.add_argument("--one", nargs=3, metavar=("CHECKPOINTING", "MICRO_BATCHES", "PHASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        checkpointing, micro_batches, phase = arguments.one
        print(json.dumps(measure(checkpointing, int(micro_batches), phase, arguments.batch)))
        return
    table = Table(title=f"ViT-B/16 at 224, batch {arguments.batch}")
    for column in ("gradient_checkpointing", "micro_batches", "prompt: MB", "s", "model: MB", "s"):
        table.add_column(column, justify="right")
    for checkpointing, micro_batches in SETTINGS:
        row = [checkpointing, str(micro_batches)]
        for phase in ("prompt", "model"):
            command = [sys.executable, __file__, "--batch", str(arguments.batch), "--one", checkpointing]
            ran = subprocess.run([*command, str(micro_batches), phase], capture_output=True, text=True, check=True)
            told = json.loads(ran.stdout.splitlines()[-1])
            row += [f"{told['MB']:,.0f}", f"{told['s']:.2f}"]
        table.add_row(*row)
    checkpoint = (
        f"checkpoint of {told['size']:.0f} MB: training waits {told['stall'] * 1e3:.0f} ms, "
        f"the rest of {told['write'] * 1e3:.0f} ms is in the background"
    )
    Console(width=110).print(table, checkpoint, sep="\n")


if __name__ == "__main__":
    main()
