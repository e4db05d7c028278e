"""Shards, runs and checkpoints of earlier versions are read, and mean what they meant."""

import json

import numpy as np
import pytest

from sptnet.cli import main


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["total"] for line in lines if "total" in line]


@pytest.mark.parametrize("name", ["simgcd", "sptnet"])
def test_a_finished_run_evaluates_as_it_did(before, name):
    metrics = json.loads((before / name / "metrics.json").read_text())
    predictions = dict(np.load(before / name / "predictions.npz"))
    (before / name / "metrics.json").unlink()
    assert main(["eval", name]) == 0
    now = json.loads((before / name / "metrics.json").read_text())
    for protocol in ("unlabelled", "test"):  # more is told now, and what was told is the same
        assert {key: now[protocol][key] for key in metrics[protocol]} == metrics[protocol]
    again = np.load(before / name / "predictions.npz")
    for key, values in predictions.items():
        assert np.array_equal(again[key], values), key


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(before, again):
    assert main(["train", "again.yaml"]) == 0
    # another processor rounds differently
    np.testing.assert_allclose(losses(before / "interrupted"), losses(before / "sptnet"), rtol=1e-4)
    assert "continues from interrupted/checkpoints/step-000000005" in (before / "interrupted" / "log.txt").read_text()
