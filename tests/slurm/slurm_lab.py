"""A Slurm of this machine's own for the tests, started once: its nodes are namespaces; see cluster.sh."""

import os
import shutil
import subprocess
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
