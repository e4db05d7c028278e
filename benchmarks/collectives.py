"""Collectives of a step and their bytes under every strategy on R ranks; prints a table for docs/scale.md.

The real steps and strategies on pretended ranks (sptnet/plan/fake_ranks.py), a ViT-B/16 at 224 with its last block and
head trained; ZeRO's by a formula (sptnet/plan/zero.py). Bytes are those of the whole of what is gathered or reduced.
"""

import argparse
from collections.abc import Iterator
from functools import cache

from sptnet.config import Config
from sptnet.config_file import load_config
from sptnet.method.model import PromptedViT, create_model
from sptnet.method.prompts import Prompt, create_prompt
from sptnet.method.schedule import Schedule
from sptnet.plan.fake_ranks import on_fake_ranks
from sptnet.plan.trial import Counted, Phase
from sptnet.plan.zero import with_zero
from sptnet.strategy.launcher import LaunchSettings

WORLDS = (1, 8, 64, 512)
NODE = 8  # ranks that share a copy under hsdp
STEPS: tuple[Phase, ...] = ("prompt", "model")
# frozen blocks do not matter to the others
STRATEGIES = (("ddp", "whole"), ("fsdp2", "whole"), ("fsdp2", "sharded"), ("hsdp", "sharded"), ("zero1", "whole"),
              ("zero2", "whole"), ("zero3", "whole"))  # fmt: skip


def parts(config: Config) -> tuple[PromptedViT, Prompt]:
    model = create_model(config.model.backbone, 100, 100, weights="none").to("meta")
    return model, create_prompt("all", 224, 16).to("meta")


@cache
def counted(strategy: str, frozen: str, ranks: int, batch: int, precision: str) -> dict[Phase, Counted]:
    """A step of each phase; of `single` on a rank that shares nothing but the loss."""
    config = load_config("configs/cub.yaml", [f"data.batch_size={batch}", f"memory.frozen_blocks={frozen}"])
    model, prompt = parts(config)
    shard = min(NODE, ranks) if strategy == "hsdp" else ranks
    launch = LaunchSettings(strategy, ranks, precision, shard)  # type: ignore[arg-type]
    return on_fake_ranks(config, model, prompt, Schedule(10, 100, k=4), launch, wrapped=strategy != "single")


def steps_of(strategy: str, frozen: str, ranks: int, batch: int, precision: str) -> dict[Phase, Counted]:
    if not strategy.startswith("zero"):
        return counted(strategy, frozen, ranks, batch, precision)
    model, _ = parts(load_config("configs/cub.yaml"))
    alone = counted("single", frozen, ranks, batch, precision)
    return {phase: with_zero(found, phase, int(strategy[-1]), ranks, model, 1) for phase, found in alone.items()}


def row(strategy: str, frozen: str, batch: int, precision: str) -> Iterator[str]:
    """Calls and MB of a step of each phase, by ranks."""
    for ranks in WORLDS:
        if ranks == 1:
            yield "none"
            continue
        found = steps_of(strategy, frozen, ranks, batch, precision)
        cell = []
        for phase in STEPS:
            work = found[phase].work
            assert work is not None
            told = " + ".join(f"{count} {name}" for name, count in sorted(work.calls.items()))
            cell.append(f"{phase}: {told}, {work.sent / 1e6:,.0f} MB")
        yield "; ".join(cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024, help="of all ranks (default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="(default: %(default)s)")
    options = parser.parse_args()
    print("| strategy | " + " | ".join(f"R = {ranks}" for ranks in WORLDS) + " |\n|---|" + "---|" * len(WORLDS))
    for strategy, frozen in STRATEGIES:
        name = f"{strategy}, frozen blocks {frozen}" if "sdp" in strategy else strategy
        print(f"| {name} | " + " | ".join(row(strategy, frozen, options.batch, options.precision)) + " |", flush=True)


if __name__ == "__main__":
    main()
