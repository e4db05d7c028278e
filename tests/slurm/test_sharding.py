"""slurm/make_shards.sbatch on a real Slurm: an array on two nodes gives the bytes of one machine, whatever is lost."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import contents
from PIL import Image
from slurm_lab import why_not
from sptnet_shards.make_shards import main

from sptnet.data.format.temporary import writer_of

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
SCRIPT = "slurm/make_shards.sbatch"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Enough for tasks that take several seconds each: 1,200 photographs that are resized."""
    root, draws = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(300):
            pixels = draws.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).resize((800, 600)).save(root / name / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(["imagefolder", str(photos), str(out), "--old", "2", "--resize", "256"]) == 0
    return contents(out)


class Array:
    """An array of four tasks, two on each of two nodes, and a job behind it that finishes."""

    def __init__(self, lab, log: Path, *command: str):
        self.lab, self.log, self.command = lab, log, command
        self.environment = {"SPTNET_BIN": str(Path(sys.executable).parent)}
        log.mkdir()
        # half a node each: four tasks need two nodes
        self.id = self.submit("--array=0-3", "--nodelist=n1,n2", "--nodes=1", "--cpus-per-task=40")
        self.last = self.submit(f"--dependency=afterok:{self.id}", "--nodelist=n1", more=("--finish",))

    def submit(self, *options: str, more: tuple[str, ...] = (), **environment: str) -> str:
        options = tuple(option for option in options if option != "--nodelist=n1,n2")
        exclude = () if any(option.startswith("--nodelist") for option in options) else ("--exclude=n3",)
        command = ["sbatch", "--parsable", f"--output={self.log}/%A-%a.log", *options, *exclude, SCRIPT]
        return self.lab.run(*command, *self.command, *more, **self.environment, **environment).strip()

    def state(self, job: str) -> str:
        told = self.lab.run("scontrol", "show", "job", job, check=False)
        return ",".join(re.findall(r"JobState=(\S+)", told))

    def nodes(self) -> dict[str, str]:
        """The node of every task, by job id with its number."""
        told = self.lab.run("squeue", "-h", "-t", "RUNNING", "-r", "-o", "%F_%K %N", "-j", self.id, check=False)
        return dict(line.split() for line in told.splitlines() if " " in line and line.startswith(self.id))

    def told(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.log.iterdir()))

    def until(self, condition, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.state(self.id)} {self.state(self.last)}\n{self.told()}"
            time.sleep(0.1)

    def finished(self) -> None:
        self.until(lambda: self.state(self.last) == "COMPLETED")


def written(out: Path) -> int:
    return len(list((out / "conversion").glob("*.tar.json"))) if (out / "conversion").exists() else 0


def test_an_array_on_two_nodes_gives_the_bytes_of_one_machine(lab, photos, alone, tmp_path):
    out = tmp_path / "out"
    array = Array(lab, tmp_path / "log", "imagefolder", str(photos), str(out), "--old", "2", "--resize", "256")
    array.until(lambda: set(array.nodes().values()) == {"n1", "n2"})
    array.until(lambda: written(out) >= 3)
    array.finished()
    assert contents(out) == alone
    assert sorted(path.name for path in out.iterdir()) == sorted(alone)
    assert "all tasks: " in array.told()
    # a task that is submitted again says of how many it is; it finds everything there
    again = array.submit("--array=3,1", TASKS="4")
    array.until(lambda: array.state(again) == "COMPLETED,COMPLETED")
    refused = array.submit("--array=3,1")
    array.until(lambda: array.state(refused) == "FAILED,FAILED")
    assert "auto is for an array from 0 to N - 1, and this one has 2 tasks from 1 to 3" in array.told()


def test_a_task_is_killed_and_requeued_and_a_node_powered_off(lab, photos, alone, tmp_path):
    out = tmp_path / "out"
    array = Array(lab, tmp_path / "log", "imagefolder", str(photos), str(out), "--old", "2", "--resize", "256")
    array.until(lambda: len(array.nodes()) == 4 and written(out) >= 2)
    tasks = array.nodes()
    victim = next(task for task, node in tasks.items() if node == "n1")
    lab.run("scontrol", "requeue", victim)  # killed, and in the queue again
    array.until(lambda: written(out) >= 4)
    lab.cluster("kill-node", "n2")  # every process on it dies
    try:
        lab.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost", check=False)
        array.until(
            lambda: (array.nodes() and set(array.nodes().values()) == {"n1"}) or array.state(array.last) == "COMPLETED"
        )
        array.finished()
    finally:
        lab.start_node("n2")
    # what the lost node had begun to write is nobody's after a day: until then nobody can tell that it is lost
    left = [path for path in out.iterdir() if path.suffix == ".tmp"]
    assert {writer_of(path.name).host for path in left} <= {"n2"}
    assert {name: content for name, content in contents(out).items() if not name.endswith(".tmp")} == alone
    for path in left:
        os.utime(path, (1, 1))
    late = array.submit("--array=0-3")  # and a late twin finds everything there
    array.until(lambda: array.state(late) == ",".join(["COMPLETED"] * 4))
    assert contents(out) == alone


def test_an_array_indexes_as_one_machine_does(lab, photos, tmp_path):
    made = tmp_path / "made"
    assert main(["imagefolder", str(photos), str(made), "--old", "2", "--shard-mb", "1", "--name", "x"]) == 0
    roots = tmp_path / "alone", tmp_path / "array"
    for root in roots:
        root.mkdir()
        for number, path in enumerate(sorted(made.glob("*.tar"))):
            shutil.copy(path, root / f"{number:05d}.tar")
    assert main(["index", str(roots[0]), "--old", "2", "--name", "x"]) == 0
    array = Array(lab, tmp_path / "log", "index", str(roots[1]), "--old", "2", "--name", "x")
    array.finished()
    assert contents(roots[1]) == contents(roots[0])
    assert sorted(path.name for path in roots[1].iterdir()) == sorted(path.name for path in roots[0].iterdir())
