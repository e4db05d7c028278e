"""The same run under every strategy on 1 to 4 real processes over gloo, in a launcher's environment."""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import Counting
from forked import ran
from interrupted import finish, train_here
from launching import ENVIRONMENT, launcher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sptnet.data.storage.store import LocalStore
from sptnet.strategy.create import WRAPPERS

HERE = Path(__file__).parent
TINY = "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"
THRIFTY = ["memory.gradient_checkpointing=full", "memory.micro_batches=2"]
# the other block is frozen; at the others' rates its loss would grow, and with it what was rounded
LAST = ["model.train_from_block=-1", "optimizer.lr=0.002", "prompts.lr=0.02"]
SHARDED = [*LAST, "memory.frozen_blocks=sharded"]
COMPILED = ["compile=true"]
PAIRS = ["prompts.pair=views"]
# strategy, processes, loader workers, precision, overrides
WORLDS = {
    "one": ("single", 1, 0, "no", []), "one, thrifty": ("single", 1, 2, "no", THRIFTY),
    "ddp 2": ("ddp", 2, 0, "no", []), "ddp 2, thrifty": ("ddp", 2, 2, "no", THRIFTY),
    "ddp 3": ("ddp", 3, 0, "no", []), "ddp 4": ("ddp", 4, 0, "no", []),
    "fsdp2 2": ("fsdp2", 2, 0, "no", []), "fsdp2 2, thrifty": ("fsdp2", 2, 0, "no", THRIFTY),
    "fsdp2 4": ("fsdp2", 4, 0, "no", []), "hsdp 4": ("hsdp", 4, 0, "no", []),
    "zero1 2": ("zero1", 2, 0, "no", []), "zero2 2": ("zero2", 2, 0, "no", []),
    "zero2 2, thrifty": ("zero2", 2, 0, "no", THRIFTY), "zero2 4": ("zero2", 4, 0, "no", []),
    "zero3 2": ("zero3", 2, 0, "no", []), "zero3 2, thrifty": ("zero3", 2, 0, "no", THRIFTY),
    "one, bf16": ("single", 1, 0, "bf16", []), "ddp 2, bf16": ("ddp", 2, 0, "bf16", []),
    "fsdp2 2, bf16": ("fsdp2", 2, 0, "bf16", []), "zero2 2, bf16": ("zero2", 2, 0, "bf16", []),
    "zero3 2, bf16": ("zero3", 2, 0, "bf16", []),
    "one, fp16": ("single", 1, 0, "fp16", []), "fsdp2 2, fp16": ("fsdp2", 2, 0, "fp16", []),
    "zero2 2, fp16": ("zero2", 2, 0, "fp16", []), "zero3 2, fp16": ("zero3", 2, 0, "fp16", []),
    "one, frozen": ("single", 1, 0, "no", LAST), "one, frozen, thrifty": ("single", 1, 0, "no", [*LAST, *THRIFTY]),
    "ddp 2, frozen, thrifty": ("ddp", 2, 0, "no", [*LAST, *THRIFTY]),
    "fsdp2 2, frozen": ("fsdp2", 2, 0, "no", LAST), "fsdp2 2, sharded": ("fsdp2", 2, 0, "no", SHARDED),
    "fsdp2 2, sharded, thrifty": ("fsdp2", 2, 0, "no", [*SHARDED, *THRIFTY]),
    "hsdp 4, sharded": ("hsdp", 4, 0, "no", SHARDED),
    "zero2 2, frozen, thrifty": ("zero2", 2, 0, "no", [*LAST, *THRIFTY]),
    "zero3 2, frozen, thrifty": ("zero3", 2, 0, "no", [*LAST, *THRIFTY]),
    "fsdp2 2, sharded, bf16": ("fsdp2", 2, 0, "bf16", SHARDED),
    "fsdp2 2, sharded, fp16": ("fsdp2", 2, 0, "fp16", SHARDED),
    "one, compiled, thrifty": ("single", 1, 0, "no", [*COMPILED, *THRIFTY]),
    "ddp 2, compiled": ("ddp", 2, 0, "no", COMPILED), "fsdp2 2, compiled": ("fsdp2", 2, 0, "no", COMPILED),
    "zero2 2, compiled": ("zero2", 2, 0, "no", COMPILED),
    "one, pairs": ("single", 1, 0, "no", PAIRS), "ddp 2, pairs": ("ddp", 2, 0, "no", PAIRS),
    "fsdp2 2, pairs": ("fsdp2", 2, 0, "no", PAIRS), "zero2 2, pairs": ("zero2", 2, 0, "no", PAIRS),
}  # fmt: skip


