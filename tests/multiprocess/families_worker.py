"""Both phases of every family of backbones, on every process of a test; rank 0 writes the losses to a JSON file.

Usage: families_worker.py OUT DATA STRATEGY WORLD_SIZE FAMILY ..., as they must be
"""

import json
import sys
from pathlib import Path

from counting import Counting
from worker import assert_wrapped

from sptnet.build import assemble, build_data, build_model, build_schedule
from sptnet.config_file import load_config
from sptnet.data.augment import normalise
from sptnet.data.loader import train_batches
from sptnet.strategy.collectives import exit_process, rank, world_size
from sptnet.strategy.connect import connect

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FIRST, STEPS, BATCH = 3, 8, 16  # k = 4: a prompt step, four of the model, three of the prompts
# what is trained, so that each kind of position and of pooling is, or stays as it is
FAMILIES = {
    "dinov3": ["model.backbone=vit_small_patch16_dinov3"],
    "eva02": ["model.backbone=eva02_tiny_patch14_224"],
    "mixed": ["model.backbone=vit_small_patch16_rope_mixed_224", "model.train_from_block=0"],
    "siglip": ["model.backbone=vit_base_patch16_siglip_224", "model.train_from_block=0"],
    "beit": [
        "model.backbone=beit_base_patch16_224", "model.train_from_block=0", "memory.gradient_checkpointing=full",
        "memory.micro_batches=2",
    ],
    "relpos": ["model.backbone=vit_srelpos_small_patch16_224", "model.train_from_block=0"],
}  # fmt: skip


def losses_of(family: str, data: str, strategy: str, accelerator, launch) -> dict:
    """Losses and phases of a few alternating steps, and what the host read of the device in one of each phase."""
    config = load_config(
        CONFIG,
        [f"data.root={data}", f"data.batch_size={BATCH}", "init=null", "schedule.k=4", "optimizer.name=sgd",
         "optimizer.lr=0.01", "prompts.lr=0.2", "prompts.warmup_steps=5", "model.weights=none",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}",
         "memory.frozen_blocks=sharded", *FAMILIES[family]],
    )  # fmt: skip
    store, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, store.manifest)
    learner = assemble(config, accelerator, launch, model, prompt, schedule)
    assert_wrapped(learner.strategy, strategy)
    batches = train_batches(
        store, order, augment=config.data.augment, image_size=24, seed=0, steps=range(FIRST, FIRST + STEPS),
        views_at=learner.views_at, workers=0, rank=rank(), world_size=world_size(),
    )  # fmt: skip
    losses, phases, reads = [], [], {}
    for batch in batches:
        views = normalise(batch.views, learner.strategy.module.statistics)
        with Counting() as counted:
            taken = learner.step(batch.step, views, batch.targets, None)
        losses.append([term.item() for term in taken.terms])
        phases.append(taken.phase)
        reads[taken.phase] = counted.reads
    state = learner.strategy.full_state()
    weights = {name: float(value.double().square().sum()) for name, value in state.items()}
    return {"losses": losses, "phases": phases, "reads": reads, "weights": weights}


def main(out: Path, data: str, strategy: str, size: int, families: list[str]) -> None:
    accelerator, launch = connect(300)
    assert (launch.strategy, launch.world_size, world_size(), accelerator.num_processes) == (strategy, size, size, size)
    told = {family: losses_of(family, data, strategy, accelerator, launch) for family in families}
    if rank() == 0:
        out.write_text(json.dumps(told))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:])
