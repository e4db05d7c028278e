"""A disk that fails for a moment: nothing is taken for damaged, replaced or removed, and the job may be tried again."""

import errno
import json
import os

import numpy as np
import pytest

from sptnet.build import build_data
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.data.format.faults import DatasetError, UnreachableError
from sptnet.data.format.manifest import read_manifest
from sptnet.data.format.presence import check_files
from sptnet.data.listing import STARTS, ListedSource, write_listing
from sptnet.data.loader import train_batches
from sptnet.data.tokens import PartWriter, TokenPart, TokenShape
from sptnet.run.checkpoint import CheckpointError, checkpoints, read_facts
from sptnet.run.folder import RunError
from sptnet.run.model_file import read_facts as read_facts_of_model


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, UnreachableError), (errno.EACCES, DatasetError)])
def test_no_sample_is_replaced_for_a_shard_that_cannot_be_opened(digits, monkeypatch, number, kind):
    config = load_config("quickstart", [f"data.root={digits}", "data.batch_size=48"])
    store, order = build_data(config)
    monkeypatch.setattr("sptnet.data.storage.store.open_regular", failing(number))
    batches = train_batches(
        store, order, augment="crop_flip", image_size=24, seed=0, steps=range(1), workers=0, tolerated=100
    )
    with pytest.raises(DatasetError, match="cannot be opened") as raised:
        next(batches)
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("number", "outcome", "told"),
    [
        (errno.EIO, "retry", "cannot be looked at: Input/output error"),
        (errno.ESTALE, "retry", "cannot be looked at: Stale file handle"),
        (errno.EACCES, "final", "cannot be looked at: Permission denied"),
        (errno.ENOENT, "final", "is missing: make the shards again"),
    ],
)
def test_shards_are_missing_only_where_the_disk_says_so(digits, monkeypatch, number, outcome, told):
    shards = read_manifest(digits).shards
    monkeypatch.setattr("sptnet.data.format.presence.os.stat", failing(number))
    with pytest.raises(DatasetError, match=told) as raised:
        check_files(digits, shards)
    assert raised.value.outcome == outcome


@pytest.mark.parametrize(("number", "outcome"), [(errno.ESTALE, "retry"), (errno.EACCES, "final")])
def test_a_checkpoint_is_not_to_be_removed(again, monkeypatch, number, outcome):
    monkeypatch.setattr("sptnet.run.checkpoint.read_json", failing(number))
    with pytest.raises(CheckpointError) as raised:
        read_facts(again.parent / "interrupted" / "checkpoints" / "step-000000005")
    assert raised.value.outcome == outcome
    assert ("remove the checkpoint" in str(raised.value)) == (outcome == "final")


@pytest.mark.parametrize(
    ("number", "outcome"), [(errno.EIO, "retry"), (errno.ESTALE, "retry"), (errno.EACCES, "final")]
)
@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_checkpoints_that_cannot_be_listed_are_not_none(again, monkeypatch, number, outcome, call):
    """A run that took them for none began anew, and removed them when the disk was there again."""
    run = again.parent / "interrupted"
    assert checkpoints(run)
    monkeypatch.setattr(f"sptnet.run.checkpoint.os.{call}", failing(number))
    with pytest.raises(CheckpointError, match=r"cannot be listed .*: nothing was started or removed") as raised:
        checkpoints(run)
    assert raised.value.outcome == outcome


@pytest.mark.parametrize(("number", "outcome"), [(errno.ESTALE, "retry"), (errno.EACCES, "final")])
def test_a_model_is_not_damaged_where_its_disk_fails(tmp_path, monkeypatch, number, outcome):
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("sptnet.run.model_file.safe_open", failing(number))
    with pytest.raises(RunError, match=rf"model\.safetensors cannot be read: {os.strerror(number)}$") as raised:
        read_facts_of_model(tmp_path)
    assert raised.value.outcome == outcome


def test_tokens_stay(tmp_path, monkeypatch):
    path, shape = tmp_path / "labelled-000000.safetensors", TokenShape(2, 3, 4, "float32")
    with PartWriter(path, shape, shape.rows_of("labelled")) as writer:
        writer.add(np.ones((2, 3, 4), np.float32), 7, 1, "")
        writer.finish()
    part, row = TokenPart(path, shape, "labelled", 1), np.zeros((3, 4), np.float32)
    part.read(0, 1, row)
    assert row.all()
    monkeypatch.setattr("os.preadv", failing(errno.ESTALE))
    with pytest.raises(UnreachableError, match="Stale file handle"):
        part.read(0, 0, row)
    assert path.exists()


def test_an_image_is_not_told_to_be_damaged(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    write_listing(tmp_path / "out", iter([b"a.png"]))
    assert (tmp_path / "out" / STARTS).exists()
    source = ListedSource(tmp_path / "out", tmp_path)
    assert source.read(0, range(1))[0].error == "No such file or directory"
    monkeypatch.setattr("sptnet.data.listing.read_regular", failing(errno.EIO))
    with pytest.raises(UnreachableError, match=r"a\.png cannot be read"):
        source.read(0, range(1))
    monkeypatch.undo()
    with pytest.raises(UnreachableError):  # all are gone: of a disk that is not mounted
        ListedSource(tmp_path / "out", tmp_path / "unmounted").read(0, range(1))


def test_a_local_objective_goes_on_with_as_many_ranks(again, capsys):
    """Each compares its own images: another number of ranks is another objective."""
    local = [str(again), "loss.scope=local", "resume.allow=[loss.scope]"]
    path = again.parent / "interrupted" / "checkpoints" / "step-000000005" / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"written_by": facts["written_by"] | {"world_size": 2}}))
    assert main(["train", *local]) == 1
    assert "world_size was 2, is 1, by which loss.scope=local compares other images" in capsys.readouterr().err
    assert main(["train", *local[:2], "resume.allow=[loss.scope, world_size]"]) == 0
