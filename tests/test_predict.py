"""Predictions for images that come as users have them: damaged, oddly named, many, on any number of processes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import Forked, ran
from launching import ROOT, contents
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sptnet
from sptnet.cli import main
from sptnet.data import listing
from sptnet.data.format.manifest import KINDS
from sptnet.data.storage.store import LocalStore
from sptnet.run.model_file import ModelFacts, save_model

ODD = ["with space.png", "new\nline.png", 'quo"te, comma.png', os.fsdecode(b"latin-\xe9.png"), "ünï.PNG"]


def rows(out):
    """The table, part by part, in order."""
    found = []
    for path in sorted((out / "predictions").glob("*.csv")):
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            found += list(csv.DictReader(file))
    return found


def errors(out):
    with open(out / "errors.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """1,000 images in nested folders, 10 of them damaged, some with odd names; and what is no image."""
    root = tmp_path_factory.mktemp("pile") / "pile"
    draws = np.random.default_rng(0)
    for number in range(1000):
        name = ODD[number] if number < len(ODD) else f"{number:04d}.png"
        path = root / f"d{number % 7}" / "deep er" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((24 + number % 5, 24), Image.Resampling.BICUBIC).save(path)
        if number % 100 == 50:
            path.write_bytes(path.read_bytes()[: number % 90])
    (root / "notes.txt").write_text("no image")
    (root / "manifest.json").write_text('{"photos": 1000}')  # of a tool that fetched them
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def predicted(untrained, pile, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "out"
    assert main(["predict", str(untrained), str(pile), "--out", str(out), "--embeddings"]) == 0
    return out


def test_damaged_images_are_listed_and_shift_nobody(untrained, pile, predicted):
    table, bad = rows(predicted), errors(predicted)
    assert (len(table), len(bad)) == (990, 10)
    everyone = [os.fsdecode(name) for name in listing.images_below(pile)]
    damaged = {str(p.relative_to(pile)) for n in range(50, 1000, 100) for p in pile.rglob(f"{n:04d}.png")}
    assert {row["path"] for row in bad} == damaged
    assert all(row["error"] for row in bad)
    assert [row["path"] for row in table] == [name for name in everyone if name not in damaged]
    assert {Path(row["path"]).name for row in table} >= set(ODD)
    # each row is of its own image
    run = sptnet.load(untrained, "cpu")
    tokens = np.concatenate([np.load(path) for path in sorted((predicted / "embeddings").iterdir())])
    assert tokens.shape == (990, 48)
    for number in (0, 7, 333, 989):
        np.testing.assert_allclose(tokens[number], run.features([pile / table[number]["path"]])[0], atol=1e-4)
    alone = run.predict([pile / row["path"] for row in table[::50]])
    assert alone["class_name"] == [row["class_name"] for row in table[::50]]


def test_rows_say_what_the_columns_promise(untrained, predicted):
    about = json.loads((predicted / "predict.json").read_text())
    assert "not calibrated" in about["note"]
    assert about["classes"][5:] == [f"new-{n:03d}" for n in range(5)]
    table = rows(predicted)
    assert {row["is_new"] for row in table} == {"True", "False"}
    for row in table:
        assert row["class_name"] == about["classes"][int(row["class_id"])] == row["top1_class"]
        assert (row["is_new"] == "True") == (int(row["class_id"]) >= 5)
        assert row["nearest_old_class"] in about["classes"][:5]
        assert -1 <= float(row["nearest_old_similarity"]) <= 1
        shares = [float(row[f"top{n}_confidence"]) for n in range(1, 6)]
        assert shares == sorted(shares, reverse=True)
        assert float(row["confidence"]) == shares[0]
        assert float(row["margin"]) == pytest.approx(shares[0] - shares[1], abs=2e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_files(untrained, pile, predicted, tmp_path, processes):
    command = ["-m", "sptnet", "predict", untrained, pile]
    world = ran([*command, "--out", tmp_path / "out", "--embeddings", "--workers", "1"], "ddp", processes)
    assert world.returncode == 0, world.stderr[-3000:]
    assert f"DistributedDataParallel on {processes} processes" in world.stderr
    assert "not calibrated" in world.stderr
    assert contents(tmp_path / "out") == contents(predicted)


def test_killed_it_goes_on(untrained, pile, predicted, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "sptnet", "predict", untrained, pile, "--out", out, "--embeddings"]
    process = Forked(command)
    while not list(out.glob("predictions/*.csv")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    there = {path: path.stat().st_mtime_ns for path in out.glob("predictions/*.csv")}
    assert 1 <= len(there) < 4
    assert ran(command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert {n: c for n, c in contents(out).items() if not n.endswith(".tmp")} == contents(predicted)


def test_predictions_are_those_of_the_evaluator(untrained, digits, tmp_path):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    assert main(["eval", str(run)]) == 0
    evaluated = np.load(run / "predictions.npz")
    assert main(["predict", str(run), str(digits), "--out", str(tmp_path / "out")]) == 0
    table = {row["path"]: int(row["class_id"]) for row in rows(tmp_path / "out")}
    assert len(table) == 1072 + 359
    store = LocalStore(digits)
    for protocol in ("unlabelled", "test"):
        shards = store.manifest.of_kind(protocol)
        paths = {
            uid: path
            for shard in shards
            for uid, path in zip(store.entries(shard)["uid"].tolist(), store.paths(shard), strict=True)
        }
        uids, classes = evaluated[f"{protocol}_uid"], evaluated[f"{protocol}_prediction"]
        assert [table[paths[uid]] for uid in uids.tolist()] == classes.tolist()
        assert len(set(classes.tolist())) >= 3
    assert errors(tmp_path / "out") == []


@pytest.mark.slow
def test_all_splits_of_shards(untrained, digits, tmp_path):
    assert main(["predict", str(untrained), str(digits), "--out", str(tmp_path / "o"), "--splits", *KINDS]) == 0
    assert len(rows(tmp_path / "o")) == 1797


def test_a_csv_lists_images_and_parquet_holds_the_same(untrained, pile, predicted, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    wanted = rows(predicted)[100:160]
    names = pile / "list.csv"
    with open(names, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "image"], *([n, row["path"]] for n, row in enumerate(wanted)), [99, "gone.png"]])
    arguments = ["predict", str(untrained), str(names), "--out", str(tmp_path / "out"), "--top", "2"]
    assert main([*arguments, "--format", "parquet", "--embeddings"]) == 0
    names.unlink()
    table = parquet.read_table(tmp_path / "out" / "predictions").to_pydict()
    assert table["path"] == [row["path"] for row in wanted]
    assert table["class_name"] == [row["class_name"] for row in wanted]
    np.testing.assert_allclose(table["confidence"], [float(row["confidence"]) for row in wanted], atol=1e-5)
    assert len(table["embedding"][0]) == 48
    assert "top3_class" not in table
    assert errors(tmp_path / "out") == [{"path": "gone.png", "error": "No such file or directory"}]


FINISHING = """
import sys
from pathlib import Path
from types import SimpleNamespace
from sptnet import predict
out, rank = Path(sys.argv[1]), int(sys.argv[2])
predict.rank = lambda: rank
parts = SimpleNamespace(is_missing=lambda part: False, errors=lambda part: out / "none")

