"""Models, tokens, listings, configurations and folders that come from elsewhere, and what they may not do."""

import io
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from rich.console import Console
from safetensors.torch import save_file as save_torch
from sptnet_shards.conversion.record import Conversion
from sptnet_shards.show import under_way
from sptnet_shards.source import SourceError
from sptnet_shards.tars.members import parsed
from sptnet_shards.tars.places import RemotePlace

from sptnet.config import ConfigError
from sptnet.config_file import load_config
from sptnet.data.features import FeaturesError, read_fingerprint
from sptnet.data.format.faults import DatasetError
from sptnet.data.image import DecodeError, decode
from sptnet.data.listing import ListedSource, ListingError
from sptnet.data.storage.cache import NodeCache
from sptnet.data.storage.remote import Remote
from sptnet.data.tokens import DamagedTokensError, TokenPart, TokenShape
from sptnet.method.families import BackboneError
from sptnet.method.reference import load_reference
from sptnet.report.history import history_of
from sptnet.run.folder import RunError
from sptnet.run.metrics_log import MetricsLog
from sptnet.run.model_file import number_of_classes
from sptnet.run.provenance import read_starts
from sptnet.run.trackers import Trackers

URLS = {
    "reference://x": "use s3", "filecache://x": "use s3", "zip://x": "use s3", "simplecache::s3://a/b": "joins several",
    "s3::zip://a": "joins several", "https://user:word@host/shards": "password",
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_opens_more_than_a_folder_or_tells_a_password(url, tmp_path):
    with pytest.raises(ConfigError, match=URLS[url]) as refused:
        load_config("cub", [f"data.root={url}"])
    assert len(str(refused.value).splitlines()) == 1
    assert "word@" not in str(refused.value)
    with pytest.raises(DatasetError, match=URLS[url]):
        Remote(url, 1, 1.0, {})
    with pytest.raises(SourceError, match=URLS[url]):
        RemotePlace(url)


@pytest.mark.parametrize("url", ["http://[::1/x", "http://localhost:99999/x"])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(SourceError, match=r"cannot be re|joins several"):
        RemotePlace(url).sizes()


def tiff(pixels):
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "TIFF")
    return written.getvalue()


