"""What every process of a multi-process test runs; rank 0 writes what it found to a JSON file.

Usage: worker.py OUT DATA EXPECTED_STRATEGY EXPECTED_WORLD_SIZE LOADER_WORKERS
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from sptnet.build import build_data, build_model, build_schedule
from sptnet.collectives import gather_rows, gather_views, rank, world_size
from sptnet.config import load_config
from sptnet.data.augment import normalise
from sptnet.data.loader import train_batches
from sptnet.evaluate import evaluate, exactly_once, expected_uids, predict
from sptnet.strategy.connect import connect
from sptnet.train import assemble

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_sptnet.yaml"
FIRST, STEPS, BATCH = 3, 40, 48  # starts in the middle of a prompt phase; k = 6: both phases three times


def main(out: Path, data: str, strategy: str, size: int, workers: int) -> None:
    config = load_config(
        CONFIG,
        [f"data.root={data}", f"data.batch_size={BATCH}", f"data.workers={workers}", "init=null", "schedule.k=6",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}", "optimizer.name=sgd",
         "optimizer.lr=0.05", "prompts.warmup_steps=5", "evaluate.batch_size=50"],
    )  # fmt: skip
    manifest, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, manifest)
    accelerator = connect()
    learner = assemble(config, accelerator, model, prompt, schedule)
    assert (learner.strategy.name, world_size(), accelerator.num_processes) == (strategy, size, size)
    assert learner.strategy.wrapper == ("PromptedViT" if strategy == "single" else "DistributedDataParallel")

    batches = train_batches(
        Path(data), manifest, order, augment=config.data.augment, image_size=24, seed=0,
        steps=range(FIRST, FIRST + STEPS), views_at=learner.views_at, workers=workers, rank=rank(), world_size=size,
    )  # fmt: skip
    losses, phases, uids = [], [], []
    for batch in batches:
        terms = learner.step(batch.step, normalise(batch.views), batch.targets, batch.labelled)
        losses.append([term.item() for term in terms])
        phases.append(schedule.phase(batch.step))
        uids.append(gather_views(batch.uids, views=1).tolist())

    evaluated = evaluate(learner.strategy, prompt, config, manifest)
    # one rank loses its last prediction; another rank, or the same one, sends its first one twice
    rows = predict(learner.strategy, None, config, manifest, "test")
    lossy = gather_rows(rows[:-1] if rank() == size - 1 else rows)
    doubled = gather_rows(rows[[0, *range(len(rows))]] if rank() == 0 else rows, block=32)
    if rank() == 0:
        expected = expected_uids(Path(data), manifest, "test")
        faults = [fault(gathered.numpy(), expected) for gathered in (lossy, doubled)]
        results, predictions = evaluated
        told = {
            "losses": losses, "phases": phases, "uids": uids, "faults": faults, "results": results,
            "predictions": {k: [v.tolist() for v in p] for k, p in predictions.items()},
        }  # fmt: skip
        out.write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


def fault(gathered, expected) -> str:
    try:
        exactly_once(gathered, expected)
    except RuntimeError as error:
        return str(error)
    return "not noticed"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
