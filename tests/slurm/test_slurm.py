"""slurm/ and launch/slurm_node.sh on a real Slurm whose nodes are namespaces of this machine; `make test-slurm`."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, launcher, losses
from PIL import Image
from sklearn.datasets import load_digits
from slurm_lab import CLUSTER, Job, why_not

from sptnet.data.storage.store import LocalStore

# 8 epochs of 11 steps, k = 20: both phases twice in the SPTNet stage. SGD, since the first steps of AdamW, which
# divides small gradients by themselves, make 1e-4 of what the order of a sum changes in the last digit
SHORT = ["schedule.epochs=8", "evaluate.every=8", "checkpoint.every=10", "log_every=2", "optimizer.name=sgd",
         "optimizer.lr=0.002", "sptnet:prompts.lr=0.2"]  # fmt: skip
STEPS = 88


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


def settings_of(stage: str) -> list[str]:
    """SHORT, as a stage on its own is given it."""
    return [one.removeprefix(f"{stage}:") for one in SHORT if ":" not in one or one.startswith(f"{stage}:")]


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """Both stages on one machine, as `make quickstart` runs them; for one global batch."""

    def run(*overrides: str) -> Path:
        root = tmp_path_factory.mktemp("alone")
        shared = [f"data.root={digits}", *overrides]
        for config, more in (
            ("quickstart_simgcd", [f"run={root}/simgcd"]),
            ("quickstart", [f"run={root}/sptnet", f"init={root}/simgcd"]),
        ):
            settings = settings_of("simgcd" if config.endswith("simgcd") else "sptnet")
            command = [*launcher("ddp", 2), "-m", "sptnet", "train", f"configs/{config}.yaml"]
            command += [*settings, *shared, *more]
            ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr[-3000:]
        return root

    return run


@pytest.fixture(scope="module")
def whole(alone):
    return alone()


def assert_the_same_run(root: Path, reference: Path) -> None:
    for stage in ("simgcd", "sptnet"):
        np.testing.assert_allclose(*(losses(path / stage, STEPS) for path in (root, reference)), rtol=1e-5)
        ours, theirs = (np.load(path / stage / "predictions.npz") for path in (root, reference))
        for protocol in ("unlabelled", "test"):
            assert np.array_equal(ours[f"{protocol}_uid"], theirs[f"{protocol}_uid"])
            # an image on the border of two classes may fall to either side of it
            assert np.mean(ours[f"{protocol}_prediction"] == theirs[f"{protocol}_prediction"]) > 0.995


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2", "hsdp"])
def test_two_nodes_give_the_numbers_of_one_machine(lab, whole, digits, tmp_path, strategy):
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT, STRATEGY=strategy)
    job.finished()
    assert job.worlds() == [(strategy, {"n1": 2, "n2": 2})]
    assert_the_same_run(job.root, whole)
    told = job.log.read_text()
    assert "All / Old / New, %" in told
    wrapped = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}.get(strategy, "FSDPPromptedViT")
    assert f"({wrapped})" in told


def test_hsdp_shards_on_a_node_and_copies_from_node_to_node(lab, digits, tmp_path):
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT, STRATEGY="hsdp", PROCESSES="4")
    job.until(lambda: job.steps("simgcd"))
    lab.run("scancel", job.id)
    assert job.worlds("simgcd") == [("hsdp", {"n1": 4, "n2": 4})]  # launch/hsdp.yaml has the sizes of 2 x 2
    (start,) = (job.root / "simgcd" / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["strategy"]["shard_size"] == 4


def test_asked_to_stop_in_either_phase_it_is_requeued_and_gives_the_same_numbers(lab, whole, digits, tmp_path):
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT)
    job.until(lambda: job.in_phase("model", after=20))
    job.signal()
    job.until(lambda: job.show("Restarts") == "1")
    job.until(lambda: job.in_phase("prompt", after=40))
    job.signal()
    job.finished()
    assert job.show("Restarts") == "2"
    starts = [json.loads(line)["step"] for line in (job.root / "sptnet" / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    # the steps before which it stopped: in the model phase of steps 20 to 39, the prompt phase of 40 to 59
    assert 20 < starts[1] <= 40 < starts[2] <= 60
    assert "requeued: asked to stop by USR1" in job.log.read_text()
    assert_the_same_run(job.root, whole)


def test_a_node_is_lost_and_another_takes_its_place(lab, whole, digits, tmp_path):
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT, options=("--nodelist=n2,n3",))
    job.until(lambda: job.in_phase("prompt", after=10))
    job.loses("n3")
    assert [sorted(nodes) for _, nodes in job.worlds()] == [["n2", "n3"], ["n1", "n2"]]
    assert_the_same_run(job.root, whole)


def test_a_job_shrinks_from_three_nodes_to_two(lab, alone, digits, tmp_path):
    batch = ["data.batch_size=120", "schedule.epochs=8"]  # 11 steps per epoch too, and 3 and 2 nodes divide it
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT, *batch, options=("--nodes=3",), PROCESSES="1")
    job.until(lambda: job.in_phase("model", after=20))
    lab.cluster("kill-node", "n3")
    try:
        job.until(lambda: job.show("Restarts") == "1")
        lab.run("scontrol", "update", f"JobId={job.id}", "NumNodes=2", "NumTasks=2")
        job.finished()
    finally:
        lab.start_node("n3")
    assert [nodes for _, nodes in job.worlds()] == [{"n1": 1, "n2": 1, "n3": 1}, {"n1": 1, "n2": 1}]
    assert_the_same_run(job.root, alone(*batch))


def test_what_trying_again_cannot_mend_is_not_requeued_and_the_last_line_says_why(lab, digits, tmp_path):
    begun = time.monotonic()
    job = Job(lab, tmp_path / "config", f"data.root={digits}", *SHORT, "optimizer.lr=-1")
    told = job.failed(45)
    assert told.startswith("slurm_node: not requeued: ")
    assert "optimizer.lr" in told
    assert time.monotonic() - begun < 45
    job = Job(lab, tmp_path / "missing", f"data.root={tmp_path / 'nowhere'}", *SHORT)
    assert "nowhere" in job.failed(45)
    assert job.show("Restarts") == "0"
    job = Job(lab, tmp_path / "override", "run=elsewhere")
    assert "not requeued: run=elsewhere" in job.failed(30)
    job = Job(lab, tmp_path / "override", "sptnet:seed=3")
    assert "not requeued: sptnet:seed=3: both stages have the same seed" in job.failed(30)


def test_an_error_of_one_task_ends_the_job(lab, digits, tmp_path):
    root = Path(shutil.copytree(digits, tmp_path / "damaged"))
    shard = LocalStore(root).manifest.of_kind("labelled")[3]  # one rank meets it first
    (root / shard.file).write_bytes(bytes(shard.bytes))
    job = Job(lab, tmp_path / "runs", f"data.root={root}", *SHORT)
    job.until(lambda: job.log.exists() and "error: rank 1: " in job.log.read_text(), 60)
    begun = time.monotonic()
    told = job.failed(30)
    assert time.monotonic() - begun < 30
    assert "not requeued: " in told
    assert str(root) in told
    assert job.show("Restarts") == "0"
    assert job.show("ExitCode") == "1:0"


def test_a_lost_process_is_requeued_and_restarts_without_progress_end(lab, digits, tmp_path):
    # an interface that no node has: every start fails as a broken network would make it
    job = Job(lab, tmp_path / "runs", f"data.root={digits}", *SHORT, GLOO_SOCKET_IFNAME="broken0", RESTARTS="1")
    told = job.failed(150)
    assert "not requeued: 2 restarts without a new checkpoint" in told
    assert job.log.read_text().count("requeued: a process was lost") == 2


def test_discover_is_requeued_and_goes_on_with_what_is_missing(lab, tmp_path):
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:300], digits.target[:300], strict=True)):
        path = tmp_path / ("named" if label < 5 and number % 2 else "pile") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(path)
    out, log = tmp_path / "out", tmp_path / "discover.log"
    small = ["model.image_size=32", "data.workers=0", "data.augment=affine", "schedule.epochs=12", "log_every=1"]
    backbone = ["--backbone", "vit_tiny_patch16_224", "--weights", "none", "--new", "5"]
    folders = [str(tmp_path / "named"), str(tmp_path / "pile"), str(out)]
    options = [f"--output={log}", "--gpus-per-node=0", "--cpus-per-task=2"]
    job = lab.run(
        "sbatch", "--parsable", *options, "slurm/discover.sbatch", *folders, *small, *backbone,
        SPTNET_BIN=str(Path(sys.executable).parent),
    ).strip()  # fmt: skip

    def until(so, seconds):
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, log.read_text()[-3000:]
            assert "JobState=FAILED" not in lab.run("scontrol", "show", "job", job), log.read_text()[-3000:]
            time.sleep(0.1)

    until(lambda: (out / "simgcd" / "metrics.jsonl").exists(), 600)
    lab.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: "discover: requeued: asked to stop by USR1" in log.read_text(), 300)
    until(lambda: "JobState=COMPLETED" in lab.run("scontrol", "show", "job", job), 900)
    told = log.read_text()
    assert "what the backbone sees in them: there already" in told
    assert "continues from" in told
    assert f"Open this in a browser: {out / 'page.html'}" in told
    steps = [json.loads(line) for line in (out / "simgcd" / "metrics.jsonl").read_text().splitlines()]
    numbers = [step["step"] for step in steps if "phase" in step]
    assert numbers == list(range(len(numbers)))


def test_seeds_are_an_array_with_a_table_behind_it(lab, digits, tmp_path):
    runs = tmp_path / "runs"
    environment = {"RUNS": str(runs), "SPTNET_BIN": str(Path(sys.executable).parent), "PROCESSES": "1"}
    environment["SBATCH_OUTPUT"] = str(tmp_path / "%x-%j.log")
    told = lab.run("slurm/seeds.sh", "quickstart", "0-1", f"data.root={digits}", "schedule.epochs=1", **environment)
    table = re.search(r"job (\d+) prints", told).group(1)
    end = time.monotonic() + 200
    while "JobState=COMPLETED" not in lab.run("scontrol", "show", "job", table):
        assert time.monotonic() < end, [path.read_text()[-1000:] for path in tmp_path.glob("*.log")]
        time.sleep(0.5)
    tables = [path.read_text() for path in tmp_path.glob("over-seeds-*.log")]
    assert len(tables) == 1
    assert "±" in tables[0]
    assert {path.name for path in (runs / "quickstart").iterdir()} == {"seed-0", "seed-1"}


def test_a_task_of_an_array_that_is_preempted_is_requeued_and_no_other(lab, digits, tmp_path):
    """The last one has the number of the whole array."""
    runs = tmp_path / "runs"
    environment = {"RUNS": str(runs), "SPTNET_BIN": str(Path(sys.executable).parent), "PROCESSES": "1"}
    options = ["--array=0-1", "--nodes=1", f"--output={tmp_path}/%a.log"]
    job = lab.run(
        "sbatch", "--parsable", *options, "slurm/quickstart.sbatch", f"data.root={digits}", *SHORT, **environment
    ).strip()
    of_seed = [runs / "quickstart" / f"seed-{seed}" for seed in range(2)]

    def until(so):
        end = time.monotonic() + 300
        while not so():
            assert time.monotonic() < end, [path.read_text()[-1000:] for path in tmp_path.glob("*.log")]
            time.sleep(0.2)

    until(lambda: all((root / "simgcd" / "metrics.jsonl").exists() for root in of_seed))
    assert f"JobId={job} ArrayJobId={job} ArrayTaskId=1" in lab.run("scontrol", "show", "job", f"{job}_1")
    lab.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    until(lambda: lab.run("scontrol", "show", "job", job).count("JobState=COMPLETED") == 2)
    starts = [len((root / "simgcd" / "starts.jsonl").read_text().splitlines()) for root in of_seed]
    assert starts == [1, 2]
    assert ["requeued" in (tmp_path / f"{seed}.log").read_text() for seed in range(2)] == [False, True]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch")))
def test_every_script_is_accepted(lab, script):
    told = lab.run("sbatch", "--test-only", f"slurm/{script}", "cub")
    assert "to start at" in told


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*(ROOT / "slurm").iterdir(), ROOT / "launch" / "slurm_node.sh", CLUSTER]
    ran = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_two_machines_without_slurm(lab, whole, digits, tmp_path):
    """The two commands of docs/operations.md, on two of the lab's machines."""
    operations = (ROOT / "docs" / "operations.md").read_text()
    commands = re.findall(r"```\n(GLOO_SOCKET_IFNAME=.*?)```", operations, re.S)
    assert len(commands) == 2
    run = tmp_path / "runs"
    for config, more in (
        ("quickstart_simgcd", [f"run={run}/simgcd"]),
        ("quickstart", [f"run={run}/sptnet", f"init={run}/simgcd"]),
    ):
        running = []
        for node, command in zip(("slurm-n1", "slurm-n2"), commands, strict=True):
            changes = {
                "\\\n": " ", "CONFIG": f"configs/{config}.yaml", "10.0.0.1": "10.77.0.1", "processes 16": "processes 4",
                ".venv/bin/accelerate launch": f"{sys.executable} -m accelerate.commands.launch",
            }  # fmt: skip
            for old, new in changes.items():
                assert old in command
                command = command.replace(old, new)
            settings = settings_of("simgcd" if config.endswith("simgcd") else "sptnet")
            arguments = " ".join([f"data.root={digits}", *settings, *more])
            inside = ["ip", "netns", "exec", node, "bash", "-c", f"OMP_NUM_THREADS=1 {command.strip()} {arguments}"]
            running.append(subprocess.Popen(inside, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        for process in running:
            _, told = process.communicate(timeout=200)
            assert process.returncode == 0, told[-3000:]
    starts = (run / "sptnet" / "starts.jsonl").read_text().splitlines()
    assert json.loads(starts[0])["strategy"]["world_size"] == 4
    assert_the_same_run(run, whole)