def launch(
    arguments: list[str], processes: int, strategy: str = "ddp", **environment: str
) -> subprocess.CompletedProcess[str]:
    """By the launcher, as users do."""
    command, environment = launcher(strategy, processes), ENVIRONMENT | environment
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)


SLOW = set(WORLDS) - {
    "one",
    "one, thrifty",
    "ddp 2",
    "ddp 2, bf16",
    "zero3 2",
    "one, frozen",
    "one, frozen, thrifty",
    "fsdp2 2, sharded",
}


def worlds(*, half: bool) -> list:
    """Worlds but the first, those that `make test` leaves to `make test-all` marked so."""
    names = [name for name in WORLDS if name != "one" and name.endswith(("bf16", "fp16")) == half]
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def alone(world: str) -> str:
    """The world of one process that trains what this one does."""
    overrides = WORLDS[world][4]
    return "one, frozen" if LAST[0] in overrides else "one, pairs" if overrides == PAIRS else "one"


@pytest.fixture(scope="module")
def told(digits, tmp_path_factory):
    """`told(name)`: what a world told; every world runs once."""

    @cache
    def run(name: str) -> dict:
        strategy, processes, workers, precision, overrides = WORLDS[name]
        out = tmp_path_factory.mktemp("told") / "told.json"
        expected = [str(out), str(digits), strategy, str(processes), str(workers), precision, *overrides]
        compiled = out.with_name("compiled")
        world = ran([HERE / "worker.py", *expected], strategy, processes, precision, TORCH_EXTENSIONS_DIR=str(compiled))
        assert world.returncode == 0, world.stderr[-3000:]
        assert not compiled.exists()  # a user may have no C++ compiler
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize("world", worlds(half=False))
def test_forty_alternating_steps_give_the_same_losses(told, world):
    one, many = told(alone(world)), told(world)
    assert one["phases"].count("prompt") >= 12
    assert one["phases"].count("model") >= 12
    assert one["phases"] == many["phases"]
    assert one["uids"] == many["uids"]
    total = [np.array(run["losses"])[:, 0] for run in (one, many)]
    assert len(total[0]) == 40
    np.testing.assert_allclose(total[1], total[0], rtol=1e-5)
    assert np.ptp(total[0]) > 1e-2


@pytest.mark.parametrize("world", worlds(half=True))
def test_half_precision_stays_near_float32_under_every_strategy(told, world):
    """Within 5% at every one of 40 steps, 2% on average, and not by computing in float32 after all."""
    exact, rounded = (np.array(told(name)["losses"])[:, 0] for name in (alone(world), world))
    np.testing.assert_allclose(rounded, exact, rtol=0.05)
    assert np.abs(rounded / exact - 1).mean() < 0.02
    assert np.abs(rounded / exact - 1).max() > 2e-5  # float32 has at most half of it, whatever the world


@pytest.mark.parametrize("world", worlds(half=False))
def test_evaluation_counts_every_sample_once(told, world):
    one, many = told(alone(world)), told(world)
    assert many["results"]["unlabelled"]["samples"] == 1072
    assert many["results"]["test"]["samples"] == 359
    for protocol in ("unlabelled", "test"):
        assert many["predictions"][protocol][:2] == one["predictions"][protocol][:2]  # uid, target


@pytest.mark.parametrize("world", ["one", *worlds(half=False)])
def test_lost_and_doubled_samples_are_caught(told, world):
    lost, doubled = told(world)["faults"]
    assert "1 missing (uid" in lost
    assert "1 there more than once (uid" in doubled