class Three:
    def __len__(self):
        return 3

    def size(self, part):
        return 5

for _ in range(300):
    assert predict._finish(out, Three(), parts) == (15, 0)
"""


def test_processes_that_finish_in_the_same_moment_do_not_take_each_others_file(tmp_path):
    racing = [
        subprocess.Popen([sys.executable, "-c", FINISHING, str(tmp_path), str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in racing:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told
    assert errors(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["errors.csv"]


def test_a_listing_is_read_by_parts(tmp_path):
    names = [f"{number}".encode() for number in range(20_000)]
    listing.write_listing(tmp_path, iter(names))
    source = listing.ListedSource(tmp_path, tmp_path)
    assert source.part_size == 512
    assert [name for part in range(len(source)) for name in source.names(part)] == names
    assert sum(source.size(part) for part in range(len(source))) == 20_000
    assert source.read(3, range(5, 7))[1].uid == 3 * 512 + 6


def test_mistakes_are_one_line(untrained, pile, predicted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "manifest.json").write_text("[]")
    (tmp_path / "no_column.csv").write_text("file\na.png\n")
    (tmp_path / "semicolons.csv").write_text("id;image\n1;a.png\n")
    (tmp_path / "no_path.csv").write_text("image,x\n,1\n")
    (tmp_path / "full").symlink_to("/dev/full")
    no_model = Path(shutil.copytree(untrained, tmp_path / "no_model"))
    (no_model / "model.safetensors").unlink()
    cases = {
        ("nowhere", str(pile), "o1"): "nowhere is not a run",
        (str(no_model), str(pile), "o2"): "has the run been trained?",
        (str(untrained), str(tmp_path / "empty"), "o3"): "empty holds no image",
        (str(untrained), str(tmp_path / "fetched"), "o2b"): "and its manifest.json is none of shards",
        (str(untrained), "nowhere", "o4"): "nowhere is neither a folder of images",
        (str(untrained), str(tmp_path / "no_column.csv"), "o5"): "has no column 'image'",
        (str(untrained), str(tmp_path / "semicolons.csv"), "o5b"): "its first line has 'id;image'",
        (str(untrained), str(next(pile.rglob("*.png"))), "o5c"): "is an image: name the folder",
        (str(untrained), str(tmp_path / "no_path.csv"), "o6"): "line 2: the column image holds no path",
        (str(untrained), str(pile), "/dev/null/o"): "/dev/null/o cannot be written: Not a directory",
        (str(untrained), str(pile), str(predicted)): "holds results of something else (embeddings: True there",
    }
    for (run, images, out), told in cases.items():
        out = out if out.startswith("/") else str(tmp_path / out)
        assert main(["predict", run, images, "--out", out]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert told in lines[0]
    assert main(["predict", str(untrained), str(pile), "--out", str(tmp_path / "o7"), "--splits", "test"]) == 2
    assert "--splits is for shards, and" in capsys.readouterr().err
    assert not (tmp_path / "o4").exists()  # the right path is not compared with the wrong one


def test_images_that_came_since_are_told_of(untrained, pile, tmp_path, monkeypatch, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(pile.rglob("00[12]*.png"))[:9]:
        shutil.copy(path, some)
    (some / "a.HEIC").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", str(untrained), "some", "--out", "sorted"]
    assert main(arguments) == 0
    assert "some has files that are left out for their suffix: 1 .heic; images are .bmp" in capsys.readouterr().err
    monkeypatch.chdir(some)  # the same folder, and the same model, by other names
    again = ["predict", os.path.relpath(untrained), str(some), "--out", "../sorted"]
    assert main(again) == 0
    assert "warning" not in capsys.readouterr().err
    about = json.loads((tmp_path / "sorted" / "predict.json").read_text())
    (tmp_path / "sorted" / "predict.json").write_text(json.dumps(about | {"images": "some"}))  # of a version before
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    monkeypatch.chdir(some)
    assert main(again) == 1
    assert "images: some there" in capsys.readouterr().err
    (tmp_path / "sorted" / "predict.json").write_text(json.dumps(about))
    shutil.copy(some / sorted(os.listdir(some))[0], some / "new.png")
    assert main(again) == 0
    told = capsys.readouterr().err
    assert re.search(r"warning: \S+some holds other images than when ../sorted was begun, .* name another --out", told)
    assert len(rows(tmp_path / "sorted")) == 9
    shutil.rmtree(some)  # and where they are gone nothing is compared
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0


def test_another_head_over_the_same_backbone_is_another_model(untrained, pile, tmp_path, capsys):
    other = Path(shutil.copytree(untrained, tmp_path / "other"))
    with safe_open(other / "model.safetensors", "pt") as opened:
        facts = json.loads(opened.metadata()["facts"]) | {"sha256": None}
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state["model.head.prototypes"] = state["model.head.prototypes"].flip(0)
    save_file(state, other / "model.safetensors", {"facts": json.dumps(facts)})
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(sorted(pile.rglob("00[12]*.png"))[0], some)
    assert main(["predict", str(untrained), str(some), "--out", str(tmp_path / "o")]) == 0
    assert main(["predict", str(other), str(some), "--out", str(tmp_path / "o")]) == 1
    assert "holds results of something else (head: " in capsys.readouterr().err


def test_a_link_to_a_folder_is_refused_as_a_conversion_does(untrained, pile, tmp_path, capsys):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "more").symlink_to(pile)
    assert main(["predict", str(untrained), str(tmp_path / "some"), "--out", str(tmp_path / "o")]) == 1
    assert "more is a link to a folder, which is not followed: put the folder there" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_what_is_there_stays(untrained, pile, tmp_path, capsys, monkeypatch):
    from sptnet.run import parts

    written, whole = [], parts.write_whole

    def until_full(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, content)

    monkeypatch.setattr(parts, "write_whole", until_full)
    arguments = ["predict", str(untrained), str(pile), "--out", str(tmp_path / "o")]
    assert main(arguments) == 1
    assert re.search(r"error: .* cannot be written: No space left on device; what was", capsys.readouterr().err)
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len(rows(tmp_path / "o")) == 990


def test_from_python_paths_images_and_arrays_are_the_same(untrained, pile):
    paths = sorted(pile.rglob("00[12]*.png"))[:9]
    run = sptnet.load(untrained)
    tokens = run.features(paths)
    assert (tokens.shape, tokens.dtype) == ((9, 48), np.float32)
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    assert np.array_equal(run.features(images), tokens)
    assert np.array_equal(run.features(arrays), tokens)
    table = run.predict([str(path) for path in paths], top=3)
    assert table["path"] == [str(path) for path in paths]
    assert all(len(column) == 9 for column in table.values())
    assert run.predict(arrays)["class_name"] == table["class_name"]
    assert all(len(column) == 0 for column in run.predict([]).values())
    with pytest.raises(sptnet.trained.ImageError, match=r"image 1, gone.png, cannot be read: No such file"):
        run.predict([paths[0], "gone.png"])
    with pytest.raises(sptnet.trained.ImageError, match=r"image 1, a ndarray, cannot be read: .* longer than 1000"):
        run.predict([arrays[0], np.zeros((1, 5000), np.uint8)])
    with pytest.raises(ValueError, match="is an array of float64"):
        run.features([np.zeros((4, 4, 3))])


def test_a_model_that_is_not_trained_to_its_end_says_so(untrained, pile, tmp_path, capsys):
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    (run / "finished").unlink()
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(sorted(pile.rglob("00[12]*.png"))[0], some)
    assert main(["predict", str(run), str(some), "--out", str(tmp_path / "out")]) == 0
    assert f"warning: {run} is not finished: its model.safetensors is of step 1" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="is not finished"):
        sptnet.load(run, "cpu")


def test_images_that_became_others_are_told_of(untrained, pile, tmp_path, capsys):
    """A camera that writes the same name again had the table of its first picture."""
    some, (first, second) = tmp_path / "some", sorted(pile.rglob("00[12]*.png"))[:2]
    some.mkdir()
    shutil.copy(first, some / "cam.png")
    arguments = ["predict", str(untrained), str(some), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "warning" not in capsys.readouterr().err
    shutil.copy2(second, some / "new.png")  # with its own, older time
    os.replace(some / "new.png", some / "cam.png")
    assert main(arguments) == 0
    assert "holds other images than when" in capsys.readouterr().err


def test_a_table_without_a_row_is_a_failure(untrained, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image\nsub\\a.jpg\n")
    assert main(["predict", str(untrained), str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 1
    assert "error: none of the images can be read" in capsys.readouterr().err


def test_an_image_of_pillow_s_is_what_its_path_is(tmp_path):
    """Photographs that lie on their side, and 16 bits of grey: paths were turned and scaled, images were not."""
    draws = np.random.default_rng(0)
    photo, scan = tmp_path / "photo.jpg", tmp_path / "scan.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draws.integers(0, 256, (40, 80, 3), np.uint8)).save(photo, exif=exif)
    Image.fromarray(draws.integers(0, 2**16, (30, 20), np.uint16)).save(scan)
    for path, shape in ((photo, (3, 80, 40)), (scan, (3, 30, 20))):
        by_path, by_image = (sptnet.trained._pixels(image, 0) for image in (path, Image.open(path)))
        assert by_path.shape == shape
        assert (by_path.int() - by_image.int()).abs().max() <= 1  # two readers of JPEG


def test_a_run_that_was_taken_along_needs_no_dataset(untrained, pile, tmp_path, capsys):
    taken = tmp_path / "taken"
    shutil.copytree(untrained, taken)
    config = yaml.safe_load((taken / "config.yaml").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (taken / "config.yaml").write_text(yaml.safe_dump(config))
    path = sorted(pile.rglob("00[12]*.png"))[0]
    told, wanted = (sptnet.load(folder, "cpu").predict([path]) for folder in (taken, untrained))
    assert {k: list(v) for k, v in told.items()} == {k: list(v) for k, v in wanted.items()}
    # a model file of before has no classes: then the manifest is asked
    run = sptnet.load(untrained, "cpu")
    save_model(taken, run.encoder.module.state_dict(), None, ModelFacts(1))
    assert main(["predict", str(taken), str(pile), "--out", str(tmp_path / "out")]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().err


def test_the_snippets_of_the_docs_run(untrained, pile, predicted, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    text = "".join((ROOT / file).read_text() for file in ("README.md", "docs/discover.md"))
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    (tmp_path / "runs" / "photos" / "sptnet").symlink_to(untrained)
    shutil.copytree(predicted, tmp_path / "sorted")
    for name, path in zip(("a.jpg", "b.jpg"), sorted(pile.rglob("00[12]*.png")), strict=False):
        shutil.copy(path, tmp_path / name)
    assert main(["export", "runs/photos/sptnet", "FOLDER"]) == 0
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)  # as a reader would, one after the other
    assert len(namespace["table"]["class_name"]) == 2
    assert namespace["logits"].shape == (1, 10)
