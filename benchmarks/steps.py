"""Time of a prompt step and a model step, beside the same steps written plainly; prints a table.

Plainly: the prompt is added to the pixels of every image, the last block computes all tokens, and attention is an
explicit softmax matrix. Ours attends by products too in bf16 on a CPU that has instructions for it, as runs do. Both
sides are timed in turn, pair by pair, in one process. The share of peak is what our step computes, as torch counts it,
over the fastest matrix product measured just before in the same dtype.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.layers import set_fused_attn
from torch import Tensor, nn

from sptnet import GCDLoss, create_model, create_prompt
from sptnet.run.throughput import matmul_peak, work_of_steps
from sptnet.strategy.attention import choose_attention

CLASSES = (50, 50)


class Plain(nn.Module):
    """The same backbone and head, without the two cheap formulations."""

    def __init__(self, backbone: str, image_size: int):
        super().__init__()
        set_fused_attn(False)
        self.backbone = timm.create_model(backbone, num_classes=0, global_pool="token", img_size=image_size)
        set_fused_attn(True)
        self.backbone.requires_grad_(False)
        self.backbone.blocks[-1].requires_grad_(True)
        self.head = create_model(backbone, *CLASSES, image_size=image_size, weights="none").head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.backbone(images))


def steps(
    device: str, backbone: str, image_size: int, batch: int, precision: str
) -> dict[str, tuple[Callable[[], None], Callable[[], None], float]]:
    """(ours, plain, operations of ours) of both phases, the steps as functions without arguments."""
    ours = create_model(backbone, *CLASSES, image_size=image_size, weights="none").to(device)
    choose_attention(ours, torch.device(device), precision, micro_batches=1)
    plain = Plain(backbone, image_size).to(device)
    prompt = create_prompt("all", image_size, ours.patch_size, 1, min(30, image_size // 4)).to(device)
    views = torch.randn(2 * batch, 3, image_size, image_size, device=device)
    targets, labelled = torch.arange(batch, device=device) % 2, torch.arange(batch, device=device) % 2 == 0
    loss, parameters = GCDLoss(), list(prompt.parameters())

    def total(projections: Tensor, logits: Tensor) -> Tensor:
        return loss(projections, logits, targets, labelled, 0.04).total

    def trained(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    def ours_prompt() -> None:
        torch.autograd.grad(total(*ours(views, prompt())[1:]), parameters)

    def plain_prompt() -> None:
        torch.autograd.grad(total(*plain(views + prompt())), parameters)

    def ours_model() -> None:
        torch.autograd.grad(total(*ours(views[:batch], prompt().detach(), with_clean=True)[1:]), trained(ours))

    def plain_model() -> None:
        pair = torch.cat([views[:batch], views[:batch] + prompt().detach()])
        torch.autograd.grad(total(*plain(pair)), trained(plain))

    work = work_of_steps(ours, prompt, batch)
    return {
        "prompt": (ours_prompt, plain_prompt, work["prompt"]),
        "model": (ours_model, plain_model, work["model"]),
    }


def seconds(function: Callable[[], None], device: str, precision: str) -> float:
    begin = time.perf_counter()
    with autocast(device, precision):  # entered anew, as a run does: it keeps casts of weights for as long
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--backbone", default="vit_base_patch16_224")
    arguments.add_argument("--image-size", type=int, default=224)
    arguments.add_argument("--batch", type=int, default=4, help="images, of two views each (default: %(default)s)")
    arguments.add_argument("--pairs", type=int, default=5, help="timed pairs (default: %(default)s)")
    arguments.add_argument(
        "--precision", nargs="+", choices=("float32", "bf16"), default=("float32", "bf16"),
        help="bf16 takes hours on a processor without bf16 instructions (default: both)",
    )  # fmt: skip
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    title = f"{options.backbone}, {options.image_size} px, batch {options.batch}, {torch.get_num_threads()} x {device}"
    table = Table(
        "precision", "phase", "ours, s", "plain, s", "ours / plain", "peak, TFLOP/s", "share of peak", title=title
    )
    table.title_justify = "left"
    for precision in options.precision:
        top = matmul_peak(torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)
        for phase, (ours, plain, work) in steps(
            device, options.backbone, options.image_size, options.batch, precision
        ).items():
            pair = ours, plain
            times = np.array([[seconds(one, device, precision) for one in pair] for _ in range(1 + options.pairs)])[1:]
            median = np.median(times, axis=0)
            ratio = np.median(times[:, 0] / times[:, 1])
            share = work / median[0] / top
            table.add_row(
                precision,
                phase,
                f"{median[0]:.3f}",
                f"{median[1]:.3f}",
                f"{ratio:.2f}",
                f"{top / 1e12:.3f}",
                f"{share:.2f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
