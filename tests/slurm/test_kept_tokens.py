"""Two nodes that keep the trunk's tokens in one folder, on a real Slurm."""

import subprocess

import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, launcher, losses
from slurm_lab import Job, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

VIEWS = 48  # so many that making them takes half a minute, and a node can be lost meanwhile
# a frozen block before the one that is trained; 11 steps an epoch
SETTINGS = ["schedule.epochs=4", "evaluate.every=4", "log_every=1", "optimizer.name=sgd", "optimizer.lr=0.002",
            "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}",
            "model.train_from_block=-1"]  # fmt: skip
STEPS = 44


def kept_in(folder):
    return [f"data.views={VIEWS}", f"trunk_cache={folder}"]


def parts(cache):
    """Names and bytes of what is kept, but for locks."""
    found = (path for path in cache.glob("*/*-0*") if path.suffix in (".safetensors", ".tokens"))
    return {path.name: path.read_bytes() for path in sorted(found)}


def job_of(lab, runs, cache, digits, *options):
    settings = [f"data.root={digits}", *SETTINGS, *(f"simgcd:{one}" for one in kept_in(cache))]
    return Job(lab, runs, *settings, options=options)


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """Parts and losses of one machine."""
    root = tmp_path_factory.mktemp("alone")
    command = [*launcher("ddp", 2), "-m", "sptnet", "train", "configs/quickstart_simgcd.yaml", f"run={root}/run"]
    command += [f"data.root={digits}", *SETTINGS, *kept_in(root / "tokens")]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return parts(root / "tokens"), losses(root / "run", STEPS)


def test_two_nodes_share_them(lab, alone, digits, tmp_path):
    cache = tmp_path / "tokens"
    job = job_of(lab, tmp_path / "runs", cache, digits)
    job.finished()
    assert job.worlds("simgcd") == [("ddp", {"n1": 2, "n2": 2})]
    assert "trunk cache" in job.log.read_text()
    kept, expected = alone
    assert parts(cache) == kept
    assert not list(cache.glob("*/*.tmp"))
    np.testing.assert_allclose(losses(job.root / "simgcd", STEPS), expected, rtol=1e-5)


def test_a_node_is_lost_while_they_are_made(lab, alone, digits, tmp_path):
    kept, expected = alone
    cache = tmp_path / "tokens"
    job = job_of(lab, tmp_path / "runs", cache, digits, "--nodelist=n2,n3")
    job.until(lambda: 1 <= len(list(cache.glob("*/*.safetensors"))) < len(kept) // 2)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*/*.safetensors")}
    job.loses("n3")
    assert parts(cache) == kept
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*/*.safetensors")}
    assert before.items() <= after.items()  # what was whole was not made again
    np.testing.assert_allclose(losses(job.root / "simgcd", STEPS), expected, rtol=1e-5)
