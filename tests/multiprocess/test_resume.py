"""Interrupted runs: killed or asked to stop, continued under the same or another strategy and world size."""

import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from interrupted import (
    command,
    finish,
    killed_at,
    last_step,
    launched,
    start,
    steps_of,
    train_here,
    until_checkpoint,
)
from launching import ENVIRONMENT, ROOT
from safetensors.torch import load_file

from sptnet.run.checkpoint import checkpoints, read_facts

SLOW = pytest.mark.slow
THREE = ["data.batch_size=48", "schedule.epochs=1"]


class Wholes(dict):
    """Uninterrupted runs by strategy, made when they are asked for: `single` on this process, others on two."""

    def __init__(self, data, folder):
        super().__init__()
        self.data, self.folder = data, folder

    def __missing__(self, strategy):
        run = self.folder / strategy
        if strategy == "single":
            assert train_here(run, self.data) == 0
        else:
            finish(run, self.data, strategy, 2)
        self[strategy] = run
        return run


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    return Wholes(digits, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [("ddp", 2), *(pytest.param(*world, marks=SLOW) for world in (("single", 1), ("fsdp2", 2), ("zero3", 2)))],
)
def test_killed_at_any_moment_and_continued_it_is_bit_for_bit_the_same(whole, digits, tmp_path, strategy, processes):
    run = tmp_path / "run"
    moments = random.Random(processes)
    for step in (3, 9, 15):
        # somewhere in the steps after it, or while it writes the next
        killed_at(step + moments.randrange(6), run, digits, strategy, processes, pause=moments.uniform(0, 0.2))
    told = finish(run, digits, strategy, processes)
    assert "continues from" in told
    assert np.array_equal(steps_of(run), steps_of(whole[strategy]))
    assert (run / "model.safetensors").read_bytes() == (whole[strategy] / "model.safetensors").read_bytes()
    assert json.loads((run / "metrics.json").read_text()) == json.loads((whole[strategy] / "metrics.json").read_text())


