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
from forked import Forked, ran
from launching import contents
from read_tables import ODD, errors, rows

import sptnet
from sptnet.cli import main
from sptnet.data import listing
from sptnet.data.format.manifest import KINDS
from sptnet.data.storage.store import LocalStore


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