# what the objective needs of a step, the same for any number of processes
OURS = {"allgather": 1, "reducescatter": 1, "allreduce": 1}
# and what the strategy adds: buckets of gradients, and weights where they are sharded
ADDED = {
    "ddp": {"prompt": {}, "model": {}},  # the one all-reduce is DDP's bucket: a fault is seen by all ranks
    "zero1": {"prompt": {}, "model": {"allreduce": 1, "allgather": 2}},
    "zero2": {"prompt": {}, "model": {"allreduce": 1, "allgather": 2}},
    # trained blocks and the head, the last block and the head once for both passes; what is frozen is whole ...
    "fsdp2": {"prompt": {"allgather": 4}, "model": {"allgather": 4, "reducescatter": 3}},
    "fsdp2, frozen": {"prompt": {"allgather": 2}, "model": {"allgather": 2, "reducescatter": 2}},
    # ... or gathered for the forward pass, and by the prompt phase for the backward pass
    "fsdp2, sharded": {"prompt": {"allgather": 4}, "model": {"allgather": 3, "reducescatter": 2}},
}


def _whole(kind: str, overrides: list[str]) -> str:
    """Of which world a world in pieces has the gradients."""
    return "fsdp2, sharded" if "memory.frozen_blocks=sharded" in overrides else kind


@pytest.mark.parametrize("world", ["one", *worlds(half=False)])
def test_a_step_has_few_collectives_and_asks_the_device_nothing(told, world):
    strategy, processes, _, _, overrides = WORLDS[world]
    kind = strategy + {tuple(LAST): ", frozen", tuple(SHARDED): ", sharded"}.get(tuple(overrides), "")
    for phase, cost in told(world)["costs"].items():
        # DeepSpeed's own look at the norm of the gradients, which stage 3 cannot do without
        own = {"aten.lift_fresh.default": 2, "aten._local_scalar_dense.default": 1}
        assert cost["reads"] == (own if strategy == "zero3" and phase == "model" else {})
        if processes == 1:
            assert cost["collectives"] == {}
        elif kind in ADDED and not (strategy in ("zero2", "fsdp2") and THRIFTY[0] in overrides):
            added = ADDED[kind][phase]
            assert cost["collectives"] == {name: n + added.get(name, 0) for name, n in OURS.items()}
        else:  # weights are gathered, and gradients reduced and scattered, block by block
            own = {"hsdp": 3, "zero3": 2, "zero2": 2}.get(strategy, 0) if phase == "model" else 0
            assert cost["collectives"]["allreduce"] <= OURS["allreduce"] + own
            if kind.startswith("fsdp2"):  # in pieces too gradients are reduced once
                scattered = OURS["reducescatter"] + ADDED[_whole(kind, overrides)][phase].get("reducescatter", 0)
                assert cost["collectives"]["reducescatter"] == scattered


