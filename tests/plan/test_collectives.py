"""How often FSDP2 gathers weights, and how many bytes, counted on pretended ranks."""

from collections import Counter

import pytest
from small import config_of, parts

from sptnet.plan.fake_ranks import on_fake_ranks
from sptnet.strategy.launcher import LaunchSettings

DEPTH, TRAINED, RANKS = 4, 2, 16  # of small.py: as many blocks, the last two of them trained
OWN = {"allgather": 1, "reducescatter": 1}  # the objective's


def counted(frozen_blocks, precision):
    """Calls and bytes of gathers and of reduce-scatters, by phase."""
    config = config_of(["model.train_from_block=-2", f"memory.frozen_blocks={frozen_blocks}"])
    model, prompt, schedule = parts(config)
    launch = LaunchSettings("fsdp2", RANKS, precision, RANKS)
    found = on_fake_ranks(config, model.to("meta"), prompt.to("meta"), schedule, launch)
    calls, sent = {}, {}
    for phase in ("prompt", "model"):
        calls[phase], sent[phase] = found[phase].work.calls, Counter()
        for collective, count in found[phase].work.collectives.items():
            sent[phase][collective.name] += count * collective.bytes
    return calls, sent


@pytest.mark.parametrize("frozen_blocks", ["whole", "sharded", "auto"])
def test_a_step_gathers_what_it_needs_once(frozen_blocks):
    """Trained blocks and the head for every pass, the last block and the head once for both; frozen ones where they are
    sharded, and by the model phase not for a backward pass that never comes to them.
    """
    calls, _ = counted(frozen_blocks, "no")
    frozen = DEPTH - TRAINED if frozen_blocks == "sharded" else 0
    gathers = {"prompt": 2 * (DEPTH - 1 if frozen else TRAINED - 1) + 2, "model": frozen + 2 * (TRAINED - 1) + 2}
    for phase, expected in gathers.items():
        assert calls[phase]["allgather"] == expected + OWN["allgather"]
    assert calls["prompt"]["reducescatter"] == OWN["reducescatter"]
    assert calls["model"]["reducescatter"] == TRAINED + 1 + OWN["reducescatter"]


def test_copies_of_hsdp_are_a_shard_apart():
    """4 copies of shards over 2: gathers within a copy, sums of gradients between copies."""
    config = config_of(["model.train_from_block=-2"])
    model, prompt, schedule = parts(config)
    launch = LaunchSettings("hsdp", 8, "no", 2)
    found = on_fake_ranks(config, model.to("meta"), prompt.to("meta"), schedule, launch)["model"].work.collectives
    groups = {(call.name, call.ranks, call.apart) for call in found if call.ranks < 8}
    assert groups == {("allgather", 2, 1), ("reducescatter", 2, 1), ("allreduce", 4, 2)}


def test_frozen_weights_travel_in_the_dtype_of_the_computation_and_the_rest_in_float32():
    sent = {precision: counted("sharded", precision)[1] for precision in ("no", "bf16")}
    whole = counted("whole", "bf16")[1]
    for phase, passes in (("prompt", 2), ("model", 1)):
        frozen = {precision: sent[precision][phase]["allgather"] - whole[phase]["allgather"] for precision in sent}
        assert frozen["no"] == 4 * passes * (DEPTH - TRAINED) * 12 * 96 * 96
        assert frozen["bf16"] == frozen["no"] // 2
        assert sent["no"][phase]["reducescatter"] == sent["bf16"][phase]["reducescatter"]
