"""A run's folder in the place of a configuration: what it measured beside what is planned for it, as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sptnet.cli import main
from sptnet.plan.comparison import Comparison, compare, verdict
from sptnet.plan.dataset import Counts
from sptnet.plan.hardware import GPUS, PlanError
from sptnet.plan.measured_run import read_run
from sptnet.plan.planned import Cluster
from sptnet.plan.planning import plan_run
from sptnet.plan.seconds import Network

START = {"step": 0, "strategy": {"strategy": "ddp", "world_size": 2, "precision": "bf16", "shard_size": 2},
         "nodes": {"one": 2}, "device": "NVIDIA H100 80GB HBM3"}  # fmt: skip
TOLD = {"images_per_s": 640.0, "data_wait_s_per_step": 0.01, "peak_memory_mb": 2000.0, "share_of_matmul_peak": 0.2}


def write(folder, starts=(START,), records=()):
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def records(*speeds, phases=("prompt", "model")):
    """A write of two steps for every speed, of one phase after the other."""
    return [
        TOLD | {"step": 2 * i + j, "phase": phases[i % len(phases)], "images_per_s": float(speed)}
        for i, speed in enumerate(speeds)
        for j in range(2)
    ]


@pytest.fixture
def run(untrained, tmp_path):
    return Path(shutil.copytree(untrained, tmp_path / "run"))


def test_a_run_is_read_as_it_last_was(run):
    later = START | {"step": 8, "strategy": START["strategy"] | {"world_size": 4}, "nodes": {"a": 2, "b": 2}}
    write(run, [START, later], records(1, 1, 1, 1, 100, 640, 320, 64, 320))
    ran = read_run(run)
    assert (ran.strategy, ran.nodes, ran.gpus, ran.precision, ran.on_cpu) == ("ddp", 2, 2, "bf16", False)
    # of what came after the second start, and not the first write, which has the start in it
    assert [(told.phase, told.seconds) for told in ran.told] == [
        ("model", 0.2), ("prompt", 0.4), ("model", 2.0), ("prompt", 0.4),
    ]  # fmt: skip
    assert ran.memory == 2e9


def test_whether_it_told_of_steps_after_an_evaluation(run):
    step, evaluation = (records(1)[0] | {"step": 7}), {"step": 6, "evaluation": {}}
    for order, evaluated in (([evaluation, step], True), ([step, evaluation], False), ([step], False)):
        write(run, records=[*records(1), *order])
        assert read_run(run).evaluated is evaluated
    write(run, starts=[START | {"step": 7}], records=[*records(1), evaluation, step])
    assert not read_run(run).evaluated  # it was before the last start


def test_a_write_of_both_phases_tells_of_neither(run):
    mixed = [TOLD | {"step": step, "phase": ("prompt", "model")[step % 2], "images_per_s": 9.0} for step in range(4)]
    write(run, records=[*records(5.0), *mixed])
    assert read_run(run).told == []


def test_copies_and_shards_are_the_nodes_and_gpus_of_hsdp(run):
    hybrid = {"strategy": "hsdp", "world_size": 8, "precision": "no", "shard_size": 2}
    write(run, [START | {"strategy": hybrid, "nodes": {"one": 8}}], records(1, 2))
    ran = read_run(run)
    assert (ran.nodes, ran.gpus) == (4, 2)


def test_a_device_that_starts_do_not_name_is_in_the_log(run):
    write(run, [{key: value for key, value in START.items() if key != "device"}], records(1, 2))
    assert read_run(run).device is None
    (run / "log.txt").write_text("12:00:00 strategy: ddp (DistributedDataParallel), 2 x cpu\n12:00:01 step 1/9\n")
    assert read_run(run).on_cpu


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is a folder, and no run's"),
        (lambda run: (run / "config.yaml").write_bytes(b"\x80"), "is not a run"),
        (lambda run: (run / "starts.jsonl").unlink(), "does not say what it ran on"),
        (lambda run: (run / "starts.jsonl").write_bytes(bytes(100)), "does not say what it ran on"),
        (lambda run: (run / "starts.jsonl").write_text('{"step": 0}\n'), "is damaged: strategy"),
        (lambda run: write(run, [START | {"nodes": {"one": -1}}]), "is damaged: nodes.one"),
        (lambda run: write(run, [START | {"strategy": START["strategy"] | {"world_size": 10**9}}]), "world_size"),
        (lambda run: write(run, [START | {"strategy": START["strategy"] | {"strategy": "zero9"}}]), "damaged"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has told of no step"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00{" * 99), "has told of no step"),
        (lambda run: write(run, [START | {"step": 99}], records(1, 2)), "has told of no step"),
        (lambda run: write(run, records=[TOLD | {"step": 0, "phase": "model", "images_per_s": 0}]), "told of no step"),
    ],
)  # fmt: skip
def test_a_damaged_or_unfinished_run_is_one_line(break_it, told, run, capsys):
    write(run, records=records(1, 2, 3))
    break_it(run)
    assert main(["plan", str(run)]) in (1, 2)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", [["--calibrate"], ["--nodes", "2"], ["--strategy", "ddp"], ["--price", "2"]])
def test_options_of_a_cluster_are_refused_for_a_run(option, run, capsys):
    write(run, records=records(1, 2, 3))
    assert main(["plan", str(run), *option]) == 2
    assert f"error: {option[0]} goes with a configuration: a run's folder is planned as" in capsys.readouterr().err


@pytest.fixture(scope="module")
def planned(untrained, tmp_path_factory):
    """A plan of a run of two ranks, and the run."""
    folder = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("ran") / "run"))
    write(folder, records=records(1, 640, 320, 640, 320))
    ran = read_run(folder)
    cluster = Cluster(ran.nodes, ran.gpus, GPUS["h100"], ran.precision, Network(ran.gpus))
    return plan_run(ran.config, Counts(400, 1000, 300, 5, 10, "as told"), cluster, [ran.strategy], largest=False), ran


def test_what_a_gpu_measured_stands_beside_the_plan(planned):
    plan, ran = planned
    rows = {row.what: row for row in compare(plan, ran)}
    assert rows["memory at the peak"].measured == 2.0
    # a run that has not evaluated yet has not had an evaluation's memory
    assert rows["memory at the peak"].planned == plan.lines[0].peak_of_steps / 1e9
    assert compare(plan, replace(ran, evaluated=True))[0].planned == plan.lines[0].peak / 1e9
    assert rows["memory at the peak"].broken
    assert rows["prompt step"].measured == pytest.approx(1e3 * 128 / 320)
    assert rows["model step"].measured == pytest.approx(1e3 * 128 / 640)
    assert rows["model step"].planned == pytest.approx(1e3 * plan.lines[0].seconds["model"].total)
    assert rows["model step, share of the matmul peak"].measured == 20
    assert rows["model step, collectives"].measured is None
    assert "does not count" in rows["model step, collectives"].note
    assert verdict(rows.values()).startswith("the plan is off by more than it promises: memory at the peak (-")


def test_memory_of_a_cpu_is_said_to_be_the_process(planned):
    plan, ran = planned
    row = compare(plan, replace(ran, device="cpu"))[0]
    assert (row.measured, row.broken) == (None, False)
    assert "its process only: 2.00 GB" in row.note


def test_a_plan_that_holds_says_so():
    rows = [Comparison("memory", "GB", 1.01, 1.0, 0.02), Comparison("step", "ms", 90.0, 100.0, 0.11)]
    assert verdict(rows) == "the plan kept its promise on: memory, step"
    assert verdict([Comparison("memory", "GB", 1.0, None, 0.02)]).startswith("the run recorded nothing")
    assert verdict([rows[0], rows[1]._replace(promised=0.05)]).endswith("promises: step (-10%, 5% promised)")


def test_of_a_run_that_trained_the_command_shows_all(untrained, tmp_path, capsys):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    alone = {"strategy": "single", "world_size": 1, "precision": "no", "shard_size": 1}
    write(run, [START | {"strategy": alone, "nodes": {"one": 1}, "device": "cpu"}], records(1, 640, 320))
    assert main(["plan", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in told["rows"]][:2] == ["memory at the peak", "prompt step"]
    assert (
        told["verdict"] == "the run recorded nothing that the plan promises anything about"
    )  # not calibrated, on a CPU


def test_no_folder_of_a_run(tmp_path):
    with pytest.raises(PlanError, match=r"there is no config\.yaml in it"):
        read_run(tmp_path)
