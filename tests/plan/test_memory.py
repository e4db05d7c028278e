"""What is planned with fake tensors on pretended ranks is what real runs hold, counted the same way."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launching import ENVIRONMENT, launcher
from small import config_of, parts, told

from sptnet.plan.live import LiveBytes
from sptnet.plan.pretend import pretended
from sptnet.strategy.connect import LaunchSettings

CHECKPOINTED = ["memory.gradient_checkpointing=full"]
MICRO = ["memory.micro_batches=2"]
PARTLY = ["model.train_from_block=-1"]
SIMGCD = ["method=simgcd", "prompts=null"]
WORKER = Path(__file__).parent / "small.py"
# strategy, processes, ranks that share a copy, precision, overrides
WORLDS = [
    ("single", 1, 1, "no", []),
    pytest.param("single", 1, 1, "bf16", PARTLY, marks=pytest.mark.slow),
    pytest.param("single", 1, 1, "no", [*CHECKPOINTED, *MICRO], marks=pytest.mark.slow),
    ("ddp", 2, 2, "no", PARTLY),
    pytest.param("ddp", 2, 2, "no", CHECKPOINTED, marks=pytest.mark.slow),
    pytest.param("ddp", 2, 2, "no", MICRO, marks=pytest.mark.slow),
    pytest.param("ddp", 4, 4, "no", [], marks=pytest.mark.slow),
    ("fsdp2", 2, 2, "no", []),
    pytest.param("fsdp2", 2, 2, "bf16", PARTLY, marks=pytest.mark.slow),
    pytest.param("fsdp2", 2, 2, "no", [*CHECKPOINTED, *MICRO], marks=pytest.mark.slow),
    pytest.param("fsdp2", 4, 4, "no", PARTLY, marks=pytest.mark.slow),
    pytest.param("hsdp", 4, 2, "no", [], marks=pytest.mark.slow),
    pytest.param("hsdp", 4, 2, "no", CHECKPOINTED, marks=pytest.mark.slow),
]


def planned(strategy, world, shard, precision, overrides):
    config = config_of(overrides)
    model, prompt, schedule = parts(config)
    prompt = None if prompt is None else prompt.to("meta")
    launch = LaunchSettings(strategy, world, precision, shard)
    return told(pretended(config, model.to("meta"), prompt, schedule, launch))


def real(out, strategy, world, precision, overrides):
    command = [*launcher(strategy, world, precision), str(WORKER), str(out), strategy, precision, *overrides]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    assert found.pop("world") == world
    found.pop("seconds"), found.pop("wrapper")
    return found


@pytest.mark.parametrize(("strategy", "world", "shard", "precision", "overrides"), WORLDS)
def test_planned_bytes_are_those_of_a_real_run(strategy, world, shard, precision, overrides, tmp_path):
    plan = planned(strategy, world, shard, precision, overrides)
    found = real(tmp_path / "told.json", strategy, world, precision, overrides)
    assert plan.keys() == found.keys()
    for phase in plan:
        print(strategy, world, precision, overrides, phase, plan[phase]["peak"], found[phase]["peak"])
        print("   ", plan[phase]["bytes"], "\n   ", found[phase]["bytes"])
    for phase in plan:
        assert plan[phase]["peak"] == pytest.approx(found[phase]["peak"], rel=0.02)
        assert plan[phase]["flops"] == found[phase]["flops"]


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
