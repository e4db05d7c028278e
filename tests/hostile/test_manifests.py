"""Manifests and indexes that are damaged, mistaken or made to harm: each is one line that says what is wrong where."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sptnet_shards.make_shards import main

from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import parse_manifest, read_manifest
from sptnet.data.format.shard_index import INDEX_DTYPE, parse_index

SHARD = {
    "file": "train-labelled-000000.tar", "index": "train-labelled-000000.idx.npy", "kind": "labelled", "samples": 3,
    "bytes": 10240, "sha256": "a" * 64, "index_sha256": "b" * 64,
}  # fmt: skip
SOUND = {
    "name": "made", "classes": ["ant", "bee", "cat"], "num_old": 2, "protocol": {"seed": 0, "labelled_fraction": 0.5},
    "shards": [SHARD, {**SHARD, "kind": "test", "file": "test-000000.tar", "index": "test-000000.idx.npy"}],
    "transform": {}, "skipped": [], "schema": "sptnet-shards/2",
}  # fmt: skip

NO_COUNT = ["1", 1.0, -1, True, None, [], {}, 2**53 + 1, 10**30]
NO_TEXT = [None, 1, True, [], {}, ["ant"]]
NO_NAME = [*NO_TEXT, "", " ", "ant ", "\tant", "a\x00b", "a\x1b[2Jb", "a\nb", "a\u202eb", "[red]ant", "[/]", "x" * 500]
NO_FILE = [*NO_TEXT, "", ".", "..", "../x.tar", "/etc/passwd", "a/b.tar", "a\\b.tar", ".hidden", "a\x00.tar", "x" * 300]
NO_DIGEST = [*NO_TEXT, "", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "./../etc/cron.d/" + "a" * 48, "/" + "a" * 63,
             "a" * 64 + "\n", "\n" + "a" * 64]  # fmt: skip
NO_FACTS = [None, 1, "x", [], {"a": "\x1b[31m"}, {"\x00": 1}, json.loads("[" * 50 + "]" * 50),
            {"a": json.loads("[" * 20 + "]" * 20)}]  # fmt: skip


def cases():
    """(path to a value, what stands there instead)."""
    for key, values in (
        ("name", NO_NAME), ("num_old", [*NO_COUNT, 0, 4, 99]), ("protocol", NO_FACTS), ("transform", NO_FACTS),
        ("classes", [None, "ant", {}, [], ["ant", "ant", "bee"], ["ant"], [["ant"], "bee"], [1, 2, 3]]),
        ("shards", [None, {}, [], [[]], ["x"], [{}], [SHARD, SHARD], 3]),
        ("schema", ["sptnet-shards/1", None, 2, [], "x" * 99]),
        ("skipped", [None, {}, [1], [{}], [{"uid": -1, "part": "train", "file": "x"}],
                     [{"uid": 1, "part": "val", "file": "x"}], [{"uid": 1, "part": "train", "file": "x", "more": 1}]]),
        ("unknown", [1]),
    ):  # fmt: skip
        for value in values:
            yield (key,), value
    for value in NO_NAME:
        yield ("classes", 1), value
    for key, values in (
        ("file", NO_FILE), ("index", [*NO_FILE, SHARD["file"]]), ("kind", [*NO_TEXT, "train", "Test"]),
        ("samples", [*NO_COUNT, 11, 10**9, 2**53]), ("bytes", [*NO_COUNT, 0]), ("sha256", NO_DIGEST),
        ("index_sha256", NO_DIGEST), ("unknown", [1]),
    ):  # fmt: skip
        for value in values:
            yield ("shards", 0, key), value
    for key, values in (
        ("seed", NO_COUNT), ("labelled_fraction", ["0.5", 0, -1, 2, True, None, []]), ("labelled", [2, 4, 10**9]),
        ("test", [0]), ("source", [None, 1, [], {"train": "3"}, {"train": 2}, {"train": -1}, {"test": 9}]),
    ):  # fmt: skip
        for value in values:
            yield ("protocol", key), value


@pytest.mark.parametrize(("path", "value"), cases())
def test_a_field_that_is_not_as_it_must_be(path, value):
    raw = copy.deepcopy(SOUND)
    parse_manifest(json.dumps(raw).encode(), "manifest.json")
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DatasetError) as told:
        parse_manifest(json.dumps(raw).encode(), "manifest.json")
    assert str(told.value).isprintable()
    assert str(told.value).startswith("manifest.json ")


@pytest.mark.parametrize("key", [*(("shards", 0, key) for key in SHARD), *((key,) for key in SOUND if key not in
                                 ("transform", "skipped", "schema"))])  # fmt: skip
def test_a_field_that_is_missing(key):
    raw = copy.deepcopy(SOUND)
    place = raw
    for step in key[:-1]:
        place = place[step]
    del place[key[-1]]
    with pytest.raises(DatasetError, match="is malformed"):
        parse_manifest(json.dumps(raw).encode(), "manifest.json")


WHOLE = json.dumps(SOUND).encode()
NO_JSON = {
    "empty": b"", "cut": WHOLE[:-9], "deep": b"[" * 100_000, "deep objects": b'{"a":' * 100_000, "binary": b"\x80\x04K",
    "not UTF-8": WHOLE.replace(b"ant", b"\xff\xfe"), "NaN": WHOLE.replace(b"0.5", b"NaN"), "huge": b"9" * 10_000,
    "infinite": WHOLE.replace(b"0.5", b"1e999"), "surrogate": WHOLE.replace(b"ant", b"\\ud800"), "a list": b"[]",
    "null": b"null", "text": b'"x"', "twice": WHOLE.replace(b'"num_old": 2', b'"num_old": 2, "num_old": 1'),
    "behind": WHOLE + b"{}", "UTF-16": json.dumps(SOUND).encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json(kind, tmp_path, capsys):
    (tmp_path / "manifest.json").write_bytes(NO_JSON[kind])
    for command in ("verify", "show"):
        assert main([command, str(tmp_path)]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"error: {tmp_path / 'manifest.json'} ")
        assert len(told.splitlines()) == 1


def index_of(rows, shape=None):
    header = f"{{'descr': {INDEX_DTYPE.descr}, 'fortran_order': False, 'shape': ({shape or len(rows)},), }}"
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + np.array(rows, INDEX_DTYPE).tobytes()


ROWS = [(0, 0, 512, 9), (1, 1, 1536, 9), (2, 0, 2560, 9)]
MOST = 2**63 - 1
NO_INDEX = {
    "negative uid": index_of([(-1, 0, 512, 9), *ROWS[1:]]),
    "a uid twice": index_of([*ROWS[:2], ROWS[0]]),
    "target of a new class": index_of([(0, 2, 512, 9), *ROWS[1:]]),
    "negative target": index_of([(0, -1, 512, 9), *ROWS[1:]]),
    "huge target": index_of([(0, MOST, 512, 9), *ROWS[1:]]),
    "negative offset": index_of([(0, 0, -1, 9), *ROWS[1:]]),
    "outside": index_of([(0, 0, 10_239, 9), *ROWS[1:]]),
    "overflow": index_of([(0, 0, MOST, MOST), *ROWS[1:]]),
    "overflow of size": index_of([(0, 0, 512, MOST), *ROWS[1:]]),
    "no size": index_of([(0, 0, 512, 0), *ROWS[1:]]),
    "negative size": index_of([(0, 0, 512, -9), *ROWS[1:]]),
    "cut": index_of(ROWS)[:-1],
    "longer": index_of(ROWS) + b"x",
    "claims rows": index_of(ROWS, 10**9),
    "claims shape": index_of(ROWS, "3,1"),
    "empty": b"",
    "pickle": b"\x80\x04K\x01.",
    "version 2": index_of(ROWS).replace(b"\x01\x00", b"\x02\x00", 1),
    "other types": index_of(ROWS).replace(b"<i8", b"<f8"),
    "big-endian": index_of(ROWS).replace(b"<i8", b">i8"),
    "objects": index_of(ROWS).replace(b"'<i8'", b"'|O' "),
    "Fortran": index_of(ROWS).replace(b"False", b"True "),
    "header is long": b"\x93NUMPY\x01\x00\xff\xff" + index_of(ROWS)[10:],
    "header cut": index_of(ROWS)[:40],
    "only magic": b"\x93NUMPY",
    "far longer": index_of(ROWS) + bytes(10_000),
}


@pytest.mark.parametrize("kind", NO_INDEX)
def test_an_index_that_is_none(kind):
    encoded = NO_INDEX[kind]
    raw = {**SOUND, "shards": [{**SHARD, "index_sha256": hashlib.sha256(encoded).hexdigest()}, SOUND["shards"][1]]}
    shard = parse_manifest(json.dumps(raw).encode(), "m").shards[0]
    with pytest.raises(DatasetError, match=r"^x\.idx\.npy .*make the shards again$"):
        parse_index(encoded, shard, range(2), "x.idx.npy")
    sound = index_of(ROWS)
    digest = {"index_sha256": hashlib.sha256(sound).hexdigest()}
    shard = parse_manifest(
        json.dumps({**raw, "shards": [{**SHARD, **digest}, SOUND["shards"][1]]}).encode(), "m"
    ).shards[0]
    assert parse_index(sound, shard, range(2), "x").tolist() == ROWS


def test_a_manifest_of_before_keeps_its_digest(digits):
    """Whatever checks it: a run compares the digest with that of the data that it began with."""
    raw = json.loads((digits / "manifest.json").read_text())
    for added in ("num_new", "unknown"):
        del raw[added]
    raw["schema"] = "sptnet-shards/2"
    raw["shards"] = [{k: v for k, v in shard.items() if not k.startswith("paths")} for shard in raw["shards"]]
    assert read_manifest(digits).digest() == hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    assert parse_manifest(json.dumps(raw).encode(), "it").digest() == read_manifest(digits).digest()


def edited(digits, tmp_path, edit):
    """A copy of the digits whose first labelled index is edited, digests and all, as a careful forger would."""
    root = Path(shutil.copytree(digits, tmp_path / "edited"))
    raw = json.loads((root / "manifest.json").read_text())
    path = root / raw["shards"][0]["index"]
    index = np.load(path)
    edit(index)
    np.save(path, index)
    raw["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(raw))
    return root


def shift(index):
    index["uid"] += 10_000


def exchange(index):
    for field in ("offset", "size"):
        index[field][:2] = index[field][:2][::-1].copy()


def relabel(index):
    index["target"] = (index["target"] + 1) % 5


@pytest.mark.parametrize("edit", [shift, exchange, relabel])
def test_verify_sees_what_digests_do_not(digits, tmp_path, edit, capsys):
    root = edited(digits, tmp_path, edit)
    assert main(["verify", str(root)]) == 1
    told = capsys.readouterr().err
    assert "sample" in told
    assert "Traceback" not in told


def test_verify_says_that_a_part_is_empty(digits, tmp_path, capsys):
    root = Path(shutil.copytree(digits, tmp_path / "emptied"))
    raw = json.loads((root / "manifest.json").read_text())
    raw["shards"] = [shard for shard in raw["shards"] if shard["kind"] != "unlabelled"]
    raw["protocol"] = {}
    (root / "manifest.json").write_text(json.dumps(raw))
    assert main(["verify", str(root)]) == 1
    assert "has no unlabelled samples" in capsys.readouterr().err
