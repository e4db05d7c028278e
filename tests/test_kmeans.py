"""Semi-supervised k-means: what GCD's is, on few points and on many, on pixels and on class tokens."""

import json

import numpy as np
import pytest

from sptnet.cli import main
from sptnet.method import kmeans
from sptnet.method.kmeans import assign, nearest, semi_supervised_kmeans
from sptnet.method.metrics import clustering_accuracy
from sptnet.method.whitening import Projection, fit_pca
from sptnet.points import whitened_dimensions
from sptnet.run.predictions import load_predictions


def blobs(count, classes=12, width=16, spread=0.25, seed=0):
    draws = np.random.default_rng(seed)
    centres = draws.standard_normal((classes, width))
    targets = draws.integers(0, classes, count)
    points = centres[targets] + spread * draws.standard_normal((count, width))
    labelled = (targets < classes // 2) & (draws.random(count) < 0.5)
    return points.astype(np.float32), targets, labelled


def accuracy(points, targets, labelled, classes=12):
    centres = semi_supervised_kmeans(points[labelled], targets[labelled], points[~labelled], classes // 2, classes)
    clusters = assign(points[~labelled], centres).clusters
    return clustering_accuracy(targets[~labelled], clusters, classes // 2)


def test_nearest_is_the_plain_argmin():
    points, centres = blobs(500)[0], blobs(37, seed=1)[0]
    plain = ((points[:, None] - centres[None]) ** 2).sum(2)
    clusters, distances = nearest(points, centres)
    assert np.array_equal(clusters, plain.argmin(1))
    np.testing.assert_allclose(distances, plain.min(1), rtol=1e-3, atol=1e-3)


def test_blobs_are_found_and_labelled_points_keep_old_classes_in_place():
    found = accuracy(*blobs(2000))
    assert found.all > 0.95
    points, targets, labelled = blobs(2000)
    centres = semi_supervised_kmeans(points[labelled], targets[labelled], points[~labelled], 6, 12)
    clusters = assign(points[~labelled], centres).clusters
    old = targets[~labelled] < 6
    assert (clusters[old] == targets[~labelled][old]).mean() > 0.95  # the cluster of a class has its number


def test_many_points_go_by_a_sample_and_blocks_and_find_the_same(monkeypatch):
    monkeypatch.setattr(kmeans, "SAMPLE", 600)
    monkeypatch.setattr(kmeans, "BLOCK", 97)
    assert accuracy(*blobs(4000)).all > 0.95


def test_more_clusters_than_different_points():
    points = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    targets = np.repeat(np.arange(4), 5)
    labelled = (targets < 2) & (np.arange(20) % 5 < 2)
    centres = semi_supervised_kmeans(points[labelled], targets[labelled], points[~labelled], 2, 9)
    clusters = assign(points[~labelled], centres).clusters
    assert clustering_accuracy(targets[~labelled], clusters, 2).all == 1


def test_whitening_makes_variances_one_and_lengths_one():
    points = blobs(3000)[0] * np.linspace(0.1, 5, 16, dtype=np.float32) + 100
    projection = fit_pca([points[:1000], points[1000:]], 8, whiten=True)
    plain = (points - projection.mean) @ projection.axes
    np.testing.assert_allclose(np.cov(plain.T, bias=True), np.eye(8), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(projection(points), axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(Projection()(points), axis=1), 1, rtol=1e-5)
    centred = points - points.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    ours = fit_pca([points], 8, whiten=False).axes
    np.testing.assert_allclose(np.abs(axes[:8] @ ours), np.eye(8), atol=5e-3)


def test_pixels_of_the_digits_are_what_they_were(digits, tmp_path):
    assert main(["kmeans", str(digits), str(tmp_path / "k")]) == 0
    metrics = json.loads((tmp_path / "k" / "metrics.json").read_text())
    shares = {p: [round(100 * metrics[p][n], 1) for n in ("all", "old", "new")] for p in ("unlabelled", "test")}
    assert shares == {"unlabelled": [71.7, 63.5, 76.0], "test": [76.3, 94.0, 60.7]}  # the README's


@pytest.fixture(scope="module")
def features(digits, untrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "f"
    assert main(["features", str(digits), "--out", str(out), "--run", str(untrained)]) == 0
    return out


def test_features_are_clustered_scored_and_reported(digits, features, tmp_path, capsys, monkeypatch):
    arguments = ["kmeans", str(digits), str(tmp_path / "k"), "--features", str(features), "--pca", "16", "--whiten"]
    assert main(arguments) == 0
    assert "All / Old / New" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "k" / "metrics.json").read_text())
    assert metrics["method"] == "k-means on PCA of class tokens"
    assert metrics["unlabelled"]["samples"] == 1072
    assert metrics["unlabelled"]["all"] > 0.3
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == ["metrics.json", "predictions.npz"]
    assert main([*arguments, "--num-classes", "14"]) == 0
    assert json.loads((tmp_path / "k" / "metrics.json").read_text())["unlabelled"]["classes_used"] == 14
    whole = load_predictions(tmp_path / "k")["unlabelled"]
    for module in ("baseline", "exact_counts"):  # as of millions: predictions are in parts
        monkeypatch.setattr(f"sptnet.{module}.WINDOW", 400)
    assert main([*arguments, "--num-classes", "14"]) == 0
    assert len(list((tmp_path / "k" / "predictions").iterdir())) == 3 + 1
    assert all(map(np.array_equal, load_predictions(tmp_path / "k")["unlabelled"], whole))


def test_mistakes_are_one_line(digits, untrained, features, tmp_path, capsys):
    before = sorted(untrained.iterdir())
    cases = {
        ("RUN",): "is the folder of a training run",
        ("RUN", "--features", "F"): "is the folder of a training run",
        ("OUT", "--features", "F", "--num-classes", "3"): "3 classes, but digits has 5 old ones",
        ("OUT", "--features", "nowhere"): "nowhere holds no features",
        ("OUT", "--features", "F", "--whiten"): "--whiten needs --pca N",
        ("OUT", "--pca", "8"): "are for --features",
        ("/dev/null/k", "--features", "F"): "/dev/null/k cannot be written: Not a directory",
    }
    for case, told in cases.items():
        places = {"RUN": str(untrained), "F": str(features), "OUT": str(tmp_path / "k")}
        assert main(["kmeans", str(digits), *(places.get(argument, argument) for argument in case)]) in (1, 2)
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert told in errors[0]
    assert sorted(untrained.iterdir()) == before


def test_few_images_are_whitened_to_few_dimensions():
    assert [whitened_dimensions(128, images) for images in (10**6, 1024, 300, 9)] == [128, 128, 37, 2]
    assert whitened_dimensions(1, 300) == 1


def test_of_many_points_the_centres_are_those_of_all(monkeypatch):
    """And labelled points weigh in the sample what they weigh in all: with spread blobs the sample's are others."""
    points, targets, labelled = blobs(6000, spread=1.2)
    mine, others = points[labelled], points[~labelled]
    monkeypatch.setattr(kmeans, "SAMPLE", 300)
    monkeypatch.setattr(kmeans, "SAMPLE_PER_CENTRE", 10)
    told = []
    centres = semi_supervised_kmeans(
        mine, targets[labelled], others, 6, 12, told=lambda number, inertia: told.append(inertia)
    )
    assert told == sorted(told, reverse=True)
    seen = assign(others, centres)
    sums, counts = seen.sums.copy(), seen.counts.copy()
    for number in range(6):
        own = mine[targets[labelled] == number]
        sums[number] += own.sum(0)
        counts[number] += len(own)
    # a pass over all points moves them by little; those of a sample of 300 are 0.2 from it
    assert np.abs(sums / counts[:, None] - centres).mean() < 0.03


def test_labelled_points_weigh_in_a_sample_what_they_weigh_in_all(monkeypatch):
    points, targets, labelled = blobs(6000)
    monkeypatch.setattr(kmeans, "SAMPLE", 300)
    monkeypatch.setattr(kmeans, "SAMPLE_PER_CENTRE", 10)
    weights, of = [], kmeans.lloyd
    monkeypatch.setattr(kmeans, "lloyd", lambda *given: weights.append(float(given[0].counts.sum())) or of(*given))
    semi_supervised_kmeans(points[labelled], targets[labelled], points[~labelled], 6, 12)
    share = 300 / int((~labelled).sum())
    assert weights[:-1] == pytest.approx([share * labelled.sum()] * (len(weights) - 1))
    assert weights[-1] == labelled.sum()


def test_axes_have_the_sign_of_their_largest_part():
    points = np.random.default_rng(0).normal(size=(200, 6)) @ np.diag([9, 5, 4, 3, 2, 1])
    axes = fit_pca(iter([points]), 4, True).axes
    assert (axes[np.abs(axes).argmax(0), range(4)] > 0).all()
