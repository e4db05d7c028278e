"""Trackers beside metrics.jsonl: one that fails is left out and told of, one that is not there is a mistake."""

import json

import pytest
from accelerate.tracking import TensorBoardTracker

from sptnet.cli import main

SMALL = ["schedule.epochs=1", "log_every=1",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 1, num_heads: 3}"]  # fmt: skip


@pytest.fixture
def train(digits, tmp_path):
    run = tmp_path / "run"
    return lambda *extra: main(["train", "quickstart_simgcd", f"run={run}", f"data.root={digits}", *SMALL, *extra]), run


def test_one_that_fails_on_the_way_is_left_out_and_training_goes_on(train, monkeypatch, caplog):
    go, run = train
    tried = []

    def fail(tracker, values, step):
        tried.append(step)
        raise ConnectionError("the server\nis gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    assert go("trackers=[tensorboard]") == 0
    assert len(tried) == 1
    told = [record.getMessage() for record in caplog.records if record.name == "sptnet.run.trackers"]
    assert told == ["tensorboard failed, no more is sent to it: ConnectionError: the server is gone"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "phase" in line] == list(range(11))


def test_one_that_does_not_start_is_one_line(train, monkeypatch, capsys):
    go, run = train

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    assert go("trackers=[tensorboard]") != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == "error: trackers: tensorboard does not start: OSError: no space"
    assert not (run / "finished").exists()


def test_one_that_nobody_asked_for_stops_nothing(train, monkeypatch, caplog):
    go, run = train

    def fail(*_):
        raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    assert go("trackers=null") == 0
    assert (run / "finished").exists()
    told = [record.getMessage() for record in caplog.records if record.name == "sptnet.run.trackers"]
    assert told == [
        "tensorboard is installed and does not start: TypeError: Descriptors cannot be created directly.; trackers=[] "
        "leaves it out"
    ]


def test_one_that_is_not_installed_is_one_line(train, monkeypatch, capsys):
    go, _ = train
    monkeypatch.setattr("sptnet.run.trackers.find_spec", lambda name: None)
    assert go("trackers=[mlflow]") == 2
    assert "error: trackers names mlflow, which is not installed: pip install mlflow" in capsys.readouterr().err
