"""An evaluation's check and counts, spread over the ranks by uid: the same on any number of them, each fault named."""

import hashlib
import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sptnet import exact_counts
from sptnet.data.format.manifest import Manifest, Shard, write_manifest
from sptnet.data.format.shard_index import INDEX_DTYPE
from sptnet.data.storage.store import LocalStore
from sptnet.exact_counts import count_once, expected_uids, windows_of
from sptnet.run import predictions
from sptnet.run.folder import RunError
from sptnet.run.parts import PartsError
from sptnet.run.predictions import PredictionParts, load_predictions, save_predictions
from sptnet.strategy.collectives import rank, world_size

CLASSES, SAMPLES = 7, 6000
FAULTS = {
    "lost": "3 missing (uid ",
    "doubled": "1 there more than once (uid ",
    "strange": f"1 of no sample (uid {10**12})",
    "infinite": "2 with outputs that are not finite (uid ",
}


def rows_of_uids(uids: np.ndarray) -> np.ndarray:
    """A target and a prediction of each; every fifth image is of no known class."""
    targets = np.where(uids % 5 == 0, -1, uids % CLASSES)
    return np.stack([uids, targets, (uids // 3) % CLASSES, uids % 1000], axis=1)


def run(root: Path, out: Path, window: int, fault: str = "") -> dict:
    """Count and save what this rank would have predicted; what it was told stands in `out` too."""
    exact_counts.WINDOW, exact_counts.KEPT, predictions.KEPT = window, 4096, 4096  # nearly all goes to temporary files
    store = LocalStore(root, look=False)
    uids = np.concatenate(list(expected_uids(store, "unlabelled")))
    mine = uids[rank() * len(uids) // world_size() : (rank() + 1) * len(uids) // world_size()]
    if fault and rank() == world_size() - 1:
        others = {"lost": mine[3:], "doubled": np.append(mine, mine[:1]), "strange": np.append(mine, 10**12)}
        mine = others.get(fault, mine)
    parts = PredictionParts()
    told = rows_of_uids(mine)
    if fault == "infinite" and rank() == world_size() - 1:
        told[[5, 900], 3] = int(exact_counts.NOT_FINITE * exact_counts.MILLION)
    pieces = (told[begin : begin + 256] for begin in range(0, len(told), 256))

    def kept(part: int, found: exact_counts.Predictions) -> None:
        parts.add("unlabelled", part, found)

    out.mkdir(exist_ok=True)
    tracemalloc.start()
    try:
        counts = count_once(store, "unlabelled", pieces, CLASSES, torch.device("cpu"), kept)
        most = tracemalloc.get_traced_memory()[1]
    except exact_counts.EvaluationError as error:
        told = {"fault": str(error)}
    else:
        theirs = {"confusion": counts.confusion.tolist(), "sizes": counts.sizes.tolist()}
        theirs["confidence"] = counts.confidence
        save_predictions(out, parts, theirs, {"unlabelled": windows_of(len(uids))})
        told = {"counts": theirs, "most": most, "parts": len(list(parts))}
    finally:
        tracemalloc.stop()
    (out / f"{rank()}.json").write_text(json.dumps(told))
    return told


def rank_of_a_world(number: int, size: int, meeting: Path, root: Path, cases: list[tuple[Path, int, str]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=size)
    for case in cases:
        run(root, *case)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _windows(monkeypatch):
    for module, name in ((exact_counts, "WINDOW"), (exact_counts, "KEPT"), (predictions, "KEPT")):
        monkeypatch.setattr(module, name, getattr(module, name))


def made(root: Path, samples: int, shards: int) -> np.ndarray:
    """A dataset of indexes without tars: uids that leave out every fourth, dealt to unlabelled shards. Their uids."""
    uids = np.arange(samples * 4 // 3)
    uids = np.random.default_rng(0).permutation(uids[uids % 4 != 3])
    root.mkdir()
    found = []
    for number, mine in enumerate(np.array_split(uids, shards)):
        index = np.zeros(len(mine), INDEX_DTYPE)
        index["uid"], index["target"], index["offset"], index["size"] = mine, -1, 512, 9
        np.save(root / f"{number}.idx.npy", index)
        digest = hashlib.sha256((root / f"{number}.idx.npy").read_bytes()).hexdigest()
        found.append(
            Shard(f"{number}.tar", f"{number}.idx.npy", "unlabelled", len(mine), len(mine) * 2048, "0" * 64, digest)
        )
    found.append(Shard("l.tar", "l.npy", "labelled", len(uids) // 3, 10**9, "0" * 64, "0" * 64))
    write_manifest(root, Manifest("made", list("abcdefg"), 3, {}, found, num_new=4, unknown=True))
    return np.sort(uids)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("split") / "data"
    return root, made(root, SAMPLES, 7)


@pytest.fixture(scope="module")
def three(split, tmp_path_factory):
    """What three ranks made of windows of 500 and of one window, sound and with every fault."""
    folder = tmp_path_factory.mktemp("three")
    cases = [(folder / f"{window}{fault}", window, fault) for window in (500, 10**6) for fault in ("", *FAULTS)]
    given = 3, folder / "meeting", split[0], cases
    torch.multiprocessing.start_processes(rank_of_a_world, given, 3, start_method="fork")
    return folder


def told_by(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("window", [500, 10**6])
@pytest.mark.parametrize("processes", [1, 3])
def test_counts_and_files_are_those_of_all_rows_together(split, three, tmp_path, processes, window):
    root, uids = split
    out = three / str(window) if processes == 3 else tmp_path / "out"
    told = told_by(out) if processes == 3 else [run(root, out, window)]
    rows = rows_of_uids(uids)
    confusion = np.zeros((CLASSES, CLASSES), int)
    known = rows[rows[:, 1] >= 0]
    np.add.at(confusion, (known[:, 2], known[:, 1]), 1)
    for theirs in told:
        assert theirs["counts"]["confusion"] == confusion.tolist()
        assert theirs["counts"]["sizes"] == np.bincount(rows[:, 2], minlength=CLASSES).tolist()
        assert abs(theirs["counts"]["confidence"] - rows[:, 3].sum()) <= 1
    files = sorted(path.name.split(".")[0] for path in (out / "predictions").glob("*"))
    windows = -(-len(uids) // window)
    assert files == ([f"unlabelled-{part:06d}" for part in range(windows)] if windows > 1 else [])
    assert [theirs["parts"] for theirs in told] == [len(range(r, windows, processes)) for r in range(processes)]
    assert np.array_equal(np.stack(load_predictions(out)["unlabelled"]), rows[:, :3].T)


def test_files_are_the_same_on_any_number_of_ranks(split, three, tmp_path):
    run(split[0], tmp_path / "out", 500)
    contents = [
        {path.name: {name: values.tolist() for name, values in np.load(path).items()} for path in folder.rglob("*.npz")}
        for folder in (three / "500", tmp_path / "out")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == SAMPLES // 500 + 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("window", [500, 10**6])
def test_a_fault_is_named_on_every_rank(three, window, fault):
    folder = three / f"{window}{fault}"
    (line,) = {told["fault"] for told in told_by(folder)}
    assert line.startswith(f"of {SAMPLES} samples, ")
    assert FAULTS[fault] in line


def test_memory_is_that_of_a_window_however_many_samples_there_are(tmp_path):
    """Four times the samples in windows and shards of the same size."""
    most = []
    for samples in (60_000, 240_000):
        root = tmp_path / str(samples)
        made(root, samples, samples // 5000)
        most.append(run(root, tmp_path / f"out{samples}", 30_000)["most"])
    assert most[1] < 1.3 * most[0]


def test_parts_that_are_missing_or_damaged_are_told(split, tmp_path):
    run(split[0], tmp_path / "out", 1000)
    part = sorted((tmp_path / "out" / "predictions").glob("*"))[2]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunError, match=f"{part.name} is damaged"):
        load_predictions(tmp_path / "out")
    part.unlink()
    with pytest.raises(RunError, match=f"{part.name} is not there"):
        load_predictions(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_sentence(split, tmp_path, monkeypatch):
    """Of the device that is always full, in the place of temporary files."""
    full = partial(open, "/dev/full", "wb", 0)
    monkeypatch.setattr(exact_counts.tempfile, "SpooledTemporaryFile", lambda max_size: full())
    with pytest.raises(PartsError, match="cannot be written: No space left on device"):
        run(split[0], tmp_path / "out", 1000)


def test_another_evaluation_removes_the_parts_of_the_one_before(split, tmp_path):
    for window, parts in ((1000, 6), (2000, 3), (10**6, 0)):
        run(split[0], tmp_path / "out", window)
        assert len(list((tmp_path / "out" / "predictions").iterdir())) == parts
        assert len(load_predictions(tmp_path / "out")["unlabelled"][0]) == SAMPLES