@pytest.mark.parametrize("world", worlds(half=False))
def test_a_piece_goes_through_the_frozen_block_once_in_the_model_phase(told, world):
    strategy, *_, overrides = WORLDS[world]
    # DeepSpeed's stage 3 would trace the order of modules anew in every step
    thrifty, frozen = THRIFTY[0] in overrides, LAST[0] in overrides and strategy != "zero3"
    passes = {phase: cost["passes"] for phase, cost in told(world)["costs"].items()}
    assert passes == {"prompt": 4 if thrifty else 1, "model": 1 if not thrifty else 2 if frozen else 4}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu_steps_are_near_those_of_a_cpu_and_never_wait(told, digits, tmp_path, precision):
    """The whole worker on a GPU, where torch refuses what waits (`torch.cuda.set_sync_debug_mode`)."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None or subprocess.run([nvidia_smi, "--list-gpus"], capture_output=True).returncode:
        pytest.skip("needs a GPU of NVIDIA's")
    out = tmp_path / "told.json"
    arguments = [HERE / "worker.py", out, digits, "single", "1", "0", precision, "matmul_precision=highest"]
    command = [*launcher("single", 1, precision), *map(str, arguments)]
    world = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "0"})
    assert world.returncode == 0, world.stderr[-3000:]
    there = json.loads(out.read_text())
    assert there["device"] == "cuda"
    assert {phase: cost["reads"] for phase, cost in there["costs"].items()} == {"prompt": {}, "model": {}}
    here, losses = (np.array(run["losses"])[:, 0] for run in (told("one"), there))
    np.testing.assert_allclose(losses, here, rtol=1e-3 if precision == "no" else 0.05)


def test_counting_sees_what_makes_the_host_wait():
    with Counting() as counted:
        values = torch.arange(4)
        assert values[values > 1].sum().item() == 5
        torch.tensor([1.0])
        assert values.tolist() == [0, 1, 2, 3]
        values.cpu().numpy()
    assert len(counted.reads) == 6
    assert values.tolist() == [0, 1, 2, 3]  # as before


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A short SPTNet run on two processes, through the command that users call."""
    folder = tmp_path_factory.mktemp("run") / "sptnet"
    arguments = ["-m", "sptnet", "train", "configs/quickstart.yaml", f"run={folder}", f"data.root={digits}"]
    arguments += ["init=null", "schedule.epochs=2", "schedule.k=5", "evaluate.every=1", "checkpoint.every=12", TINY]
    launched = launch(arguments, 2)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "DistributedDataParallel" in launched.stderr
    return folder


def test_the_train_command_writes_every_step(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "phase" in line]
    assert [line["step"] for line in steps] == list(range(22))
    losses = {"total", "cls", "distill", "me_max", "info_nce", "sup_con"}
    assert losses | {"model_lr", "prompt_lr"} <= set(steps[0])
    assert all(line["images_per_s"] / 2 == pytest.approx(line["images_per_s_per_rank"], rel=1e-3) for line in steps)
    assert all(line["share_of_matmul_peak"] > 0 for line in steps)  # beyond 1 where the peak was taken on busy cores
    assert all(0 <= line["data_wait_s_per_step"] < 128 / line["images_per_s"] for line in steps)
    assert all(line["peak_memory_mb"] > 100 for line in steps)
    assert all(1 <= line["classes_used"] <= 10 for line in steps)
    assert steps[-1]["checkpoint_stall_s"] > 0
    assert [line["step"] for line in lines if "evaluation" in line] == [11, 22]


def test_tensorboard_is_told_the_same(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines() if "phase" in line]
    told = events.Scalars("total")
    assert [event.step for event in told] == [line["step"] for line in steps]
    np.testing.assert_allclose([event.value for event in told], [line["total"] for line in steps], rtol=1e-6)
    assert [event.step for event in events.Scalars("unlabelled/all")] == [10, 21]


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("single", 1),
        ("ddp", 3),
        ("fsdp2", 2),
        *(pytest.param(*world, marks=pytest.mark.slow) for world in (("ddp", 2), ("ddp", 4), ("zero3", 3))),
    ],
)
def test_eval_gives_the_identical_result_on_any_number_of_processes(trained, tmp_path, strategy, processes):
    metrics, predictions = json.loads((trained / "metrics.json").read_text()), np.load(trained / "predictions.npz")
    before = {name: predictions[name] for name in predictions.files}
    trained = Path(shutil.copytree(trained, tmp_path / "run"))
    for name in ("metrics.json", "predictions.npz"):
        (trained / name).unlink()
    world = ran(["-m", "sptnet", "eval", trained], strategy, processes)
    assert world.returncode == 0, world.stderr[-3000:]
    assert re.search(rf"{WRAPPERS[strategy]} on {processes} process(es)?\b", world.stderr), world.stderr
    assert json.loads((trained / "metrics.json").read_text()) == metrics
    after = np.load(trained / "predictions.npz")
    for name, values in before.items():
        assert np.array_equal(after[name], values), name


