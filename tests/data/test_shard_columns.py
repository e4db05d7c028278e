"""A manifest's shards as columns: the same as objects, whichever way they were read, refused for the same reasons."""

import hashlib
import io
import json
import pickle
import tracemalloc

import numpy as np
import pytest

from sptnet.data.format import shard_lines
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import (
    KINDS,
    Manifest,
    Shard,
    Shards,
    is_dataset,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from sptnet.data.format.shard_lines import split_manifest


def made(count: int, paths: bool = True, even: bool = False) -> list[Shard]:
    """Shards of uneven names and sizes, or of texts that are equally long."""
    draws = np.random.default_rng(0)
    shards = []
    for number in range(count):
        kind, stem = KINDS[number % 3], f"{'x' * (number % 7)}{number}"
        if even:
            kind, stem = "labelled", f"{number:06d}"
        digests = [draws.bytes(32).hex() for _ in range(3)]
        tail = (f"{stem}.paths.jsonl", digests[2]) if paths else ()
        samples, size = (1 + number % 9, 10**8 + number) if even else (number, 10**4 * (number + 1))
        shards.append(Shard(f"{stem}.tar", f"{stem}.idx.npy", kind, samples, size, *digests[:2], *tail))
    return shards


def manifest_of(shards: list[Shard], **more: object) -> Manifest:
    return Manifest("made", ["ant", "bee"], 1, {"seed": 0}, shards, **more)  # type: ignore[arg-type]


def text_of(manifest: Manifest) -> bytes:
    return b"".join(manifest.encoded())


def digest_of(manifest: Manifest) -> str:
    """By Python's own JSON, a shard at a time: what versions before wrote into checkpoints and fingerprints."""
    told = {**vars(manifest), "schema": "sptnet-shards/2", "shards": [vars(shard).copy() for shard in manifest.shards]}
    for record in told["shards"]:
        del record["paths"], record["paths_sha256"]
    del told["num_new"], told["unknown"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("paths", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 50, 7000])
def test_lines_and_any_other_form_give_the_same(count, paths, even):
    shards, skipped = made(count, paths, even), [{"uid": 9, "part": "train", "file": "a/b.jpg"}] * 3
    written = manifest_of(shards, skipped=skipped)
    text = text_of(written)
    assert json.loads(text)["shards"] == [vars(shard) for shard in shards]
    assert split_manifest(io.BytesIO(text)) is not None
    other = json.dumps(json.loads(text)).encode()
    assert split_manifest(io.BytesIO(other)) is None
    for read in (parse_manifest(text, "m"), parse_manifest(other, "m"), pickle.loads(pickle.dumps(written))):
        assert list(read.shards) == shards
        assert read == written
        assert read.digest() == digest_of(written)
        assert text_of(read) == text
        for kind in KINDS:
            of_kind = [shard for shard in shards if shard.kind == kind]
            assert list(read.of_kind(kind)) == of_kind
            assert list(read.of_kind(kind)[1:3]) == of_kind[1:3]
            assert read.samples(kind) == sum(shard.samples for shard in of_kind)
    assert written.shards[-1] == shards[-1]
    with pytest.raises(IndexError):
        written.shards[count]


def test_a_digest_quotes_names_as_json_does():
    names = ["plain", 'a "quote"', "häuser", "鳥"]
    shards = [Shard(f"{n}.tar", f"{n}.npy", "test", 0, i, "a" * 64, "0" * 64) for i, n in enumerate(names)]
    for some in (shards, shards[:1], shards[1:]):
        assert manifest_of(some).digest() == digest_of(manifest_of(some))


FAULTS = {
    "a name twice": lambda raw: raw[1].update(index=raw[2]["index"]),
    "a tar twice of a kind": lambda raw: raw[3].update(file=raw[0]["file"]),
    "a tar and an index": lambda raw: raw[1].update(index=raw[2]["file"]),
    "a tar of two sizes": lambda raw: raw[1].update(file=raw[0]["file"], bytes=raw[0]["bytes"] + 1),
    "a path": lambda raw: raw[1].update(file="../x.tar"),
    "hidden": lambda raw: raw[1].update(file=".x.tar"),
    "a huge count": lambda raw: raw[1].update(bytes=2**53 + 1),
    "too many samples": lambda raw: raw[1].update(samples=raw[1]["bytes"]),
    "upper case": lambda raw: raw[1].update(sha256="A" * 64),
    "short": lambda raw: raw[1].update(index_sha256="a" * 63),
    "another kind": lambda raw: raw[1].update(kind="train"),
    "a key more": lambda raw: raw[1].update(more=1),
    "paths without digest": lambda raw: raw[1].update(paths_sha256=None),
    "a digit that is none": lambda raw: raw[1].update(sha256="g" + raw[1]["sha256"][1:]),
}  # fmt: skip


FAULTS_OF_TEXT = {
    "a count with a zero before it": (b'"samples": 1,', b'"samples": 01,'),
    "another key": (b'"bytes": 100000001,', b'"bites": 100000001,'),
    "a sign": (b'"bytes": 100000001,', b'"bytes": -10000001,'),
}


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_TEXT])
def test_what_is_refused_is_refused_in_lines_too(fault, even):
    text = text_of(manifest_of(made(50, even=even)))
    parse_manifest(text, "m")
    if fault in FAULTS_OF_TEXT:
        sound, wrong = FAULTS_OF_TEXT[fault]
        text = text.replace(b'"bytes": 20000,', b'"bytes": 100000001,').replace(sound, wrong)
    else:
        raw = json.loads(text)
        FAULTS[fault](raw["shards"])
        text = (json.dumps(raw, indent=1) + "\n").encode()
    with pytest.raises(DatasetError, match=r"^m is (malformed|not valid JSON)"):
        parse_manifest(text, "m")


