"""Shards: what the tool writes, what other readers make of it, what damage is told."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from sptnet_shards.make_shards import main as make_shards
from sptnet_shards.protocol import labelled_positions
from sptnet_shards.sources import digits as digits_source
from sptnet_shards.sources import imagefolder

from sptnet.build import build_data
from sptnet.config_file import load_config
from sptnet.data.augment import choose_views
from sptnet.data.batches import ImageSteps, Views
from sptnet.data.format.faults import DatasetError
from sptnet.data.format.manifest import KINDS, read_manifest
from sptnet.data.image import DecodeError, decode
from sptnet.data.loader import train_batches
from sptnet.data.reader import ShardReader
from sptnet.data.storage.store import LocalStore

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_simgcd.yaml"


def batches(root, steps=range(6), workers=0, rank=0, world_size=1, tolerated=0, augment="affine"):
    config = load_config(CONFIG, [f"data.root={root}", "data.batch_size=48"])
    store, order = build_data(config)
    return list(
        train_batches(
            store, order, augment=augment, image_size=24, seed=0, steps=steps, workers=workers, rank=rank,
            world_size=world_size, tolerated=tolerated,
        )
    )  # fmt: skip


def test_counts_and_protocol(digits):
    store = LocalStore(digits)
    manifest = store.manifest
    assert (manifest.samples("labelled"), manifest.samples("unlabelled"), manifest.samples("test")) == (366, 1072, 359)
    source = digits_source.source()
    labelled = set(labelled_positions(source, 0.5, 0).tolist())
    indexes = {kind: np.concatenate([store.entries(s) for s in manifest.of_kind(kind)]) for kind in KINDS}
    assert set(indexes["labelled"]["uid"].tolist()) == labelled
    train = np.concatenate([indexes["labelled"], indexes["unlabelled"]])
    assert sorted(train["uid"]) == list(range(1438))
    for row in train:
        assert manifest.classes[row["target"]] == source.train[row["uid"]].class_name
    assert (indexes["labelled"]["target"] < 5).all()


def test_which_views_a_slot_has_is_decided_by_seed_step_and_slot(digits):
    """Of known ones, where tokens are kept: two that were the same in every step would train on two views for ever."""
    config = load_config("quickstart", [f"data.root={digits}", "data.batch_size=48"])
    store, order = build_data(config)
    steps = ImageSteps(store, order, Views("affine", 24, 3, lambda step: 2, 8, 0), (0, 48))
    for step in (0, 5):
        for slot in order.batch(step)[:6]:
            assert steps._chosen(step, slot, 2) == choose_views(8, 3, step, slot.number, 2)
    chosen = {tuple(steps._chosen(step, order.batch(step)[0], 2)) for step in range(20)}
    assert len(chosen) > 5


@pytest.mark.parametrize("views", [None, 8])
def test_another_seed_draws_other_views_of_the_same_images(digits, views):
    config = load_config("quickstart", [f"data.root={digits}", "data.batch_size=48"])
    store, order = build_data(config)
    told = []
    for seed in (0, 1):
        (batch,) = train_batches(
            store, order, augment="crop_flip", image_size=24, seed=seed, steps=range(1), workers=0, known_views=views
        )
        told.append(batch)
    assert np.array_equal(told[0].uids, told[1].uids)
    assert not np.array_equal(told[0].views, told[1].views)


def test_webdataset_reads_the_same_images_and_classes(digits):
    manifest, source = read_manifest(digits), digits_source.source()
    for kind, items in (("labelled", source.train), ("unlabelled", source.train), ("test", source.test)):
        shards = manifest.of_kind(kind)
        urls = [str(digits / shard.file) for shard in shards]
        read = {int(s["__key__"]): s for s in webdataset.WebDataset(urls, shardshuffle=False)}
        assert len(read) == manifest.samples(kind)
        reader = ShardReader(LocalStore(digits), shards)
        for number, shard in enumerate(shards):
            for position in range(shard.samples):
                ours = reader.read(number, position)
                theirs = read[ours.uid]
                assert theirs["png"] == ours.image == source.read(items[ours.uid].where)
                assert int(theirs["cls"]) == ours.target
        reader.close()


def test_same_source_same_bytes(digits, tmp_path, capsys):
    assert make_shards(["digits", str(tmp_path / "again")]) == 0
    assert read_manifest(tmp_path / "again") == read_manifest(digits)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").iterdir()}
    assert make_shards(["digits", str(tmp_path / "again")]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "again").iterdir()} == before
    assert make_shards(["digits", str(tmp_path / "again"), "--seed", "1"]) == 1
    assert "a conversion with other settings: --seed 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize("augment", ["affine", "crop_flip"])
def test_global_batches_are_the_same_bit_for_bit(digits, augment):
    whole = batches(digits, augment=augment)
    for world_size, workers in ((2, 0), (4, 0), (3, 0), (6, 0), (1, 1), (1, 3), (2, 3)):
        parts = [
            batches(digits, workers=workers, rank=r, world_size=world_size, augment=augment) for r in range(world_size)
        ]
        for step, batch in enumerate(whole):
            views = np.concatenate([part[step].views for part in parts], axis=1)
            assert np.array_equal(views, batch.views)
            assert np.array_equal(np.concatenate([part[step].uids for part in parts]), batch.uids)


def test_imagefolder(tmp_path, capsys):
    for part, count in (("train", 6), ("test", 2)):
        for name in ("ant", "bee", "cat"):
            for i in range(count):
                (tmp_path / "src" / part / name).mkdir(parents=True, exist_ok=True)
                pixels = np.full((9, 12, 3), 20 * i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "src" / part / name / f"{i}.jpg")
    assert make_shards(["imagefolder", str(tmp_path / "src"), str(tmp_path / "out"), "--old", "2"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ["ant", "bee", "cat"]
    assert [manifest.samples(kind) for kind in KINDS] == [6, 12, 6]
    (tmp_path / "src" / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    assert make_shards(["imagefolder", str(tmp_path / "src"), str(tmp_path / "bad"), "--old", "2"]) == 1
    assert "cat/0.jpg does not decode" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "manifest.json").exists()
    assert not list((tmp_path / "bad").glob("*.tmp"))
    with pytest.raises(imagefolder.SourceError, match="must leave old and new"):
        imagefolder.source(tmp_path / "src", 3)


def test_damage_is_told(digits, tmp_path):
    def damaged(name):
        return Path(shutil.copytree(digits, tmp_path / name))

    root = damaged("missing")
    (root / "test-000000.tar").unlink()
    with pytest.raises(DatasetError, match=r"test-000000\.tar is missing"):
        read_manifest(root)
    root = damaged("short")
    with open(root / "train-labelled-000003.tar", "r+b") as tar:
        tar.truncate(2000)
    with pytest.raises(DatasetError, match=r"train-labelled-000003\.tar has 2000 bytes"):
        read_manifest(root)
    root = damaged("index")
    (root / "train-labelled-000003.idx.npy").write_bytes(b"\x80\x04K\x01.")
    store = LocalStore(root)
    with pytest.raises(DatasetError, match=r"000003\.idx\.npy is not the index"):
        store.entries(store.manifest.of_kind("labelled")[3])
    root = damaged("other index")
    shutil.copy(root / "train-labelled-000002.idx.npy", root / "train-labelled-000003.idx.npy")
    with pytest.raises(DatasetError, match=r"rank 0: .*000003\.idx\.npy is not the index"):
        batches(root)
    root = damaged("pixels")
    for tar in root.glob("train-*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(DatasetError, match=r"rank 1: .*train-.*\.tar: sample \d+ does not decode"):
        batches(root, workers=1, rank=1, world_size=2)


def test_tolerated_damage_is_replaced_by_the_next_of_its_stream(digits, tmp_path):
    root = Path(shutil.copytree(digits, tmp_path / "damaged"))
    sound, store = batches(digits), LocalStore(root)
    victim = int(sound[2].uids[0])  # labelled
    for shard in store.manifest.of_kind("labelled"):
        for uid, _, offset, size in store.entries(shard).tolist():
            if uid == victim:
                with open(root / shard.file, "r+b") as tar:
                    tar.seek(offset)
                    tar.write(bytes(size))
    with pytest.raises(DatasetError, match=f"sample {victim} does not decode"):
        batches(root)
    order = build_data(load_config(CONFIG, [f"data.root={root}", "data.batch_size=48"]))[1]
    following = order.instead(order.batch(2)[0], 1).place
    stand_in = store.entries(store.manifest.of_kind("labelled")[following.shard])[following.position]["uid"]
    for workers, world_size in ((0, 1), (2, 1), (0, 2)):
        parts = [batches(root, workers=workers, rank=r, world_size=world_size, tolerated=1) for r in range(world_size)]
        replaced = [reason for part in parts for batch in part for reason in batch.replaced]
        assert len(replaced) == 1
        assert f"sample {victim} does not decode" in replaced[0]
        for step, batch in enumerate(sound):
            uids = np.concatenate([part[step].uids for part in parts])
            expected = batch.uids.numpy().copy()
            if step == 2:
                expected[0] = stand_in
            assert np.array_equal(uids, expected)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16", "1"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image = (
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000) if mode == "I;16" else image.convert(mode)
    )
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    decoded = decode(path.read_bytes())
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 8, 8))
    assert 50 < decoded.max() <= 255
    with pytest.raises(DecodeError):
        decode(path.read_bytes()[:20])
