"""Conversion: the same bytes whatever happens on the way, and one line where it cannot go on."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import contents
from PIL import Image
from sptnet_shards.make_shards import main

from sptnet.data.format.manifest import KINDS, read_manifest
from sptnet.data.image import decode, resize_short_side
from sptnet.data.storage.store import LocalStore

CLASSES, EACH = ("ant", "bee", "cat", "dog"), 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of small noisy photographs, 4 classes x 24 for training and x 4 for testing."""
    root, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, each in (("train", EACH), ("test", 4)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = draws.integers(0, 256, (40 + i, 70 - i, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02d}.jpg", quality=90)
    return root


def command(photos, out, *extra):
    return ["imagefolder", str(photos), str(out), "--old", "2", "--name", "photos", *extra]


@pytest.fixture(scope="module")
def converted(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    assert main(command(photos, out, "--workers", "1")) == 0
    return contents(out)


def test_the_bytes_do_not_depend_on_the_workers(photos, converted, tmp_path):
    assert main(command(photos, tmp_path / "out", "--workers", "3")) == 0
    assert contents(tmp_path / "out") == converted
    assert len([name for name in converted if name.startswith("train-labelled") and name.endswith(".tar")]) == 16


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(photos, converted, tmp_path):
    """The whole process group is not told: workers must notice by themselves that their parent is gone."""
    out, killed, kept = tmp_path / "out", 0, 0
    run = [sys.executable, "-m", "sptnet_shards.make_shards", *command(photos, out, "--workers", "2")]
    for wanted in (3, 20, 30):
        process = subprocess.Popen(run, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(out.glob("*.tar"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists() or process.returncode == 0
        kept = max(kept, len(list(out.glob("*.tar"))))
    assert killed >= 2
    assert kept >= 20
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert main(command(photos, out)) == 0
    assert contents(out) == converted
    untouched = [name for name, changed in before.items() if (out / name).stat().st_mtime_ns == changed]
    assert len(untouched) >= 20


def test_another_dataset_or_conversion_at_the_target_is_left_alone(photos, converted, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(photos, out)) == 0
    for complete in (True, False):
        for extra, told in (
            (["--seed", "1"], "--seed 0 there, 1 here"),
            (["--resize", "9"], "--resize None there, {'short_side': 9"),
            (["--test", "test"], "--test None there, 'test' here"),
        ):
            assert main(command(photos, out, *extra)) == 1
            assert f"is a conversion with other settings: {told}" in capsys.readouterr().err
        assert main(["digits", str(out)]) == 1
        assert "is a conversion by 'imagefolder', not 'digits'" in capsys.readouterr().err
        if complete:
            (out / "manifest.json").unlink()
    assert contents(out).keys() == converted.keys() - {"manifest.json"}
    (out / "conversion.json").unlink()
    assert main(command(photos, out)) == 1
    assert "is not empty" in capsys.readouterr().err
    (out / "manifest.json").write_bytes(converted["manifest.json"])  # as versions before left a dataset
    assert main(command(photos, out)) == 1
    assert "holds a dataset already" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "conversion.json").write_text(json.dumps({"fingerprint": "by an earlier version"}))
    assert main(command(photos, other)) == 1
    assert "conversion.json is damaged, or of another version" in capsys.readouterr().err
    assert sorted(os.listdir(other)) == ["conversion.json"]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half_written(photos, converted, tmp_path):
    out = tmp_path / "out"
    run = [sys.executable, "-m", "sptnet_shards.make_shards", *command(photos, out, "--workers", "1")]
    # no file may grow beyond 20 kB: as the disk says it, in the middle of a shard
    ran = subprocess.run(["bash", "-c", f"ulimit -f 20; exec {' '.join(run)}"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert [line for line in ran.stderr.splitlines() if line.startswith("error: ") and ".tar cannot be written" in line]
    assert "Traceback" not in ran.stderr
    assert not list(out.glob("*.tmp"))
    assert not (out / "manifest.json").exists()
    for path in out.glob("*.tar"):
        assert path.read_bytes() == converted[path.name]
    assert main(command(photos, out)) == 0
    assert contents(out) == converted


def test_images_that_do_not_decode(photos, tmp_path, capsys):
    source = tmp_path / "source"
    for name in CLASSES:
        (source / name).mkdir(parents=True)
        for i in range(EACH):
            os.link(photos / "train" / name / f"{i:02d}.jpg", source / name / f"{i:02d}.jpg")
    whole = (photos / "train" / "ant" / "03.jpg").read_bytes()
    for name, damaged in (("ant/03.jpg", whole[: len(whole) // 2]), ("bee/05.jpg", b""), ("cat/07.jpg", b"no image")):
        (source / name).unlink()
        (source / name).write_bytes(damaged)
    run = ["imagefolder", str(source), "--old", "2"]
    for options in ([], ["--resize", "32"]):
        assert main([*run, str(tmp_path / f"fail{len(options)}"), *options]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ")
        assert "jpg does not decode: " in told
        out = tmp_path / f"skip{len(options)}"
        assert main([*run, str(out), "--on-error", "skip", *options]) == 0
        manifest = read_manifest(out)
        assert sorted(entry["file"] for entry in manifest.skipped) == ["ant/03.jpg", "bee/05.jpg", "cat/07.jpg"]
        assert sorted(entry["uid"] for entry in manifest.skipped) == [3, 24 + 5, 48 + 7]
        assert sum(manifest.samples(kind) for kind in KINDS) == 4 * EACH - 3
        assert main(["verify", str(out), "--decode"]) == 0


@pytest.mark.parametrize(("image_format", "worst"), [("png", 0), ("jpeg", 40), ("webp", 80)])
def test_resize_is_the_first_step_of_the_training_transform(photos, image_format, worst, tmp_path):
    out = tmp_path / "out"
    assert main(command(photos, out, "--resize", "32", "--format", image_format)) == 0
    store = LocalStore(out)
    recorded = {"short_side": 32, "format": image_format} | ({} if image_format == "png" else {"quality": 95})
    assert store.manifest.transform == recorded
    files = [path for name in CLASSES for path in sorted((photos / "train" / name).glob("*.jpg"))]
    for shard in store.manifest.of_kind("unlabelled")[:4]:
        with open(out / shard.file, "rb") as tar:
            for uid, _, offset, size in store.entries(shard).tolist():
                tar.seek(offset)
                stored = decode(tar.read(size))
                wanted = resize_short_side(decode(files[uid].read_bytes()), 32)
                assert stored.shape == wanted.shape
                assert (stored.int() - wanted.int()).abs().max() <= worst
                assert resize_short_side(stored, 32) is stored


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tiff"])
def test_formats_that_a_shard_does_not_hold_are_kept_as_png(tmp_path, suffix):
    source, draws = tmp_path / "source", np.random.default_rng(0)
    for name in ("ant", "bee"):
        (source / name).mkdir(parents=True)
        for i in range(4):
            pixels = draws.integers(0, 256, (9, 7), np.uint8)
            Image.fromarray(pixels).save(source / name / f"{i}.{suffix}")
    assert main(["imagefolder", str(source), str(tmp_path / "kept"), "--old", "1"]) == 0
    store = LocalStore(tmp_path / "kept")
    files = sorted(source.rglob(f"*.{suffix}"))
    seen = set()
    for shard in store.manifest.shards:
        with tarfile.open(tmp_path / "kept" / shard.file) as tar:
            assert {Path(member.name).suffix for member in tar if "cls" not in member.name} == {".png"}
        with open(tmp_path / "kept" / shard.file, "rb") as tar:
            for uid, _, offset, size in store.entries(shard).tolist():
                tar.seek(offset)
                assert torch.equal(decode(tar.read(size)), decode(files[uid].read_bytes()))
                seen.add(uid)
    assert len(seen) == len(files)


def test_shards_are_about_as_large_as_asked(tmp_path):
    draws = np.random.default_rng(1)
    for name in ("ant", "bee"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for i in range(45):
            encoded = io.BytesIO()
            Image.fromarray(draws.integers(0, 256, (300, 300, 3), np.uint8)).save(encoded, "PNG")
            (tmp_path / "source" / name / f"{i:02d}.png").write_bytes(encoded.getvalue())
    run = ["imagefolder", str(tmp_path / "source"), str(tmp_path / "out"), "--old", "1", "--shard-mb", "1"]
    assert main(run) == 0
    sizes = [shard.bytes for shard in read_manifest(tmp_path / "out").of_kind("unlabelled")]
    assert len(sizes) > 16
    assert all(0.7e6 < size < 1.4e6 for size in sizes)


@pytest.mark.parametrize("option", [("--format", "png"), ("--quality", "80")])
def test_how_to_store_is_refused_where_bytes_are_kept(photos, tmp_path, capsys, option):
    assert main(command(photos, tmp_path / "out", *option)) == 1
    assert capsys.readouterr().err == (
        "error: --format and --quality say how --resize stores images: give --resize too, or neither\n"
    )