def test_a_list_of_shards_elsewhere_is_not_taken_for_theirs():
    """The lines that shards have, below another key: JSON decides whose they are."""
    manifest = manifest_of(made(3))
    raw = json.loads(text_of(manifest))
    raw["protocol"] = {"other": 1, "shards": [vars(made(5)[4])]}
    shards = raw.pop("shards")
    text = json.dumps({**raw, "shards": []}, indent=1).replace('\n  "shards"', '\n "shards"').replace("\n    ", "\n   ")
    text = text.replace("\n   {", "\n  {").replace("\n   }", "\n  }").replace("\n  ]", "\n ]")
    assert split_manifest(io.BytesIO(text.encode())) is not None
    with pytest.raises(DatasetError, match="has no shards"):
        parse_manifest(text.encode(), "m")
    text = text.replace('"shards": []', f'"shards": {json.dumps(shards)}')
    assert list(parse_manifest(text.encode(), "m").shards) == made(3)


def test_a_tar_may_have_two_indexes():
    first, second, third = made(3)
    both = Shard(first.file, second.index, second.kind, 1, first.bytes, first.sha256, second.index_sha256)
    assert len(manifest_of([first, both, third]).shards) == 3


def test_nothing_of_a_shard_is_kept_but_its_columns():
    """Of 20,000 shards, 40 times as many bytes as a piece: 250 bytes each and two pieces, read or kept."""
    text = text_of(manifest_of(made(20_000)))
    tracemalloc.start()
    manifest = parse_manifest(text, "m")
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest.shards) == 20_000
    assert kept < 250 * 20_000
    assert most < 250 * 20_000 + 8 * shard_lines.CHUNK


def test_the_digits_are_read_by_lines(digits):
    with (digits / "manifest.json").open("rb") as file:
        split = split_manifest(file)
    assert split is not None
    assert split.shards == read_manifest(digits).shards


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_of_many_shards_is_known_as_one(tmp_path, before):
    """Their schema is the last thing in it; a tool may write it first."""
    digest = "0" * 64
    shards = [Shard(f"{n}.tar", f"{n}.idx.npy", "labelled", 1, 10**4, digest, digest) for n in range(9000)]
    write_manifest(tmp_path, Manifest("made", ["ant", "bee"], 1, {}, Shards.of(shards)))
    if before:
        told = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps({"schema": told.pop("schema")} | told))
    assert (tmp_path / "manifest.json").stat().st_size > 2**20
    assert is_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"photos": [0] * 10**6}))
    assert not is_dataset(tmp_path)
