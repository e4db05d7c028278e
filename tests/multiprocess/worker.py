"""What every process of a multi-process test runs; rank 0 writes what it found to a JSON file.

Usage: worker.py OUT DATA STRATEGY WORLD_SIZE LOADER_WORKERS PRECISION [section.key=value ...], as they must be
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from counting import Counting
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sptnet.build import assemble, build_data, build_model, build_schedule
from sptnet.config_file import load_config
from sptnet.data.loader import train_batches
from sptnet.data.on_device import on_device
from sptnet.evaluate import evaluate, predict
from sptnet.exact_counts import COLUMNS, count_once, rows_of
from sptnet.objective import RankStatus
from sptnet.run.resume import prompt_state
from sptnet.steps import Flags
from sptnet.strategy.collectives import exit_process, gather_packed, rank, world_size
from sptnet.strategy.connect import connect
from sptnet.strategy.readback import Readback

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FIRST, STEPS, BATCH = 3, 40, 48  # starts in the middle of a prompt phase; k = 6: both phases three times


def main(out: Path, data: str, strategy: str, size: int, workers: int, precision: str, overrides: list[str]) -> None:
    config = load_config(
        CONFIG,
        [f"data.root={data}", f"data.batch_size={BATCH}", f"data.workers={workers}", "init=null", "schedule.k=6",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}", "optimizer.name=sgd",
         "optimizer.lr=0.01", "prompts.lr=0.2", "prompts.warmup_steps=5", "evaluate.batch_size=50", *overrides],
    )  # fmt: skip
    store, order = build_data(config)
    schedule = build_schedule(config, order.steps_per_epoch)
    model, prompt = build_model(config, store.manifest)
    accelerator, launch = connect(config.collective_timeout_s)
    learner = assemble(config, accelerator, launch, model, prompt, schedule)
    assert (launch.strategy, launch.world_size, world_size(), accelerator.num_processes) == (strategy, size, size, size)
    assert_wrapped(learner.strategy, strategy, config.memory.frozen_blocks)
    assert launch.precision == precision

    batches = train_batches(
        store, order, augment=config.data.augment, image_size=24, seed=0,
        steps=range(FIRST, FIRST + STEPS), views_at=learner.views_at, workers=workers, rank=rank(), world_size=size,
    )  # fmt: skip
    losses, phases, uids = [], [], []
    for batch, views, targets in on_device(batches, learner.strategy.device, learner.strategy.module.statistics):
        taken = learner.step(batch.step, views, targets, None)
        losses.append([term.item() for term in taken.terms])
        phases.append(schedule.phase(batch.step))
        uids.append(gather_packed([batch.uids.to(learner.strategy.device)])[0].flatten().tolist())

    costs = costs_of_a_step(learner, views[:1], targets)
    if precision == "fp16":
        assert_that_an_overflow_lowers_the_scale(learner, views[:1], targets)
    assert_nothing_but_finite_steps(learner, views[:1], targets)
    results, parts = evaluate(learner.strategy, prompt, config, store)
    # one rank loses its last prediction; another rank, or the same one, sends its first one twice
    found = rows_of(predict(learner.strategy, None, config, store, "test"))
    rows = np.concatenate([np.zeros((0, COLUMNS), np.int64), *found])
    lossy = fault(learner, store, rows[:-1] if rank() == size - 1 else rows)
    doubled = fault(learner, store, rows[[0, *range(len(rows))]] if rank() == 0 else rows)
    if rank() == 0:
        faults = [lossy, doubled]
        predictions = {kind: parts.columns(kind, part).values() for kind, part in parts}
        told = {
            "losses": losses, "phases": phases, "uids": uids, "faults": faults, "results": results,
            "costs": costs, "device": learner.strategy.device.type,
            "predictions": {k: [v.tolist() for v in p] for k, p in predictions.items()},
        }  # fmt: skip
        out.write_text(json.dumps(told))
    exit_process(0)


def assert_wrapped(strategy, name, frozen_blocks="sharded") -> None:
    """The class that really runs, and that its weights are spread as its name says."""
    module = strategy.module
    first, last = module.backbone.blocks
    parameter = first.mlp.fc1.weight
    if name in ("single", "ddp"):
        assert type(strategy.module).__name__ == "PromptedViT"
        assert strategy.wrapper == {"single": "PromptedViT", "ddp": "DistributedDataParallel"}[name]
    elif name in ("fsdp2", "hsdp"):
        assert isinstance(module, FSDPModule)
        assert isinstance(last, FSDPModule)
        assert isinstance(first, FSDPModule) == (module.train_from_block == 0 or frozen_blocks == "sharded")
        expected = {n for n, p in module.named_parameters() if p.requires_grad}
        if frozen_blocks == "sharded":
            matrices = (n for n, part in first.named_modules() if isinstance(part, torch.nn.Linear))
            expected |= {f"backbone.blocks.0.{n}.weight" for n in matrices}
        assert {n for n, p in module.named_parameters() if isinstance(p, DTensor)} == expected
        parameter = last.mlp.fc1.weight
        assert parameter.device_mesh.ndim == (1 if name == "fsdp2" else 2)
        assert parameter.to_local().numel() < parameter.numel()
    else:
        assert strategy.wrapper == "DeepSpeedEngine"
        assert strategy.stage == int(name.removeprefix("zero"))
        assert type(strategy._engine.optimizer).__name__.startswith("DeepSpeedZeroOptimizer")
        assert (parameter.numel() == 0) == (name == "zero3")


def of_phase(learner, step, view):
    """As many views as a step wants, all of them this one: [1, b, 3, H, W] to [V, b, 3, H, W]."""
    return view.expand(learner.views_at(step), *view.shape[1:]).clone()


def assert_nothing_but_finite_steps(learner, view, targets) -> None:
    """A rank with a pixel that is not a number: all ranks are told, nothing is changed, and the next step is fine."""
    before = state_of(learner)
    for step in range(FIRST + STEPS, FIRST + STEPS + 12):
        views = of_phase(learner, step, view)
        views[0, 0, 0, 0, 0] = float("nan") if rank() == world_size() - 1 else 0.0
        taken = learner.step(step, views, targets, None)
        flags = Flags(*Readback(taken.flags).read())
        assert flags.left_out
        assert flags.faults
        assert taken.faulty.tolist() == [r == world_size() - 1 for r in range(world_size())]
        assert all(term.isnan() for term in taken.terms)
    after = state_of(learner)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    views[0, 0, 0, 0, 0] = 0.0
    assert learner.step(step, views, targets, None).terms.total.isfinite()


def assert_that_an_overflow_lowers_the_scale(learner, view, targets) -> None:
    """A scale that is far too large comes down by half with every step left out, and then steps are taken again."""
    scaler = learner.strategy.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**45})
    left_out = 0
    for step in range(FIRST + STEPS, FIRST + STEPS + 120):
        if learner.schedule.phase(step) != "model":
            continue
        views = of_phase(learner, step, view)
        if not Flags(*Readback(learner.step(step, views, targets, None).flags).read()).left_out:
            break
        left_out += 1
    assert 0 < left_out < 50
    assert scaler.state_dict()["scale"] == 2.0 ** (45 - left_out) < 2.0**40


def costs_of_a_step(learner, view, targets) -> dict:
    """Collectives, host reads and passes of the frozen block of a step of each phase, both late enough to be like all
    that follow. On a GPU torch itself refuses what waits for it.
    """
    costs, passes = {}, []
    learner.strategy.module.backbone.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for step in range(FIRST + STEPS, FIRST + STEPS + 12):
        views = of_phase(learner, step, view)
        passes.clear()
        with Counting() as counted, refusing_to_wait(learner.strategy.device):
            taken = learner.step(step, views, targets, None, RankStatus(rank() == 0, rank()))
            readback = Readback(taken.flags)
        flags = Flags(*readback.read())
        assert (flags.stop, flags.replaced) == (1, sum(range(world_size())))
        costs[taken.phase] = {"collectives": counted.collectives, "reads": counted.reads, "passes": len(passes)}
    return costs


@contextmanager
def refusing_to_wait(device):
    """Where the device is a GPU: an error in what makes the host wait for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def state_of(learner) -> dict[str, torch.Tensor]:
    return learner.strategy.trained_state(lambda i: True) | prompt_state(learner)


def fault(learner, store, rows) -> str:
    try:
        count_once(store, "test", iter([rows]), 10, learner.strategy.device, lambda window, predictions: None)
    except RuntimeError as error:
        return str(error)
    return "not noticed"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6], sys.argv[7:])
