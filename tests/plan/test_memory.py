"""What is planned with fake tensors on pretended ranks is what real runs hold, counted the same way."""

import json
import subprocess
from pathlib import Path

import pytest
from launching import ENVIRONMENT, launcher
from small import config_of, parts, told

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
