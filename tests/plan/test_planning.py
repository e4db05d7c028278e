"""The plan as a user gets it: numbers that follow from the configuration, and one line where it cannot be."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sptnet.cli import main
from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.method.schedule import Schedule
from sptnet.plan import largest
from sptnet.plan.comparison import compare
from sptnet.plan.dataset import Counts, counts_of
from sptnet.plan.hardware import BETWEEN_NODES, GPUS, LATENCY, LATENCY_BETWEEN, PlanError
from sptnet.plan.measured_run import MeasuredRun
from sptnet.plan.planned import Cluster, Plan, steps_of
from sptnet.plan.planning import plan_run
from sptnet.plan.seconds import Network, Seconds, seconds_of
from sptnet.plan.work import Collective, Kernel, Work

SMALL = ["model.backbone_options={patch_size: 6, embed_dim: 96, depth: 2, num_heads: 3}", "init=null"]
COUNTS = Counts(400, 1000, 300, 5, 10, "as told")
H100 = GPUS["h100"]


def cluster(memory=H100.memory, nodes=1, gpus=2):
    return Cluster(nodes, gpus, replace(H100, memory=memory), "bf16", Network(gpus))


@pytest.fixture(scope="module")
def plan():
    return plan_run(load_config("quickstart", SMALL), COUNTS, cluster(), ["ddp", "zero2"], largest=False)


def test_a_plan_has_the_steps_that_the_schedule_has(plan):
    schedule = plan.schedule
    assert plan.steps == {
        phase: sum(schedule.phase(step) == phase for step in range(schedule.total_steps)) for phase in plan.steps
    }
    assert sum(plan.steps.values()) == schedule.total_steps == 15 * (1400 // 128)


@pytest.mark.parametrize("shape", ["alternating", "reference", "model_only"])
def test_steps_are_counted_by_phase(shape):
    schedule = Schedule(7, 53, phase_schedule=shape, k=6)
    counted = steps_of(schedule)
    assert steps_of(Schedule(10**9, 10**9, phase_schedule=shape, k=6))["model"] > 10**17  # in no time
    for phase in counted:
        assert counted[phase] == sum(schedule.phase(step) == phase for step in range(schedule.total_steps))
    assert sum(counted.values()) == schedule.total_steps


def test_hours_and_gpu_hours_follow_from_the_steps(plan):
    line = plan.lines[0]
    seconds = sum(count * line.seconds[phase].total for phase, count in plan.steps.items())
    assert line.hours == pytest.approx((seconds + line.seconds["evaluation"].total) / 3600)  # 15 epochs, every 15


def test_hours_of_a_run_from_kept_tokens_have_their_making():
    """Every view goes through the trunk once, and so does the last evaluation; those on the way read what is kept."""
    options = ["model.train_from_block=-1", "data.views=4", "method=simgcd", "evaluate.every=1"]
    config = load_config("quickstart_simgcd", [*SMALL, *options])
    kept = plan_run(config, COUNTS, cluster(), ["ddp"], largest=False)
    line = kept.lines[0]
    seconds = sum(count * line.seconds[phase].total for phase, count in kept.steps.items())
    through = 2 + 4 * (400 + 1000) / (1000 + 300)
    assert line.hours == pytest.approx((seconds + through * line.seconds["evaluation"].total) / 3600)


def test_tokens_that_a_run_would_not_keep_are_not_planned_with():
    options = [*SMALL, "model.train_from_block=-1", "data.views=4", "method=simgcd"]

    def planned(*more: str) -> Plan:
        return plan_run(load_config("quickstart_simgcd", [*options, *more]), COUNTS, cluster(), ["ddp"], largest=False)

    kept = planned()
    loader = kept.lines[0].seconds["model"].loader
    assert kept.stored.cache
    assert 0 < loader < planned("trunk_cache=off").lines[0].seconds["model"].loader  # read and checked, not decoded
    room = 0.999 * kept.stored.cache / 1e9
    through = planned(f"trunk_cache_gb={room}")
    assert through.stored.cache is None
    assert "trunk_cache_gb is" in through.stored.not_kept
    assert through.lines[0].hours == planned("trunk_cache=off").lines[0].hours
    with pytest.raises(ConfigError, match="choose another disk, or trunk_cache: off"):
        planned("trunk_cache=/kept", f"trunk_cache_gb={room}")


def test_the_share_of_the_peak_counts_no_work_twice():
    plain, again = (
        plan_run(load_config("quickstart", [*SMALL, f"memory.gradient_checkpointing={spec}"]), COUNTS,
                 cluster(), ["ddp"], largest=False)
        for spec in ("none", "full")
    )  # fmt: skip
    assert again.lines[0].counted["prompt"].work.flops > 1.2 * plain.lines[0].counted["prompt"].work.flops
    assert again.work == plain.work
    assert plain.lines[0].counted["prompt"].work.flops == pytest.approx(plain.work["prompt"], rel=0.05)
    ran = MeasuredRun(Path("run"), again.config, "ddp", 1, 2, "bf16", "cuda", [], 0.0, False)
    share = {row.what: row for row in compare(again, ran)}["prompt step, share of the matmul peak"].planned
    seconds, peak = again.lines[0].seconds["prompt"].total, H100.matmul[torch.bfloat16]
    assert share == pytest.approx(100 * again.work["prompt"] / seconds / peak)


def test_a_step_is_bound_by_what_takes_most_of_it():
    assert Seconds(3, 3, 4, 0, 0).bound == "matmul"
    assert Seconds(2, 3, 4, 0, 0).bound == "memory"
    assert Seconds(2, 1, 4, 0, 0).bound == "host"
    assert Seconds(2, 1, 4, 5, 0).bound == "loader"
    assert Seconds(2, 1, 1, 1, 4).bound == "network"


def test_a_checkpoint_has_what_is_trained_and_its_momentum(plan):
    assert plan.stored.checkpoint == 4 * (3 * plan.size.trained + 2 * plan.size.prompt)  # AdamW keeps two


@pytest.mark.slow
def test_the_largest_batch_fits_and_a_tenth_more_does_not(plan):
    room = cluster(memory=200 * 2**20)
    line = plan_run(plan.config, COUNTS, room, ["ddp"]).lines[0]
    assert line.largest % room.ranks == 0

    def peak(batch, *settings):
        batch = int(batch) // 8 * 8  # two ranks, four streams of two kinds
        config = load_config("quickstart", [*SMALL, f"data.batch_size={batch}", *settings])
        return plan_run(config, replace(COUNTS, unlabelled=10**6), room, ["ddp"], largest=False).lines[0].peak

    assert peak(line.largest) <= room.usable < peak(1.1 * line.largest)
    full = "memory.gradient_checkpointing=full"
    assert peak(line.largest_checkpointed, full) <= room.usable < peak(1.1 * line.largest_checkpointed, full)


@pytest.mark.parametrize(
    ("mb", "way"),
    [
        (21.3, "it fits with memory.gradient_checkpointing=full: planned"),
        pytest.param(
            17,
            "evaluate.batch_size=128 memory.gradient_checkpointing=full memory.micro_batches=2:",
            marks=pytest.mark.slow,
        ),
        (6, "take a smaller model.backbone"),
    ],
)
def test_what_does_not_fit_is_one_line_with_a_way_out_that_fits(plan, mb, way):
    room = cluster(memory=int(mb * 10**6))
    best, why = plan_run(plan.config, COUNTS, room, ["ddp"], largest=False).recommended
    assert best is None
    assert why.startswith("does not fit: ddp takes least")
    assert "\n" not in why
    assert way in why
    if "it fits with " in why:
        settings = why.partition("it fits with ")[2].partition(":")[0].split()
        config = load_config("quickstart", [*SMALL, *settings])
        assert plan_run(config, COUNTS, room, ["ddp"], largest=False).recommended[0] is not None


def test_the_simplest_is_recommended_where_nothing_is_faster(plan):
    assert plan.recommended[0].strategy == "ddp"


@pytest.mark.parametrize(("memory", "placed"), [(H100.memory, "whole"), (2**20, "sharded")])
def test_frozen_blocks_lie_where_the_planned_machine_has_room_for_them(monkeypatch, memory, placed):
    class Seen(Exception):
        pass

    def pretending(config, *_, **__):
        raise Seen(config.memory.frozen_blocks)

    monkeypatch.setattr("sptnet.plan.planning.pretending", pretending)
    config = load_config("quickstart", [*SMALL, "model.train_from_block=-1"])
    with pytest.raises(Seen, match=placed):
        plan_run(config, COUNTS, cluster(memory), ["fsdp2"], largest=False)


def test_a_step_waits_for_the_slowest():
    work = Work()
    work.kernels[Kernel(next(iter(H100.matmul)), 10**15, 0)] = 1
    assert seconds_of(work, H100, Network(8), 0, 1).bound == "matmul"
    assert seconds_of(work, H100, Network(8), 60.0, 1).bound == "loader"
    assert seconds_of(work, H100, Network(8), 60.0, 1000).bound == "matmul"
    within, between = Work(), Work()
    within.collectives[Collective("allreduce", 10**9, 8)] = between.collectives[Collective("allreduce", 10**9, 16)] = 1
    assert seconds_of(within, H100, Network(8), 0, 1).network < seconds_of(between, H100, Network(8), 0, 1).network
    apart = Work()
    apart.collectives[Collective("allreduce", 10**9, 2, 8)] = 1  # of HSDP's copies, each on a node of its own
    assert seconds_of(apart, H100, Network(8), 0, 1).network == pytest.approx(LATENCY_BETWEEN + 1e9 / BETWEEN_NODES)
    # of a card whose collectives nobody has measured, those between nodes are planned all the same
    assert seconds_of(between, GPUS["a100-pcie"], Network(8, 10e9), 0, 1).network > 0.18


def test_seconds_by_hand():
    """2 x 8 H100: matmul and memory rates, launches, and a ring, from the sources that hardware.py names."""
    work = Work()
    work.kernels[Kernel(torch.bfloat16, 794_500_000_000, 0)] = 2
    work.kernels[Kernel(torch.float32, 0, 3_350_000_000)] = 3
    work.collectives[Collective("allreduce", 10**9, 8)] = 1
    found = seconds_of(work, H100, Network(8), 0.5, 2)
    assert found[:4] == pytest.approx((0.002, 0.003, 5 * H100.launch, 0.25))
    assert found.network == pytest.approx(LATENCY + 2 * 1e9 * 7 / 8 / 480e9)
    assert found.total == pytest.approx(0.25 + found.network)  # the loader is slower than the kernels
    assert seconds_of(work, H100, Network(8), 0, 1).total == pytest.approx(0.005 + found.network)
    work.collectives = Counter({Collective("allreduce", 10**9, 16): 1})
    assert seconds_of(work, H100, Network(8), 0, 1).network == pytest.approx(LATENCY_BETWEEN + 2e9 * 15 / 16 / 25e9)


def test_images_are_those_of_the_manifest(digits):
    counts = counts_of(load_config("quickstart", [f"data.root={digits}"]), None, None)
    assert counts.labelled + counts.unlabelled + counts.test == 1797
    assert counts.bytes == sum(path.stat().st_size for path in digits.glob("*.tar"))


def test_images_that_nobody_knows_are_a_line_that_says_how_to_tell_them():
    with pytest.raises(PlanError, match=r"--images LABELLED,UNLABELLED,TEST --classes OLD,NEW"):
        counts_of(load_config("quickstart", ["data.root=nowhere"]), None, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "abacus"], "known are h100, h200"),
        (["--precision", "no"], "no measured matmul rate of float32"),
        (["--gpus", "3"], "cannot be dealt to 1 x 3 = 3 ranks"),
        (["--strategy", "zero9"], "use all, single, ddp"),
        (["--images", "1,2"], "3 numbers"),
        (["--images", "1,2,3"], "go together"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, capsys):
    assert main(["plan", "cub", *SMALL[1:], *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_json_has_what_the_table_has(digits, capsys, monkeypatch):
    monkeypatch.setattr(largest, "TRIED", 512)  # a small model's largest batch takes a minute
    command = ["plan", "quickstart", *SMALL, f"data.root={digits}", "--gpus", "2", "--strategy", "ddp"]
    assert main([*command, "--json", "--price", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    line = facts["strategies"]["ddp"]
    assert facts["recommended"] == "ddp"
    assert line["gpu_hours"] == pytest.approx(2 * line["hours"])
    assert line["cost"] == pytest.approx(2 * line["gpu_hours"])
    assert line["kwh_at_most"] == pytest.approx(line["gpu_hours"] * H100.watts / 1000)
    assert line["phases"]["model"]["collectives"] >= 3  # the objective's two, and DDP's
    assert main([*command, "--price", "2"]) == 0
    table = capsys.readouterr().out
    assert "planned, not measured" in table
    assert re.search(rf"ddp +│.*│ +{line['cost']:.2f} │", table), table
    assert main([*command, "--line"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_what_is_simple_is_taken_unless_another_is_faster(plan):
    ddp = next(line for line in plan.lines if line.strategy == "ddp")
    told = {}
    for name, others in {"slower": (9.6,), "faster": (9.0,), "fastest": (9.0, 8.7), "both": (9.4, 8.0)}.items():
        lines = [replace(ddp, hours=10.0)]
        lines += [replace(ddp, strategy=s, hours=h) for s, h in zip(("zero2", "zero3"), others, strict=False)]
        told[name] = replace(plan, lines=lines).recommended[0].strategy
    assert told == {"slower": "ddp", "faster": "zero2", "fastest": "zero2", "both": "zero3"}


def test_where_nothing_fits_the_exit_code_says_so(digits, capsys, monkeypatch):
    command = ["plan", "quickstart", *SMALL, f"data.root={digits}", "--gpus", "2", "--strategy", "ddp", "--line"]
    assert main(command) == 0
    monkeypatch.setitem(GPUS, "h100", replace(H100, memory=10**6))
    assert main(command) == 1


def test_evaluations_take_their_time(digits, capsys, monkeypatch):
    """Fourteen more of them, by their seconds; on twice the ranks each has half of the passes."""
    hours = {}
    for every in (1, 15):
        for gpus in (1, 2):
            asked = ["plan", "quickstart", *SMALL, f"data.root={digits}", f"evaluate.every={every}", "--json"]
            monkeypatch.setattr(largest, "TRIED", 512)
            assert main([*asked, "--gpus", str(gpus), "--strategy", "single" if gpus == 1 else "ddp"]) == 0
            facts = json.loads(capsys.readouterr().out)
            hours[every, gpus] = next(iter(facts["strategies"].values()))["hours"], facts["evaluations"]
    assert hours[1, 1][1] - hours[15, 1][1] == 14
    one, two = (3600 * (hours[1, gpus][0] - hours[15, gpus][0]) / 14 for gpus in (1, 2))
    assert one > 0
    assert 0.4 * one < two < 0.9 * one


def test_phases_of_one_step_are_planned(capsys):
    """The steps before the one that is counted ran into the other phase, which has another number of views."""
    command = ["plan", "quickstart", *SMALL, "schedule.k=1", "--images", "400,1000,300", "--classes", "5,10"]
    assert main([*command, "--gpus", "2", "--strategy", "ddp", "--line"]) == 0
    assert "planned, not measured: sptnet" in capsys.readouterr().out
