"""How many classes: Ward's tree with weights, Brent's search, the command."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import minimize_scalar
from sklearn.cluster import KMeans

from sptnet.cli import main
from sptnet.data.features import Split
from sptnet.method import class_count
from sptnet.method.class_count import estimate_by_brent, estimate_by_tree, grid
from sptnet.method.metrics import clustering_accuracy
from sptnet.method.ward import cut, ward_tree


def blobs(classes=30, each=40, width=16, spread=0.45, seed=0):
    draws = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), each)
    points = draws.standard_normal((classes, width))[targets] + spread * draws.standard_normal((len(targets), width))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    return points, targets, (targets < classes // 2) & (draws.random(len(targets)) < 0.5)


def same_partition(a, b):
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def test_the_tree_is_scipys_where_all_weights_are_one():
    points = blobs(each=10)[0]
    tree, theirs = ward_tree(points, np.ones(len(points))), linkage(points.astype(np.float64), "ward")
    np.testing.assert_allclose(tree[:, 2], theirs[:, 2] ** 2 / 2, rtol=1e-6)
    for number in (1, 2, 17, 30, 299, 300):
        assert same_partition(cut(tree, number), fcluster(theirs, number, "maxclust"))


def test_a_weight_is_as_many_points_in_one_place():
    draws = np.random.default_rng(0)
    points, weights = draws.standard_normal((60, 5)), draws.integers(1, 6, 60)
    theirs = linkage(np.repeat(points, weights, 0), "ward")
    for number in (2, 7, 20):
        ours = np.repeat(cut(ward_tree(points, weights), number), weights)
        assert same_partition(ours, fcluster(theirs, number, "maxclust"))


@pytest.mark.parametrize("seed", range(3))
def test_blobs_are_counted_by_the_tree(seed):
    points, targets, labelled = blobs(seed=seed)
    found = estimate_by_tree(points[labelled], targets[labelled], points[~labelled], 15, 120)
    assert found.median == pytest.approx(30, rel=0.1)
    assert found.low <= 30 <= found.high
    assert len(found.repeats) == 10


def test_brent_is_scipys_search():
    points, targets, labelled = blobs(classes=16, each=30)
    mine, others, told = points[labelled], points[~labelled], targets[labelled]
    found = estimate_by_brent(mine, told, others, 8, 60)
    everything = np.concatenate([mine, others])

    def loss(number):
        clusters = KMeans(int(number), n_init=1, max_iter=100, random_state=0).fit(everything).labels_[: len(told)]
        return -clustering_accuracy(told, clusters, 8).all

    plain = minimize_scalar(loss, bounds=(8, 60), method="bounded", options={"maxiter": 20}).x
    assert abs(found.median - int(plain)) <= 1
    assert found.low <= found.median <= found.high


def test_the_command_writes_numbers_a_picture_and_the_line(digits, untrained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "k"
    assert main(["estimate-k", str(digits), "--run", str(untrained), "--out", str(out), "--max-classes", "60"]) == 0
    told = capsys.readouterr().out
    result = json.loads((out / "estimate_k.json").read_text())
    assert f"{result['median']} classes, between {result['low']} and {result['high']}" in told
    assert f"model: {{num_new: {result['median'] - 5}}}" in told
    assert len(result["numbers"]) == len(result["accuracy"]) > 30
    assert result["numbers"][0] == 5
    assert ElementTree.parse(out / "estimate_k.svg").getroot().tag.endswith("svg")
    again = ["estimate-k", str(digits), "--features", str(out / "features"), "--out", str(out), "--max-classes"]
    assert main([*again, "60"]) == 0
    assert json.loads((out / "estimate_k.json").read_text()) == result
    capsys.readouterr()
    assert main([*again, "4"]) == 1
    assert capsys.readouterr().err == "error: 4 classes, but digits has 5 old ones: ask for more\n"
    monkeypatch.setattr(Split, "blocks", lambda split: iter([np.ones((len(split), split.width), np.float32)]))
    assert main([*again, "60"]) == 1
    assert capsys.readouterr().err == "error: all features are the same: there is nothing to cluster\n"


def test_few_images_of_many_classes_are_not_cut_off_at_a_quarter_of_them():
    """40 old classes of 10 images and 300 new ones of 3, kept well apart: 340 classes in 1,300 images."""
    draws = np.random.default_rng(0)
    targets = np.repeat(np.arange(340), [10] * 40 + [3] * 300)
    points = draws.standard_normal((340, 64))[targets] + 0.2 * draws.standard_normal((len(targets), 64))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    labelled = (targets < 40) & (np.arange(len(targets)) % 2 == 0)
    found = estimate_by_tree(points[labelled], targets[labelled], points[~labelled], 40, 1000)
    assert found.numbers[-1] == 1000
    assert found.low <= 340 <= found.high


def test_an_answer_that_the_largest_number_cuts_off_is_told_or_looked_for_beyond(monkeypatch):
    points, targets, labelled = blobs(classes=80, each=15, seed=1)
    data = points[labelled], targets[labelled], points[~labelled], targets[labelled].max() + 1
    whole = estimate_by_tree(*data, 1000)
    assert not whole.cut_off
    assert whole.low <= 80 <= whole.high
    cut_off = estimate_by_tree(*data, 50)
    assert cut_off.cut_off
    assert cut_off.numbers[-1] == 50
    monkeypatch.setattr("sptnet.method.class_count.LARGEST", 50)
    monkeypatch.setattr("sptnet.method.class_count.PER_OLD", 1)
    searched = estimate_by_tree(*data, None)
    assert not searched.cut_off
    assert searched.median == pytest.approx(whole.median, rel=0.1)
    assert estimate_by_brent(*data, 42).cut_off
    monkeypatch.setattr("sptnet.method.class_count.MICRO", 60)  # of which there cannot be more clusters
    assert estimate_by_tree(*data, None).cut_off


def test_a_short_range_of_numbers_is_tried_whole():
    assert grid(3, 50).tolist() == list(range(3, 51))
    assert len(grid(5, 1000)) < 160
    assert grid(5, 1000)[[0, -1]].tolist() == [5, 1000]


def test_micro_clusters_count_all_points(monkeypatch):
    monkeypatch.setattr(class_count, "MICRO", 60)
    points, _, labelled = blobs()
    own, centres, counts = class_count.micro_clusters(points[labelled], points[~labelled], 0)
    assert counts.sum() == len(points)
    assert len(centres) == len(counts) <= 60 < len(points)
    assert own.max() < len(centres)
    # the centre of a cluster is the mean of its points
    assert (np.linalg.norm(points[labelled] - centres[own], axis=1) < 1).all()


def test_many_points_are_counted_by_micro_clusters(monkeypatch):
    monkeypatch.setattr(class_count, "MICRO", 400)
    points, targets, labelled = blobs(each=80)
    found = estimate_by_tree(points[labelled], targets[labelled], points[~labelled], 15, 120)
    assert found.median == pytest.approx(30, rel=0.15)


def test_the_answer_is_the_middle_of_the_repeats_with_a_margin():
    points, targets, labelled = blobs(each=20, spread=0.9)
    found = estimate_by_tree(points[labelled], targets[labelled], points[~labelled], 15, 120)
    assert found.median == int(np.median(found.repeats))
    assert found.low <= int(0.9 * found.median)
    assert found.high >= int(np.ceil(1.1 * found.median))


def test_in_a_repeat_some_classes_are_hidden_and_labels_left_out():
    targets = np.repeat(np.arange(20), 30)
    for labels in class_count.resampled(targets, 20, 5, np.random.default_rng(0)):
        assert 2 <= labels.seen.sum() < 20
        assert 0 < labels.counts.sum() < len(targets)
        assert set(labels.counts.tolist()) == {0, 1}


def test_brent_searches_a_sample_of_labelled_and_others(monkeypatch):
    """Points that lie by class: the first labels are of few classes."""
    monkeypatch.setattr(class_count, "BRENT_SAMPLE", 400)
    points, targets, labelled = blobs(classes=16, each=60, spread=0.2)
    found = estimate_by_brent(points[labelled], targets[labelled], points[~labelled], 8, 40)
    assert found.median == pytest.approx(16, rel=0.3)
    assert max(found.accuracy) > 0.9
