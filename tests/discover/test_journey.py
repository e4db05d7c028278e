"""`sptnet discover` as users start it: mistakes, kills, the whole way, and folders that must disappoint."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ENVIRONMENT, ROOT, heeding_signals
from PIL import Image
from sklearn.datasets import load_digits

from sptnet.cli import main

# a small ViT, the last block of which is trained, on as few pixels as it takes
SMALL = ["model.image_size=32", "schedule.epochs=2", "data.workers=0", "data.augment=affine"]
BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--weights", "none"]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folders(root, images, named):
    """Digits: every other one of the `named` classes is named, all others lie in a pile."""
    digits = load_digits()
    for number in range(images):
        label = digits.target[number]
        place = root / "named" / str(label) if label < named and number % 2 else root / "pile" / f"box {number % 3}"
        save(place / f"{number}.png", (digits.images[number] * 15.9).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def digits_in_folders(tmp_path_factory):
    root = folders(tmp_path_factory.mktemp("journey"), 400, 5)
    (root / "pile" / "damaged.png").write_bytes(b"no image")
    return root


def command(root, out, *more):
    return [sys.executable, "-m", "sptnet", "discover", *(str(root / name) for name in ("named", "pile")), str(out),
            *SMALL, *BACKBONE, *more]  # fmt: skip


class Begun:
    """A journey that is under way; `told` is what it has said, its children included."""

    def __init__(self, log, *arguments):
        self.log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command(*arguments), stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT,
                preexec_fn=heeding_signals,
            )  # fmt: skip

    @property
    def told(self):
        return self.log.read_text(errors="replace")

    def until(self, so, seconds=300):
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, self.told
            assert self.process.poll() is None, self.told
            time.sleep(0.02)

    def end(self, number, seconds=300):
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)


def finished(root, out, *more):
    ran = subprocess.run(
        command(root, out, *more), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=900
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone", "pile", "out"], "gone is missing or not a folder"),
        (["empty", "pile", "out", "--new", "2"], "has no class folders"),
        (
            ["one", "pile", "out"],
            "has 1 class, and estimating the number of new ones takes at least 3: say --new",
        ),
        (["named", "pile", "pile/out"], "lies among the images of"),
        (["named", "pile", "out", "epochs"], "should be section.key=value"),
        (["named", "pile", "out", "run=x"], "discover sets it from its own arguments"),
        (["named", "pile", "out", "--weights", "gone.pth"], "--weights gone.pth: no such file"),
        (["named", "pile", "out", "--hours", "0"], "is not a number of hours"),
        (["named", "pile", "out", "--new", "0"], "is not a whole number from 1"),
        (["named", "pile", "full/out"], "cannot be written: Not a directory"),
        (["named", "pile", "other", "--new", "3"], "holds results of something else (new: 2 there, 3 here"),
        (
            ["named", "pile", "before", "--new", "2"],
            "holds results of something else (then: None there, continued here",
        ),
        (["named", "pile", "out", "prompts.lr=7"], "prompts is for method sptnet, and the method is simgcd"),
        (["named", "pile", "strange"], "is not empty and lacks discover.json"),
    ],
)
def test_mistakes_are_one_line_before_anything_begins(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for place in ("named/a", "named/b", "named/c", "one/a", "pile"):
        save(tmp_path / place / "0.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").write_text("a file")
    save(tmp_path / "strange" / "0.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "other").mkdir()
    asked = {
        "labelled": str(tmp_path / "named"), "unlabelled": str(tmp_path / "pile"), "test": None, "new": 2,
        "backbone": "vit_base_patch16_224.dino", "weights": "timm", "overrides": [],
    }  # fmt: skip
    (tmp_path / "before").mkdir()  # there was a choice
    (tmp_path / "before" / "discover.json").write_text(json.dumps(asked))
    (tmp_path / "other" / "discover.json").write_text(json.dumps(asked | {"then": "continued"}))
    try:
        code = main(["discover", *arguments])
    except SystemExit as left:  # argparse
        code = left.code
    assert code in (1, 2)
    told = capsys.readouterr()
    assert words in told.err
    assert len([line for line in told.err.splitlines() if "error" in line]) == 1
    assert told.out == ""
    assert not (tmp_path / "out").exists()


def test_killed_or_stopped_it_goes_on_with_what_is_missing(digits_in_folders, tmp_path):
    out = tmp_path / "out"
    begun = Begun(tmp_path / "1.log", digits_in_folders, out)
    begun.until(lambda: "== 2 of 10" in begun.told)
    assert begun.end(signal.SIGKILL) == -signal.SIGKILL
    made = (out / "shards" / "manifest.json").stat().st_mtime_ns
    begun = Begun(tmp_path / "2.log", digits_in_folders, out)
    begun.until(lambda: "PromptedViT on 1 process" in begun.told)
    assert begun.end(signal.SIGINT) == 75
    assert "== 1 of 10: the images as shards: there already" in begun.told
    assert "error: asked to stop by SIGINT; the same command goes on" in begun.told.splitlines()
    assert "Traceback" not in begun.told
    assert (out / "shards" / "manifest.json").stat().st_mtime_ns == made


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.csv"))}


@pytest.mark.slow
@pytest.mark.parametrize(("then", "title"), [("sptnet", "SPTNet"), ("continued", "SimGCD continued on fresh views")])
def test_the_whole_way_with_kills_is_the_whole_way(digits_in_folders, tmp_path, then, title):
    """Killed in every training, asked to stop in one, on two processes: the same rows as without."""
    root, straight, out = digits_in_folders, tmp_path / "straight", tmp_path / "out"
    two = ["--processes", "2", "--test", str(root / "named_test"), "--hours", "1", "--then", then]
    for label in range(7):  # two of them have no name
        for number in range(1500, 1560):
            if load_digits().target[number] == label:
                save(
                    root / "named_test" / str(label) / f"{number}.png",
                    (load_digits().images[number] * 15.9).astype("u1"),
                )
    told, _ = finished(root, straight, *two)
    for name, run, number in (("5", "simgcd", signal.SIGKILL), ("6", then, signal.SIGKILL)):
        begun = Begun(tmp_path / f"{name}.log", root, out, *two)
        begun.until(lambda run=run: (out / run / "checkpoints").is_dir() and any((out / run / "checkpoints").iterdir()))
        begun.end(number)
    begun = Begun(tmp_path / "7.log", root, out, *two)
    begun.until(lambda: "== 7 of 10" in begun.told)
    assert begun.end(signal.SIGTERM) == 75
    assert f"6 of 10: {title}, 2 epochs at 32 pixels" in begun.told
    assert f"6 of 10: {title}, 2 epochs at 32 pixels: there already" not in begun.told
    assert "continues from" in begun.told
    told_again, _ = finished(root, out, *two)
    assert contents(out / "sorted" / "predictions") == contents(straight / "sorted" / "predictions")
    assert "DistributedDataParallel" in told_again or "DistributedDataParallel" in begun.told
    end = "Open this in a browser"
    assert end in told
    ends = [re.search(r"^\d+ images in \d+ categories.*", text, re.M | re.S) for text in (told, told_again)]
    assert ends[0].group().replace("straight", "out") == ends[1].group()
    # every image is in the table, or named as unreadable; the sizes are theirs
    rows = [row for part in (out / "sorted" / "predictions").glob("*.csv") for row in csv.DictReader(part.open())]
    images = {str(path.relative_to(root / "pile")) for path in (root / "pile").rglob("*.png")}
    assert {row["path"] for row in rows} == images - {"damaged.png"}
    with open(out / "sizes.csv") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == len(rows)
    assert (
        "1 images cannot be read or do not decode, and had no part in training, the first: unlabelled/damaged.png"
        in told_again
    )
    assert "1 images of the unlabelled ones cannot be read" in told_again
    assert re.search(r"test images, All / Old / New, %", told_again)
    assert (out / "page.html").read_text().startswith("<!doctype html>")
    # a third start makes nothing again
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    told_third, _ = finished(root, out, *two)
    assert told_third.count("there already") == 10
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert {path.name for path in changed} == {"sizes.csv"}
    # what it wrote is read by the commands that stand alone
    alone = [sys.executable, "-m", "sptnet", "train", str(out / "simgcd.yaml"), f"run={tmp_path / 'alone'}"]
    subprocess.run(alone, env=ENVIRONMENT, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "alone" / "finished").exists()


@pytest.mark.slow
def test_noise_is_said_to_be_noise(tmp_path):
    draws = np.random.default_rng(0)
    for number in range(400):
        place = f"named/{number % 5}" if number < 150 else "pile"
        save(tmp_path / place / f"{number}.png", draws.integers(0, 256, (32, 32, 3), np.uint8))
    told, warned = finished(tmp_path, tmp_path / "out", "--new", "5")
    assert "the backbone does not tell the named classes apart" in warned
    assert "the backbone does not tell the named classes apart" in told[told.index("What looks wrong") :]


@pytest.mark.slow
def test_one_class_and_thirty_images_are_said(tmp_path):
    digits = load_digits()
    for number in range(30):
        place = "named/3" if digits.target[number] == 3 else "pile"
        save(tmp_path / place / f"{number}.png", (digits.images[number] * 15.9).astype(np.uint8))
    told, warned = finished(tmp_path, tmp_path / "out", "--new", "4")
    for text in (warned, told[told.index("What looks wrong") :]):
        assert "has one class, 3" in text
        assert "only 30 images" in text
    assert os.path.exists(tmp_path / "out" / "page.html")
