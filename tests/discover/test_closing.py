"""What a journey ends with: of which stage, of which images, and which way round."""

import json
import os
from types import SimpleNamespace

import numpy as np

from sptnet.data.listing import write_listing
from sptnet.discover import closing
from sptnet.discover.diagnostics import Agreement, Group, Share, StageFacts, agreement, groups_of
from sptnet.discover.stages import Machine, checked, predict, train

MACHINE = Machine(1, 1, "no", 0)
RESULT = {"classes_used": 20, "classes": 20, "effective_classes": 18.0, "all": None, "samples": 2000}


def stage(name, own):
    return StageFacts(name, Share(own, 2000), Agreement(0.6, 0.1, 2000), RESULT, None)


def test_the_second_stage_is_judged_by_the_first(tmp_path):
    request = SimpleNamespace(unlabelled=tmp_path, then="sptnet", out=tmp_path)
    better, worse = [stage("SimGCD", 0.8), stage("SPTNet", 0.9)], [stage("SimGCD", 0.9), stage("SPTNet", 0.8)]
    assert closing._about_stages(tmp_path, request, better) == []
    (told,) = closing._about_stages(tmp_path, request, worse)
    assert told.startswith("SPTNet, whose categories these are, is worse than SimGCD before it")


def test_neighbours_are_judged_by_what_was_predicted(tmp_path, monkeypatch):
    """And not by the classes of a dataset that knows them."""
    draws = np.random.default_rng(0)
    categories = np.repeat(np.arange(4), 25)
    rows = (9 * np.eye(4)[categories] + 0.1 * draws.normal(size=(100, 4))).astype(np.float32)
    split = SimpleNamespace(uids=np.arange(100), blocks=lambda: iter([rows]))
    monkeypatch.setattr(closing, "FeatureFolder", lambda *_: SimpleNamespace(split=lambda kind: split))
    found = SimpleNamespace(uid=np.arange(100), category=categories, target=draws.permutation(categories))
    monkeypatch.setattr(closing, "read_predictions", lambda folder: {"unlabelled": found})
    monkeypatch.setattr(closing, "read_metrics", lambda folder: {"unlabelled": RESULT, "test": None})
    monkeypatch.setattr(closing, "own_class_share", lambda folder: Share(0.9, 100))
    assert closing.facts_of(tmp_path, "simgcd", None).neighbours.found == 1.0


def test_what_all_images_have_in_common_is_no_likeness():
    """The mean of the class tokens is taken off, and their lengths have no part."""
    draws = np.random.default_rng(1)
    groups = np.repeat(np.arange(5), 20)
    directions = draws.normal(size=(5, 16))[groups] + 0.3 * draws.normal(size=(100, 16))
    rows = draws.uniform(0.2, 5, (100, 1)) * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    tokens = SimpleNamespace(uids=np.arange(100), blocks=lambda: iter([(rows / 40 + 100).astype(np.float64)]))
    assert agreement(tokens, groups).found > 0.9


def test_the_nearest_old_class_of_a_category_is_that_of_most(tmp_path):
    (tmp_path / "predictions").mkdir()
    rows = "".join(f"{n},new-000,True,0.5,{near}\n" for n, near in enumerate(["a", "b", "b"]))
    table = tmp_path / "predictions" / "part-000000.csv"
    table.write_text("path,class_name,is_new,confidence,nearest_old_class\n" + rows)
    assert groups_of(tmp_path) == [Group("new-000", True, 3, 0.5, "b")]


def test_a_training_is_done_when_it_is_finished(tmp_path):
    """An evaluation of an unfinished run leaves all its other files."""
    request, run = SimpleNamespace(out=tmp_path), tmp_path / "simgcd"
    run.mkdir()
    for name in ("model.safetensors", "predictions.npz"):
        (run / name).touch()
    results = {split: RESULT | {"old": None, "new": None} for split in ("unlabelled", "test")}
    (run / "metrics.json").write_text(json.dumps({"method": "simgcd", **results}))
    training = train(request, "simgcd", "SimGCD", MACHINE)
    assert not training.is_done()
    (run / "finished").touch()
    assert training.is_done()


def test_predictions_of_an_older_model_are_made_again(tmp_path, digits):
    (tmp_path / "shards").symlink_to(digits)
    request = SimpleNamespace(out=tmp_path, then="sptnet", unlabelled=tmp_path / "pile")
    (tmp_path / "sptnet").mkdir()
    (tmp_path / "sptnet" / "model.safetensors").touch()
    for stage_of, out in (
        (checked(request, "sptnet", MACHINE), "checks/sptnet"),
        (predict(request, MACHINE), "sorted"),
    ):
        folder = tmp_path / out
        (folder / "predictions").mkdir(parents=True)
        write_listing(folder, iter([b"a.png"]))
        for part in range(64):
            (folder / "predictions" / f"part-{part:06d}.csv").touch()
        (folder / "errors.csv").touch()
        assert stage_of.is_done()
        os.utime(folder / "errors.csv", (1, 1))
        assert not stage_of.is_done()