def test_a_finished_run_is_not_overwritten(trained, digits, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert train_here(trained, digits) != 0
    assert f"error: {trained} holds a finished run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_mistakes_are_one_line_on_several_processes(digits, tmp_path):
    arguments = ["-m", "sptnet", "train", "configs/quickstart.yaml", f"data.root={digits}", "init=null"]
    for mistakes, processes, strategy, told in (
        ([f"run={tmp_path}/r", "data.batch_size=40"], 3, "ddp", "data.batch_size 40 cannot be dealt to 3 processes"),
        (["run=/dev/null/run"], 2, "ddp", "/dev/null/run cannot be written: Not a directory"),
        ([], 2, "single", "asked for several processes by a configuration that starts one"),
    ):
        launched = launch([*arguments, *mistakes], processes, strategy)
        assert launched.returncode != 0
        (line,) = [line for line in launched.stderr.splitlines() if line.startswith("error")]
        assert told in line
        assert "Traceback" not in launched.stderr.split(line)[0]


def test_a_mistake_is_told_once_also_by_a_rank_0_that_comes_late(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    )
    arguments = ["-m", "sptnet", "train", "configs/quickstart.yaml", "seeed=1"]
    launched = launch(arguments, 2, PYTHONPATH=str(tmp_path))
    assert launched.returncode != 0
    told = [line for line in launched.stderr.splitlines() if line.startswith("error")]
    assert told == ["error: override 'seeed=1': seeed is not a known key: did you mean seed?"]


def test_tolerated_damage_is_counted_over_all_ranks_and_limited(digits, tmp_path):
    root = Path(shutil.copytree(digits, tmp_path / "damaged"))
    store = LocalStore(root)
    shard = store.manifest.of_kind("labelled")[3]
    for _, _, offset, size in store.entries(shard)[:5].tolist():
        with open(root / shard.file, "r+b") as tar:
            tar.seek(offset)
            tar.write(bytes(size))
    arguments = ["-m", "sptnet", "train", "configs/quickstart_simgcd.yaml", f"data.root={root}"]
    arguments += ["schedule.epochs=4", "evaluate.every=4", "log_every=1", TINY]
    world = ran([*arguments, f"run={tmp_path / 'run'}", "data.tolerate_bad_samples=12"], "ddp", 2)
    assert world.returncode != 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["bad_samples"] for line in lines if "phase" in line]
    told = [line for line in world.stderr.splitlines() if "replaced a sample" in line and "does not decode" in line]
    assert counts == sorted(counts)
    assert 5 <= counts[-1] <= 12
    assert {line.partition(", step")[0][-6:] for line in told} == {"rank 0", "rank 1"}
    errors = [line for line in world.stderr.splitlines() if line.startswith("error")]
    for line in errors:  # one, where the other rank is ended first
        # what a rank replaced is told when it is met, and counted when all have taken the step
        counted = [line for line in told if int(re.search(r"step (\d+)", line)[1]) <= len(counts)]
        limit = f"{len(counted)} damaged samples by step {len(counts)}, more than data.tolerate_bad_samples = 12"
        assert re.match(rf"error( \(rank \d\))?: rank \d: {limit}", line), line
    assert len(errors) in (1, 2)


def test_one_process_under_ddp_is_what_a_machine_with_one_gpu_gets(digits, tmp_path):
    told = finish(tmp_path / "run", digits, "ddp", 1, "schedule.epochs=1")
    assert "ddp (DistributedDataParallel), 1 x cpu" in (tmp_path / "run" / "log.txt").read_text()
    assert "step 22: test All/Old/New" in told


def test_a_gpu_that_should_be_there_is_an_error_on_all_ranks(digits, tmp_path):
    arguments = ["configs/quickstart.yaml", f"run={tmp_path}/r", f"data.root={digits}", "init=null"]
    world = ran(["-m", "sptnet", "train", *arguments], "ddp", 2, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="99")
    told = [line for line in world.stderr.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "there should be a GPU on" in told[0]
    assert "SLURM_GPUS_ON_NODE=2" in told[0]
