"""Class tokens kept in a folder: by whom, of what, whole or absent, the same on any number of processes."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from forked import Forked, ran
from launching import contents

from sptnet.cli import main
from sptnet.data.augment import normalise
from sptnet.data.features import FeatureFolder
from sptnet.data.format.manifest import KINDS
from sptnet.data.loader import eval_batches
from sptnet.data.storage.store import LocalStore
from sptnet.trained import TrainedRun

TINY = ["--backbone", "vit_tiny_patch16_224", "--weights", "none", "--image-size", "32"]


@pytest.fixture(scope="module")
def made(digits, untrained, tmp_path_factory):
    """The features of the digits by the run, in this process."""
    out = tmp_path_factory.mktemp("features") / "f"
    assert main(["features", str(digits), "--out", str(out), "--run", str(untrained), "--dtype", "float32"]) == 0
    return out


def test_they_are_the_tokens_that_the_head_reads(digits, untrained, made):
    store, run = LocalStore(digits), TrainedRun(untrained)
    features = FeatureFolder(made, store.manifest)
    for kind in KINDS:
        split = features.split(kind)
        batches = list(eval_batches(store, kind, batch_size=50, augment="affine", image_size=24))
        assert np.array_equal(split.uids, torch.cat([b.uids for b in batches]))
        assert np.array_equal(split.targets, torch.cat([b.targets for b in batches]))
        with torch.no_grad():
            module, prompt = run.encoder.module, run.encoder.prompt
            wanted = torch.cat([module(normalise(b.images, module.statistics), prompt).features for b in batches])
            bare = torch.cat([module(normalise(b.images, module.statistics), None).features for b in batches])
        found = np.concatenate(list(split.blocks(7)))
        assert found.dtype == np.float32
        assert found.shape == (store.manifest.samples(kind), 48) == (len(split), split.width)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(found - bare.numpy()).max() > 0.01  # the prompt is in them


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_files(digits, untrained, made, tmp_path, processes):
    command = ["-m", "sptnet", "features", digits, "--out", tmp_path / "f", "--run", untrained]
    world = ran([*command, "--dtype", "float32", "--workers", "1"], "ddp", processes)
    assert world.returncode == 0, world.stderr[-3000:]
    assert f"DistributedDataParallel on {processes} processes" in world.stderr
    assert contents(tmp_path / "f") == contents(made)


@pytest.mark.slow
def test_killed_they_go_on_and_what_is_there_is_not_made_again(digits, untrained, made, tmp_path):
    out = tmp_path / "f"
    command = ["-m", "sptnet", "features", digits, "--out", out, "--run", untrained, "--dtype", "float32"]
    process = Forked(command)
    while len(list(out.glob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 3 <= len(there) < len(contents(made)) - 1
    assert ran(command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert {n: c for n, c in contents(out).items() if not n.endswith(".tmp")} == contents(made)


@pytest.mark.slow
def test_half_precision_is_half_as_large_and_near(digits, untrained, made, tmp_path):
    assert main(["features", str(digits), "--out", str(tmp_path / "f"), "--run", str(untrained)]) == 0
    manifest = LocalStore(digits).manifest
    half, whole = (FeatureFolder(f, manifest).split("test") for f in (tmp_path / "f", made))
    np.testing.assert_allclose(next(half.blocks()), next(whole.blocks()), rtol=2e-3, atol=2e-3)
    assert half.parts[0].path.stat().st_size < 0.6 * whole.parts[0].path.stat().st_size


def test_they_go_on_by_another_path_to_the_same_model(digits, untrained, tmp_path, monkeypatch):
    out = tmp_path / "f"
    assert main(["features", str(digits), "--out", str(out), "--run", str(untrained)]) == 0
    part = min(out.glob("unlabelled-*.safetensors"))
    whole = part.read_bytes()
    part.unlink()
    monkeypatch.chdir(untrained.parent)
    assert main(["features", str(digits), "--out", str(out), "--run", untrained.name]) == 0
    assert part.read_bytes() == whole
    assert len(FeatureFolder(out, LocalStore(digits).manifest).split("unlabelled").uids) == 1072


def test_other_weights_are_never_served_what_is_there(digits, untrained, made, tmp_path, capsys):
    out = tmp_path / "f"
    shutil.copytree(made, out)
    assert main(["features", str(digits), "--out", str(out), *TINY]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {out} holds results of something else (")
    fingerprint = json.loads((out / "features.json").read_text())
    for key in ("weights", "dataset", "image_size", "view", "mean", "std", "dtype", "precision", "batch_size"):
        assert key in fingerprint
    # a part of elsewhere among these
    manifest = LocalStore(digits).manifest
    (out / "features.json").write_text(json.dumps(fingerprint | {"weights": "others"}))
    with pytest.raises(ValueError, match="beside it says"):
        FeatureFolder(out, manifest).split("test")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda out: (out / "test-000000.safetensors").unlink(), "lacks 1 of"),
        (lambda out: (out / "features.json").unlink(), "holds no features"),
        (lambda out: (out / "features.json").write_text("{"), "features.json cannot be read"),
    ],
)
def test_damage_is_told(digits, made, tmp_path, damage, told):
    out = tmp_path / "f"
    shutil.copytree(made, out)
    damage(out)
    with pytest.raises(ValueError, match=told):
        FeatureFolder(out, LocalStore(digits).manifest)


def test_a_part_that_is_cut_short_and_another_dataset_are_told(digits, made, tmp_path):
    out, manifest = tmp_path / "f", LocalStore(digits).manifest
    shutil.copytree(made, out)
    part = out / "test-000000.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"test-000000.safetensors cannot be read"):
        FeatureFolder(out, manifest).split("test")
    manifest.classes.reverse()
    with pytest.raises(ValueError, match="holds features of another dataset"):
        FeatureFolder(out, manifest)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere holds no dataset"),
        (["DIGITS", "--run", "nowhere"], "nowhere is not a run"),
        (["DIGITS", "--run", "RUN", "--image-size", "32"], "was trained at 24 pixels"),
        (["DIGITS", *TINY, "--out", "/dev/null/f"], "/dev/null/f cannot be written: Not a directory"),
        (["DIGITS", "--backbone", "resnet50", "--weights", "none"], "resnet50 cannot be used"),
    ],
)
def test_mistakes_are_one_line(digits, untrained, tmp_path, capsys, arguments, told):
    places = {"DIGITS": str(digits), "RUN": str(untrained)}
    given = [places.get(argument, argument) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "f")]
    tiny = [] if {"--run", "--backbone"} & set(given) else TINY
    assert main(["features", *given, *out, *tiny]) in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert told in errors[0]
