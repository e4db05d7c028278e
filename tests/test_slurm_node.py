"""launch/slurm_node.sh where no cluster is needed: its own decisions, with stand-ins for Slurm's commands.

tests/slurm runs it on a real Slurm.
"""

import os
import subprocess

import pytest
from launching import ROOT

SCRIPT = ROOT / "launch" / "slurm_node.sh"
JOB = {"SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "0"}
OCCUPIED = "retry: runs/quickstart is being trained by another process: stop it"


@pytest.fixture
def cluster(tmp_path):
    """Runs the script in a checkout, with commands that do what the test says; returns exit code and lines."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(arguments, environment=(), **said):
        for name, script in {
            "sleep": "",
            "scontrol": 'echo "scontrol $@"',
            "accelerate": "",
            "sptnet": "",
            **said,
        }.items():
            (commands / name).write_text(f"#!/bin/bash\n{script}\n")
            (commands / name).chmod(0o755)
        path = f"{commands}:{os.environ['PATH']}"
        world = {**os.environ, **JOB, "PATH": path, "SPTNET_BIN": str(commands), **dict(environment)}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=world, capture_output=True, text=True, timeout=60
        )
        return done.returncode, (done.stdout + done.stderr).splitlines()

    return run


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"STRATEGY": "fsdp"}, "STRATEGY=fsdp: there is no launch/fsdp.yaml, but launch/"),
        ({"PROCESSES": "two"}, "PROCESSES=two is no number of processes"),
        ({"RESTARTS": "a[$(id)]"}, "is no number of restarts"),
        ({"PRECISION": "fp32"}, "PRECISION=fp32 must be no, bf16 or fp16"),
        ({"STRATEGY": "zero3"}, "needs DeepSpeed, which is not installed: in the checkout, pip install"),
        ({"SPTNET_BIN": "nowhere"}, "nowhere/accelerate is missing"),
        ({"STRATEGY": "fsdp2", "SLURM_JOB_NUM_NODES": "1"}, "STRATEGY=fsdp2 needs more than one process"),
    ],
)
def test_mistakes_end_before_anything_is_started(cluster, environment, told):
    code, lines = cluster(["quickstart"], environment, python="exit 1", srun="echo started")
    assert code == 1
    assert lines[-1].startswith("slurm_node: not requeued: ")
    assert told in lines[-1]
    assert "started" not in lines


@pytest.mark.parametrize(
    ("array", "asked"), [({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}, "70_4"), ({}, "70")]
)
def test_a_task_of_an_array_requeues_itself_and_not_the_array(cluster, array, asked):
    """Slurm gives one task the number of the whole array."""
    code, lines = cluster(["quickstart"], array, srun="exit 1")
    assert code == 75
    assert f"scontrol requeue {asked}" in lines


def test_the_tasks_have_what_this_shell_has(cluster):
    _, lines = cluster(["quickstart"], srun='echo "srun $@"')
    assert any(line.startswith("srun --export=ALL ") for line in lines)


@pytest.mark.parametrize(
    "content", ["SEEN seen[$(touch$IFS{place})] x", "SEEN a[`touch$IFS{place}`]", "SEEN -1", "SEEN 1e9"]
)
def test_what_is_kept_of_restarts_is_no_program(cluster, tmp_path, content):
    outcome = tmp_path / "runs/quickstart/seed-0/outcome"
    outcome.mkdir(parents=True)
    seen = "4294967295"
    for _ in range(2):  # the first tells what is seen
        (outcome / "70.restarts").write_text(content.format(place=tmp_path / "done").replace("SEEN", seen) + "\n")
        code, _ = cluster(["quickstart"], {"SLURM_RESTART_COUNT": "1"}, srun="exit 1")
        assert code == 75
        seen = (outcome / "70.restarts").read_text().split()[0]
    assert (outcome / "70.restarts").read_text().split()[1] in "01"
    assert not (tmp_path / "done").exists()


def test_a_count_that_cannot_be_kept_ends_the_job(cluster, tmp_path):
    """A disk without room for a byte emptied it at every start: the job was requeued without end."""
    outcome = tmp_path / "runs/quickstart/seed-0/outcome"
    outcome.mkdir(parents=True)
    (outcome / "70.restarts").symlink_to("/mnt/nowhere/x")  # root may write whatever its mode
    code, lines = cluster(["quickstart"], srun="exit 1")
    assert (code, "started" in lines) == (1, False)
    assert lines[-1].endswith("70.restarts cannot be written, or not synced: is the disk full? Submit the job again")


def test_a_job_is_not_told_what_became_of_another(cluster, tmp_path):
    """Two jobs of one name by mistake: what one left is no reason for the other to end."""
    final = 'echo "final: optimizer.lr is -1" > "$SPTNET_OUTCOME/rank-0"; exit 1'
    code, lines = cluster(["quickstart"], {"SLURM_JOB_ID": "71"}, srun=final)
    assert (code, lines[-1]) == (1, "slurm_node: not requeued: optimizer.lr is -1")
    code, lines = cluster(["quickstart"], srun="exit 1")
    assert code == 75
    assert not any("optimizer.lr" in line for line in lines)


def test_a_job_that_waits_for_another_ends_though_that_one_gets_on(cluster, tmp_path):
    occupied = f'echo "{OCCUPIED}" > "$SPTNET_OUTCOME/rank-0"; exit 1'
    codes = []
    for restart in range(5):
        (tmp_path / f"runs/quickstart/seed-0/simgcd/checkpoints/step-{restart:09d}").mkdir(
            parents=True
        )  # of the other job
        code, lines = cluster(["quickstart"], {"SLURM_RESTART_COUNT": str(restart)}, srun=occupied)
        codes.append(code)
    assert codes == [75, 75, 75, 75, 1]
    assert "4 restarts without a new checkpoint" in lines[-1]


def test_tokens_that_were_made_count_as_progress(cluster):
    codes, told = [], []
    for restart in range(6):
        made = f'echo "continue: {min(restart, 1)} of 9 files of tokens" > "$SPTNET_OUTCOME/rank-0"; exit 1'
        code, lines = cluster(["quickstart"], {"SLURM_RESTART_COUNT": str(restart), "RESTARTS": "2"}, srun=made)
        codes.append(code)
        told += lines
    assert codes == [75, 75, 75, 75, 75, 1]
    assert "slurm_node: requeued: asked to stop; 1 of 9 files of tokens" in told


def test_being_asked_to_stop_is_no_progress(cluster):
    codes = []
    for restart in range(5):
        told = "retry: lost" if restart % 2 else "continue: a checkpoint is in runs"
        ended = f'echo "{told}" > "$SPTNET_OUTCOME/rank-0"; exit 1'
        codes.append(cluster(["quickstart"], {"SLURM_RESTART_COUNT": str(restart)}, srun=ended)[0])
    assert codes == [75, 75, 75, 75, 1]


@pytest.mark.parametrize(("own", "interface"), [("10.0.0.1", "eth0"), ("127.0.1.1", "eth0"), ("127.0.0.1", "eth0")])
def test_the_first_node_takes_the_network_that_reaches_the_others(cluster, own, interface):
    """Whatever it knows itself as: Debian writes 127.0.1.1 beside a machine's own name."""
    getent = f'[ "$2" = node1 ] && echo "{own} STREAM" || echo "10.0.0.2 STREAM"'
    ip = """case "$*" in
      *"address show") echo "1: lo inet 127.0.0.1/8 scope host lo"; echo "2: eth0 inet 10.0.0.1/24 scope global eth0" ;;
      *10.0.0.2) echo "10.0.0.2 dev eth0 src 10.0.0.1" ;;
      *) echo "local $4 dev lo src $4" ;;
    esac"""
    said = 'echo "gloo $GLOO_SOCKET_IFNAME, nccl $NCCL_SOCKET_IFNAME"'
    _, lines = cluster(["--on-node", "configs/quickstart.yaml"], {"PROCESSES": "1"}, getent=getent, ip=ip,
                       scontrol="printf 'node1\\nnode2\\n'", accelerate=said)  # fmt: skip
    assert lines == [f"gloo {interface}, nccl {interface}"]


def test_a_node_alone_needs_no_network(cluster):
    alone = {"PROCESSES": "2", "SLURM_JOB_NUM_NODES": "1"}
    _, lines = cluster(
        ["--on-node", "configs/quickstart.yaml"], alone, getent="echo '127.0.1.1 STREAM'", ip="echo 'local dev lo'",
        scontrol="echo node1", accelerate='echo "gloo ${GLOO_SOCKET_IFNAME-unset}"',
    )  # fmt: skip
    assert lines == ["gloo unset"]