@pytest.mark.parametrize(
    "pixels",
    [np.linspace(0, 1, 64, dtype=np.float32), np.full(64, np.nan, np.float32), np.arange(64, dtype=np.int32) * 4,
     np.arange(64, dtype=np.int32) << 18, -np.arange(64, dtype=np.int32)],
    ids=["floats", "nan", "bytes as int32", "24 bits", "negative"],
)  # fmt: skip
def test_pixels_of_which_nobody_knows_what_is_white_are_not_black(pixels):
    with pytest.raises(DecodeError, match="nobody knows what is white"):
        decode(tiff(pixels.reshape(8, 8)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_sixteen_bits_are_scaled(dtype):
    assert decode(tiff((np.arange(64, dtype=dtype) * 1024).reshape(8, 8))).max() == 252


@pytest.mark.parametrize("shape", [(10**12, 0), (0, 4), (40_000, 1), (7,), ()])
def test_a_model_file_of_more_classes_than_it_has_bytes(shape, tmp_path):
    save_torch({"model.head.prototypes": torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="prototypes of shape"):
        number_of_classes(tmp_path)


def test_starts_that_never_end_are_not_read(tmp_path):
    (tmp_path / "starts.jsonl").symlink_to("/dev/zero")
    assert read_starts(tmp_path) == []
    (tmp_path / "starts.jsonl").unlink()
    os.mkfifo(tmp_path / "starts.jsonl")
    assert read_starts(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(60), b"\x93NUMPY\x01\x00v\x00{'descr': '<i8", b"x" * 99, b""]
)
def test_a_damaged_listing_is_named(content, tmp_path):
    (tmp_path / "listing.npy").write_bytes(content)
    (tmp_path / "listing.bin").write_bytes(b"a.jpg\0")
    with pytest.raises(ListingError, match=r"cannot be read .*remove the folder"):
        ListedSource(tmp_path, tmp_path)


HEAD = {"size": 1, "sha256": "a" * 64, "keyed": False, "keyless": "", "json_key": "label", "state": "",
        "remarks": [], "class_names": [], "images": 0}  # fmt: skip
COLUMNS = b"".join(
    np.array([value], dtype).tobytes() for value, dtype in ((7, "<i4"), (1, "<i8"), (1, "<i8"), (0, "<i8"))
)


@pytest.mark.parametrize(
    "encoded",
    [b'{"images": 1e400}\n', json.dumps(HEAD | {"sha256": 3}).encode() + b"\n", b"[" * 9999,
     json.dumps(HEAD | {"size": "1"}).encode() + b"\n", json.dumps(HEAD | {"images": -1}).encode() + b"\n",
     json.dumps(HEAD | {"images": 1, "class_names": ["a"]}).encode() + b"\n" + COLUMNS + b"x"],
    ids=range(6),
)  # fmt: skip
def test_a_list_of_a_tar_s_members_is_what_was_written_or_nothing(encoded):
    assert parsed(json.dumps(HEAD).encode() + b"\n") is not None
    assert parsed(encoded) is None


def test_fingerprints_of_features_nested_without_end(tmp_path):
    (tmp_path / "features.json").write_text("[" * 100_000)
    with pytest.raises(FeaturesError, match="cannot be read"):
        read_fingerprint(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [{"uid": torch.zeros(3, dtype=torch.bfloat16)}, {"uid": torch.tensor(3)}, {"target": torch.zeros(2, dtype=torch.int64)},
     {"features": torch.zeros(3, 4, dtype=torch.int64)}, {"features": torch.zeros(3)}, {"features": None}],
    ids=range(6),
)  # fmt: skip
def test_features_of_another_type_or_shape(tensors, tmp_path):
    from sptnet.data.features import Part

    whole = {"uid": torch.arange(3), "target": torch.arange(3), "features": torch.zeros(3, 4)} | tensors
    save_torch({k: v for k, v in whole.items() if v is not None}, tmp_path / "p.safetensors", {"fingerprint": "d"})
    with pytest.raises(FeaturesError, match="remove it and make it again"):
        Part(tmp_path / "p.safetensors", 3, "d")


@pytest.mark.parametrize(
    ("tensors", "absent"),
    [({"uid": torch.zeros(3, dtype=torch.bfloat16)}, "{}"), ({"uid": torch.zeros(3)}, "{}"), ({}, "[]"), ({}, "[" * 99_999),
     ({"check": torch.zeros(3, dtype=torch.int64)}, "{}"), ({"target": torch.tensor(1)}, "{}")],
    ids=range(6),
)  # fmt: skip
def test_tokens_of_another_type_or_shape(tensors, absent, tmp_path):
    shape, path = TokenShape(2, 5, 4, "float16"), tmp_path / "labelled-000000.safetensors"
    whole = {"uid": torch.arange(3), "target": torch.arange(3), "check": torch.zeros(3, 2, dtype=torch.int64)}
    save_torch(whole | tensors, path, {"absent": absent})
    path.with_suffix(".tokens").write_bytes(bytes(3 * 2 * shape.row_bytes))
    with pytest.raises(DamagedTokensError):
        TokenPart(path, shape, "labelled", 3)


@pytest.mark.parametrize(
    "override", ["seed=0x" + "f" * 4000, f"seed={'9' * 4000}", "data={workers: 0x" + "f" * 999 + "}"]
)
def test_whole_numbers_without_end(override):
    with pytest.raises(ConfigError) as refused:
        load_config("cub", [override])
    assert len(str(refused.value)) < 400


ODD_SHAPES = {
    "positions of one dimension": {"0.pos_embed": torch.zeros(3)}, "no width": {"0.patch_embed.proj.weight": torch.zeros(0, 3, 2, 2)},
    "a block without end": {"0.blocks.1000000000.x": torch.zeros(1)}, "a class token alone": {"0.pos_embed": torch.zeros(1, 1, 24)},
}  # fmt: skip


ODD_TOLD = {"a block without end": r"has a block 1000000000: no published model has more than 256$"}


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_authors_checkpoints_of_odd_shapes(name, reference, tmp_path):
    state = torch.load(reference("reference_simgcd.pt"), weights_only=True)
    state = state.get("model", state) if isinstance(state, dict) else state
    torch.save(state | ODD_SHAPES[name], tmp_path / "odd.pt")
    with pytest.raises(BackboneError, match=rf"^\S+odd\.pt {ODD_TOLD.get(name, 'has shapes of no ViT')}"):
        load_reference(tmp_path / "odd.pt", num_heads=3)


def test_a_number_of_heads_that_does_not_fit(reference):
    with pytest.raises(BackboneError, match="num_heads does not fit"):
        load_reference(reference("reference_simgcd.pt"), num_heads=7)


def test_a_cache_of_somebody_else_is_not_believed(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    NodeCache(tmp_path / "cache", 1000)
    real, nobody = os.lstat, 65_534

    def theirs(path):
        told = list(real(path))
        told[4] = nobody
        return os.stat_result(told)

    monkeypatch.setattr(os, "lstat", theirs)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(DatasetError, match="belongs to another user"):
        NodeCache(tmp_path / "cache", 1000)
    monkeypatch.undo()
    (tmp_path / "cache").chmod(0o1777)
    with pytest.raises(DatasetError, match="anybody may write"):
        NodeCache(tmp_path / "cache", 1000)
    assert NodeCache(tmp_path / "cache" / "mine", 1000).folder.stat().st_mode & 0o077 == 0


def shown(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_words_of_a_conversion_are_text(tmp_path):
    counts = {"[/x]": 1}
    told = Conversion("x\x1b]0;owned\x07[/red]", {}, {}, "a" * 64, counts, counts, {}, [])
    (tmp_path / "conversion.json").write_bytes(TypeAdapter(Conversion).dump_json(told))
    text = shown(under_way(tmp_path))
    assert "\x1b" not in text
    assert "[/x]" in text


def test_the_name_of_a_run_is_no_markup(tmp_path):
    run = tmp_path / "a[/b]"
    run.mkdir(parents=True)
    config = load_config("cub", [f"run={run}"])
    with MetricsLog(config, 1, 0, dict, Trackers(config, (), 0), active=True) as log:
        log.summary(f"sptnet train: {run}", {"data": "x\x1b[2J[/y]"})
    assert "\x1b" not in (run / "log.txt").read_text()


def test_a_page_tells_no_keys_of_a_store(tmp_path):
    config = load_config("cub", ["data.remote.options={key: AKIA, secret: hush}", f"run={tmp_path}"])
    told = history_of(tmp_path, "simgcd", config, None)
    assert "secret: (not shown)" in told.config
    assert not re.search("AKIA|hush", told.config)
