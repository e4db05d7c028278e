"""Runs that are started, killed and continued, as a user would."""

import json
import re
import subprocess
import time

import numpy as np
from forked import Forked
from launching import ENVIRONMENT, ROOT, launcher

from sptnet.cli import main
from sptnet.run.checkpoint import checkpoints, read_facts
from sptnet.strategy.create import WRAPPERS

# 22 steps per epoch; phases of 4 steps and checkpoints every 3: continued in the middle of either phase
SMALL = ["init=null", "schedule.epochs=2", "schedule.k=4", "evaluate.every=2", "checkpoint.every=3", "log_every=2",
         "data.batch_size=64", "prompts.lr=0.2", "optimizer.lr=0.0005",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"]  # fmt: skip


def command(run, data, strategy, processes, *extra):
    """The command of a user; `strategy` may name a precision: "zero2 fp16"."""
    strategy, _, precision = strategy.partition(" ")
    train = ["-m", "sptnet", "train", "configs/quickstart.yaml", f"run={run}", f"data.root={data}"]
    return [*launcher(strategy, processes, precision or "no"), *train, *SMALL, *extra]


def launched(*arguments):
    """The run as a user starts it: the launcher, and what it starts."""
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip


def start(run, data, strategy, processes, *extra):
    """The same processes, forked."""
    whole = command(run, data, strategy, processes, *extra)
    strategy, _, precision = strategy.partition(" ")
    return Forked(whole[whole.index("sptnet") - 1 :], strategy, processes, precision or "no")


def finish(run, data, strategy, processes, *extra):
    process = start(run, data, strategy, processes, *extra)
    assert process.wait() == 0, process.told[-3000:]
    name = strategy.partition(" ")[0]
    found = re.findall(r"(\w+) \((\w+)\), (\d+) x cpu", (run / "log.txt").read_text())
    assert found[-1] == (name, WRAPPERS[name], str(processes))
    return process.told


def train_here(run, data, *extra):
    """The same run on one process, this one; its exit code."""
    return main(["train", f"{ROOT}/configs/quickstart.yaml", f"run={run}", f"data.root={data}", *SMALL, *extra])


def until_checkpoint(process, run, step):
    """Wait until a checkpoint of at least this step is whole."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        there = checkpoints(run)
        if there and read_facts(there[-1]).step >= step:
            return
        assert process.poll() is None, process.told if isinstance(process, Forked) else process.communicate()
        time.sleep(0.01)
    raise AssertionError("no checkpoint appeared")


def last_step(run):
    """The step of the newest checkpoint, 0 if there is none."""
    there = checkpoints(run)
    return read_facts(there[-1]).step if there else 0


def killed_at(step, run, data, strategy, processes, *extra, pause=0.0):
    """Start a run, and kill it `pause` seconds after a checkpoint of at least this step is whole."""
    process = start(run, data, strategy, processes, *extra)
    until_checkpoint(process, run, step)
    time.sleep(pause)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    written_by = read_facts(checkpoints(run)[-1]).written_by
    assert (written_by["strategy"], written_by["world_size"]) == (strategy.partition(" ")[0], processes)


def steps_of(run, total=44):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "phase" in line]
    assert [line["step"] for line in steps] == list(range(total))
    return np.array([[line[k] for k in ("total", "cls", "distill", "me_max", "info_nce", "sup_con")] for line in steps])