def test_three_that_are_interrupted_add_up_as_three_that_are_not(digits, tmp_path):
    """DDP makes its buckets anew behind the first step of a process, and of three numbers the order decides the sum."""
    finish(tmp_path / "whole", digits, "ddp", 3, *THREE)
    killed_at(7, tmp_path / "run", digits, "ddp", 3, *THREE)
    finish(tmp_path / "run", digits, "ddp", 3, *THREE)
    assert np.array_equal(*(steps_of(tmp_path / name, 1438 // 48) for name in ("run", "whole")))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@SLOW
@pytest.mark.parametrize(("strategy", "processes"), [("single fp16", 1), ("fsdp2 fp16", 2), ("zero2 fp16", 2)])
def test_a_loss_scale_is_kept_over_an_interruption(digits, tmp_path, strategy, processes):
    finish(tmp_path / "whole", digits, strategy, processes, "optimizer.name=sgd", "schedule.epochs=1")
    run = tmp_path / "run"
    killed_at(9, run, digits, strategy, processes, "optimizer.name=sgd", "schedule.epochs=1")
    finish(run, digits, strategy, processes, "optimizer.name=sgd", "schedule.epochs=1")
    continued, at_once = (read_facts(checkpoints(folder)[-1]).counters for folder in (run, tmp_path / "whole"))
    assert continued == at_once  # the scale, and for how many steps it has been that
    assert at_once["steps_at_scale"] > 9
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# ZeRO-2 continues FSDP2, FSDP2 ZeRO-2, and DDP that: make test-all has every strategy, make soak every pair
FEW, ALL = (
    [("fsdp2", 2), ("zero2", 2), ("fsdp2", 2)],
    [("zero2", 2), ("fsdp2", 2), ("zero3", 2), ("single", 1), ("zero1", 2), ("hsdp", 4), ("ddp", 4)],
)


@pytest.mark.parametrize("legs", [FEW, pytest.param(ALL, marks=SLOW)], ids=["few", "all"])
def test_one_run_continued_under_other_strategies(whole, digits, tmp_path, legs):
    run = tmp_path / "run"
    for strategy, processes in legs:
        killed_at(last_step(run) + 1, run, digits, strategy, processes)
    assert train_here(run, digits) == 0
    np.testing.assert_allclose(steps_of(run)[:, 0], steps_of(whole["single"])[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [
        ("zero3", 2),
        *(pytest.param(*world, marks=SLOW) for world in (("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2))),
    ],
)
def test_a_run_of_every_strategy_ends_with_the_whole_model(digits, tmp_path, strategy, processes):
    finish(tmp_path / "run", digits, strategy, processes, "schedule.epochs=1", "optimizer.name=sgd")
    assert train_here(tmp_path / "plain", digits, "schedule.epochs=1", "optimizer.name=sgd") == 0
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "plain"))
    assert one["test"]["samples"] == other["test"]["samples"]


def step_told(told):
    """After which step a run says that it was asked to stop."""
    found = re.findall(r"asked to stop after step (\d+)", told)
    assert len(set(found)) == 1, told[-2000:]
    return int(found[0])


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_it_leaves_a_checkpoint_and_says_so(whole, digits, tmp_path, number):
    run = tmp_path / "run"
    whole_command = command(run, digits, "single", 1)
    plain = [sys.executable, *whole_command[whole_command.index("sptnet") - 1 :]]  # the exit code is the process's own
    process = subprocess.Popen(plain, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    until_checkpoint(process, run, 3)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    assert last_step(run) == step_told(told)
    assert "Traceback" not in told
    assert subprocess.run(plain, cwd=ROOT, capture_output=True, env=ENVIRONMENT).returncode == 0
    assert np.array_equal(steps_of(run), steps_of(whole["single"]))


def test_two_runs_in_one_folder_are_refused(digits, tmp_path, capsys):
    run = tmp_path / "run"
    first = start(run, digits, "single", 1, "schedule.epochs=100")
    until_checkpoint(first, run, 3)
    code = train_here(run, digits, "schedule.epochs=100")
    first.kill()
    assert code != 0
    assert f"error: {run} is being trained by another process" in capsys.readouterr().err


def test_asked_to_stop_on_two_processes(whole, digits, tmp_path):
    run = tmp_path / "run"
    process = launched(run, digits, "ddp", 2, "data.workers=2")  # loader workers must outlive the signal
    until_checkpoint(process, run, 3)
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on to the whole group of each rank
    told, _ = process.communicate(timeout=90)
    assert last_step(run) == step_told(told)
    finish(run, digits, "ddp", 2)
    assert np.array_equal(steps_of(run), steps_of(whole["ddp"]))


@SLOW
def test_an_evaluation_on_the_way_does_not_finish_a_run(whole, digits, tmp_path):
    run = tmp_path / "run"
    killed_at(24, run, digits, "single", 1, "evaluate.every=1")
    ran = subprocess.run([sys.executable, "-m", "sptnet", "eval", run], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0
    assert (
        f"{run} is not finished: its model.safetensors is of step 22, its newest checkpoint step-0000000" in ran.stderr
    )
    assert "unfinished: " in ran.stdout
    assert (run / "metrics.json").exists()
    finish(run, digits, "single", 1)
    assert np.array_equal(steps_of(run), steps_of(whole["single"]))


@SLOW
def test_gone_back_it_forgets_what_came_after(whole, digits, tmp_path):
    run = tmp_path / "run"
    killed_at(12, run, digits, "single", 1, "checkpoint.keep=5")
    early = checkpoints(run)[0]
    late = checkpoints(run)[-1]
    assert late != early
    inode = late.stat().st_ino
    process = start(run, digits, "single", 1, f"resume={early}", "checkpoint.keep=5")
    with suppress(FileNotFoundError):  # it goes while it is looked at
        while late.stat().st_ino == inode:
            assert process.poll() is None, process.told[-2000:]
            time.sleep(0.01)
    process.kill()
    finish(run, digits, "single", 1)
    assert np.array_equal(steps_of(run), steps_of(whole["single"]))


@SLOW
def test_started_anew_it_forgets_its_checkpoints(whole, digits, tmp_path):
    run = tmp_path / "run"
    killed_at(9, run, digits, "single", 1, "seed=5")
    old = checkpoints(run)[-1]
    process = start(run, digits, "single", 1, "resume=none")
    while old.exists():  # it removes them before its first step
        assert process.poll() is None
        time.sleep(0.01)
    until_checkpoint(process, run, 3)
    process.kill()
    finish(run, digits, "single", 1)
    assert np.array_equal(steps_of(run), steps_of(whole["single"]))


def rank_of(process, rank):
    """The process of a rank, of a run that the launcher started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return next(p for p in below if "sptnet" in p.cmdline() and p.environ().get("RANK") == str(rank))


def test_a_rank_that_dies_ends_the_others_and_is_named(digits, tmp_path):
    run = tmp_path / "run"
    process = launched(run, digits, "ddp", 2, "schedule.epochs=100")
    until_checkpoint(process, run, 3)
    rank_of(process, 1).kill()
    told, _ = process.communicate(timeout=120)  # torchrun gives the others 30 s, a collective would wait ten minutes
    assert process.returncode != 0
    assert "rank 0: failed in the " in told
    assert "rank      : 1" in told  # the launcher's summary
    assert read_facts(checkpoints(run)[-1]).step >= 3


@SLOW
def test_a_rank_that_hangs_ends_the_run_by_timeout(digits, tmp_path):
    run = tmp_path / "run"
    process = launched(run, digits, "ddp", 2, "schedule.epochs=100", "collective_timeout_s=20")
    until_checkpoint(process, run, 3)
    rank_of(process, 1).suspend()
    told, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "rank 0: failed in the " in told
    assert " phase at step " in told


def test_a_loss_that_is_not_finite_stops_the_run_before_it_touches_anything(digits, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(run, digits, "ddp", 2, "optimizer.lr=1.0e+37", "optimizer.name=sgd", "checkpoint.every=1")
    assert process.wait(timeout=100) != 0
    (line,) = [line for line in process.told.splitlines() if line.startswith("error")]
    assert line.startswith("error: a value is not finite in ")
    assert " phase, step " in line
    assert "images are uid " in line
    assert checkpoints(run)
    skipping = ["optimizer.lr=1.0e+37", "optimizer.name=sgd", "on_nonfinite=skip", "skip_limit=3"]
    assert train_here(run, digits, *skipping) != 0
    assert "4 steps were skipped, skip_limit is 3" in capsys.readouterr().err


@SLOW
def test_a_disk_that_is_full_leaves_the_previous_checkpoint(digits, tmp_path):
    run = tmp_path / "run"
    killed_at(6, run, digits, "single", 1)
    before = {path: (path / "checkpoint.json").read_bytes() for path in checkpoints(run)}
    # no file may grow beyond 300 kB: as the disk says it, in the middle of the next checkpoint
    limiting = "ulimit -f 300; exec " + shlex.join(command(run, digits, "single", 1))
    limited = subprocess.run(["bash", "-c", limiting], cwd=ROOT, capture_output=True, text=True)
    assert limited.returncode != 0
    line = next(line for line in limited.stderr.splitlines() if line.startswith("error"))
    assert "cannot be written on rank 0: File too large" in line
    assert "is intact" in line
    for path, content in before.items():
        assert (path / "checkpoint.json").read_bytes() == content
    finish(run, digits, "single", 1)
