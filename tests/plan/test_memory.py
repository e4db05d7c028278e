"""What is planned with fake tensors on pretended ranks is what real runs hold, counted the same way."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import ran
from small import config_of, counted_here, parts, told

from sptnet.plan.fake_ranks import on_fake_ranks
from sptnet.plan.live import LiveBytes
from sptnet.plan.zero import with_zero
from sptnet.strategy.create import WRAPPERS
from sptnet.strategy.launcher import LaunchSettings

CHECKPOINTED = ["memory.gradient_checkpointing=full"]
MICRO = ["memory.micro_batches=2"]
LAST = ["model.train_from_block=-1"]
SHARDED = [*LAST, "memory.frozen_blocks=sharded"]
WORKER = Path(__file__).parent / "small.py"
ALONE = [
    ("no", []),
    ("no", LAST),
    ("bf16", LAST),
    ("no", CHECKPOINTED),
    ("no", [*MICRO, *LAST]),
    ("no", ["optimizer.name=sgd"]),
    pytest.param("fp16", MICRO, marks=pytest.mark.slow),
]
# strategy, processes, ranks that share a copy, precision, overrides
WORLDS = [
    ("ddp", 2, 2, "no", LAST), ("ddp", 2, 2, "no", CHECKPOINTED), ("ddp", 2, 2, "no", MICRO), ("ddp", 4, 4, "no", []),
    ("fsdp2", 2, 2, "no", []), ("fsdp2", 2, 2, "bf16", SHARDED), ("fsdp2", 2, 2, "no", [*CHECKPOINTED, *MICRO]),
    ("fsdp2", 2, 2, "no", [*SHARDED, *MICRO]),
    ("fsdp2", 4, 4, "no", LAST), ("ddp", 1, 1, "no", []), ("fsdp2", 1, 1, "no", MICRO), ("hsdp", 4, 2, "no", []),
    ("hsdp", 4, 2, "no", CHECKPOINTED),
]  # fmt: skip
ZERO = [
    (f"zero{stage}", ranks, precision, overrides)
    for stage, ranks, precision, overrides in (
        (1, 2, "no", []), (2, 2, "no", LAST), (2, 2, "no", CHECKPOINTED), (2, 4, "no", []), (3, 2, "no", []),
        (3, 2, "no", LAST), (3, 2, "no", MICRO), (1, 2, "no", CHECKPOINTED), (3, 2, "no", CHECKPOINTED),
    )
]  # fmt: skip


def planned(strategy, world, shard, precision, overrides, wrapped=True):
    config = config_of(overrides)
    model, prompt, schedule = parts(config)
    prompt = None if prompt is None else prompt.to("meta")
    launch = LaunchSettings(strategy, world, precision, shard)
    return on_fake_ranks(config, model.to("meta"), prompt, schedule, launch, wrapped=wrapped)


def real(out, strategy, world, precision, overrides):
    done = ran([WORKER, out, strategy, precision, *overrides], strategy, world, precision)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found.pop("world"), found.pop("wrapper")) == (world, WRAPPERS[strategy])
    return found


def compare(plan, found, share):
    assert plan.keys() == found.keys()
    for phase in plan:
        print(
            phase, plan[phase]["peak"], found[phase]["peak"], f"{plan[phase]['peak'] / found[phase]['peak'] - 1:+.2%}"
        )
        print("   ", plan[phase]["bytes"], "\n   ", found[phase]["bytes"])
        print("   ", plan[phase]["collectives"], "\n   ", found[phase]["collectives"])
    for phase in plan:
        assert plan[phase]["peak"] == pytest.approx(found[phase]["peak"], rel=share)


@pytest.mark.parametrize(("precision", "overrides"), ALONE)
def test_planned_bytes_are_those_of_this_process(precision, overrides, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    plan = told(planned("single", 1, 1, precision, overrides))
    config = config_of(overrides)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = counted_here(config, "single", precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (found.pop("world"), found.pop("wrapper")) == (1, "PromptedViT")
    compare(plan, found, 0)
    for phase in plan:
        assert plan[phase]["flops"] == found[phase]["flops"]
        assert plan[phase]["kernels"] == found[phase]["kernels"]  # a question to a fake tensor is none


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world", "shard", "precision", "overrides"), WORLDS)
def test_planned_bytes_are_those_of_a_real_run(strategy, world, shard, precision, overrides, tmp_path):
    plan = told(planned(strategy, world, shard, precision, overrides))
    found = real(tmp_path / "told.json", strategy, world, precision, overrides)
    compare(plan, found, 0)
    for phase in plan:
        assert plan[phase]["flops"] == found[phase]["flops"]
        assert [list(call) for call in plan[phase]["collectives"]] == found[phase]["collectives"]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world", "precision", "overrides"), ZERO)
def test_the_formula_is_near_real_engines(strategy, world, precision, overrides, tmp_path):
    alone = planned(strategy, world, world, precision, overrides, wrapped=False)
    model, _, _ = parts(config_of(overrides))
    plan = {phase: with_zero(counted, phase, int(strategy[-1]), world, model, 2) for phase, counted in alone.items()}
    found = real(tmp_path / "told.json", strategy, world, precision, overrides)
    plan = told(plan)
    compare(plan, found, 0.1)
    for phase in plan:
        if overrides != MICRO:  # pieces are gathered and reduced one by one
            assert [list(call) for call in plan[phase]["collectives"]] == found[phase]["collectives"]


def test_ddp_holds_gradients_once():
    """In its buckets, not in tensors of their own beside them."""
    plan = planned("ddp", 8, 8, "no", LAST)
    model, _, _ = parts(config_of(LAST))
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= plan["model"].bytes["gradients"] < 1.1 * trained


def allocated(does):
    """The most bytes that torch's allocator held more than before, while something was done, by its own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        does()
    changes, left = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if hasattr(event.typed[1], "alloc_size"):
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def test_the_count_is_what_torch_allocates():
    """Independent of our counter: the allocator's own events, of a block's forward and backward pass."""
    model, _, _ = parts(config_of([]))
    images = torch.randn(64, 3, 48, 48)

    def does():
        outputs = model(images)
        (outputs.projections.square().sum() + outputs.logits.square().sum()).backward()
        model.zero_grad()

    does()  # what is taken once only
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers(), images):
            live.note(tensor)  # a view of what is not known is taken for something new
        before = live.now
        does()
        counted = live.peak[0] - before
    assert counted == pytest.approx(allocated(does), rel=0.02)


def test_emptied_and_refilled_storages_are_seen():
    with LiveBytes() as live:
        tensor = torch.empty(1000)
        other = torch.empty(1000)
        tensor.untyped_storage().resize_(0)
        assert live.now == 4096
        tensor.untyped_storage().resize_(4000)
        assert live.now == 8192
        assert live.of(tensor).refilled
        assert not live.of(other).refilled
        del tensor, other
        assert live.now == 0
        assert live.peak[0] == 8192
