"""A Slurm of this machine's own for the tests, started once, and its jobs: nodes are namespaces; see cluster.sh."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launching import ROOT

CLUSTER = Path(__file__).parent / "cluster.sh"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")


def why_not() -> str | None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (make test-slurm does, on Debian)"
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        return "nodes of a test cluster are network namespaces, which need root"
    return None


class Lab:
    """A cluster of three nodes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURMLAB": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}

    def cluster(self, *arguments: str) -> None:
        with open(self.folder.parent / "cluster.log", "a") as log:  # daemons would keep a pipe open
            subprocess.run(["bash", CLUSTER, *arguments], env=self.environment, check=True, stdout=log, stderr=log)

    def start_node(self, name: str) -> None:
        self.cluster("start-node", name)
        end = time.monotonic() + 60
        while self.run("sinfo", "-h", "-o", "%t%D").strip() != "idle3":
            assert time.monotonic() < end, self.run("sinfo", "-N")
            time.sleep(0.2)

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        ran = subprocess.run(command, cwd=ROOT, env=self.environment | more, capture_output=True, text=True)
        assert ran.returncode == 0 or not check, ran.stderr
        return ran.stdout + ran.stderr


class Job:
    """A submitted job, and its run folders."""

    def __init__(self, lab: Lab, runs: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str):
        self.lab, self.runs, self.log = lab, runs, runs.with_suffix(".log")
        self.root = runs / "quickstart" / "seed-0"
        paths = {"RUNS": str(runs), "SPTNET_BIN": str(Path(sys.executable).parent), **environment}
        command = ["sbatch", "--parsable", f"--output={self.log}", *options, "slurm/quickstart.sbatch", *arguments]
        self.id = lab.run(*command, **paths).strip()

    def show(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S+)", self.lab.run("scontrol", "show", "job", self.id)).group(1)

    def until(self, condition, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.show('JobState')}\n{self.log.read_text()[-3000:]}"
            assert self.show("JobState") != "FAILED", self.log.read_text()[-3000:]
            time.sleep(0.1)

    def finished(self, seconds: float = 300) -> None:
        self.until(lambda: self.show("JobState") == "COMPLETED", seconds)

    def failed(self, seconds: float) -> str:
        """Wait until the job has failed; its log's last line."""
        end = time.monotonic() + seconds
        while self.show("JobState") != "FAILED":
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.1)
        return self.log.read_text().splitlines()[-1]

    def signal(self) -> None:
        """What Slurm sends before the time limit."""
        self.lab.run("scancel", "--batch", "--signal=USR1", self.id)

    def loses(self, node: str) -> None:
        """Lose a node that it was asked to have, and finish on others."""
        self.lab.run("scontrol", "update", f"JobId={self.id}", "ReqNodeList=", check=False)
        self.lab.cluster("kill-node", node)
        try:
            self.until(lambda: self.show("Restarts") == "1")
            self.lab.run("scontrol", "update", f"JobId={self.id}", "ReqNodeList=", check=False)
            self.finished()
        finally:
            self.lab.start_node(node)

    def steps(self, stage: str = "sptnet") -> list[dict]:
        path = self.root / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}") and '"phase"' in line]

    def in_phase(self, phase: str, after: int) -> bool:
        steps = self.steps()
        return bool(steps) and steps[-1]["phase"] == phase and steps[-1]["step"] > after

    def worlds(self, stage: str = "sptnet") -> list[tuple[str, dict[str, int]]]:
        """Strategy, and processes by node, of every start."""
        starts = [json.loads(line) for line in (self.root / stage / "starts.jsonl").read_text().splitlines()]
        return [(start["strategy"]["strategy"], start["nodes"]) for start in starts]
