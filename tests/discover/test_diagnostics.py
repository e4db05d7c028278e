"""What is said of results: only what is so."""

import csv

import numpy as np
import pytest

from sptnet.discover.diagnostics import (
    Agreement,
    Group,
    Share,
    StageFacts,
    about_sizes,
    agreement,
    few_images,
    groups_of,
    own_class_share,
    predictions_by_features,
    worse,
)


class Tokens:
    """Features as `Split` gives them, in blocks."""

    def __init__(self, rows):
        self.rows = rows.astype(np.float32)
        self.uids = np.arange(len(rows)) * 3

    def blocks(self):
        yield from np.array_split(self.rows, 7)


def clustered(classes=10, each=30, apart=5.0):
    draws = np.random.default_rng(0)
    targets = np.repeat(np.arange(classes), each)
    return Tokens(apart * draws.normal(size=(classes, 16))[targets] + draws.normal(size=(len(targets), 16))), targets


def test_neighbours_agree_where_there_is_something_and_by_chance_where_not():
    tokens, targets = clustered()
    found = agreement(tokens, targets)
    assert found.found > 0.95
    assert found.chance == pytest.approx(29 / 299)
    assert not found.is_chance
    noise = Tokens(np.random.default_rng(1).normal(size=(3000, 16)))
    assert agreement(noise, np.arange(3000) % 10).is_chance
    shuffled = agreement(tokens, np.random.default_rng(2).permutation(targets))
    assert shuffled.found == pytest.approx(shuffled.chance, abs=0.05)
    # those of no group have no part, and one group agrees with itself, which says nothing
    half = np.where(targets < 5, targets, -1)
    assert agreement(tokens, half).chance == pytest.approx(29 / 149)
    assert agreement(tokens, np.zeros_like(targets)) == (1.0, 1.0, 300)
    assert not agreement(tokens, np.zeros_like(targets)).is_chance


def test_predictions_are_put_in_the_order_of_features():
    tokens = Tokens(np.zeros((5, 2)))  # uids 0, 3, 6, 9, 12
    assert predictions_by_features(tokens, np.array([9, 0, 6]), np.array([1, 2, 3])).tolist() == [2, -1, 3, 1, -1]


def facts(name="x", own=0.9, neighbours=0.6, used=20, test=None, images=2000):
    result = {"classes_used": used, "classes": 20, "effective_classes": 15.0}
    return StageFacts(name, Share(own, images), Agreement(neighbours, 0.1, images), result, test)


def test_only_what_is_worse_is_said():
    assert worse(facts(), facts()) == []
    assert worse(facts(), facts(own=0.895, neighbours=0.9, used=19)) == []
    assert worse(facts(neighbours=0.722, used=105), facts(neighbours=0.706, used=103)) == []
    (told,) = worse(facts(), facts(own=0.8))
    assert told == "labelled images in their own class 80.0% for 90.0%"
    assert len(worse(facts(), facts(neighbours=0.5, used=15))) == 2
    known = {"all": 400, "old": 400, "new": 0}
    before, after = ({"all": a, "old": 0.9, "new": None, "known": known} for a in (0.7, 0.6))
    assert worse(facts(test=before), facts(test=after)) == ["All on the test images 60.0% for 70.0%"]


def test_what_chance_makes_of_few_images_is_not_said():
    assert worse(facts(images=60), facts(own=0.8, images=60)) == []
    assert len(worse(facts(images=60), facts(own=0.6, images=60))) == 1
    few = {"all": 30, "old": 30, "new": 0}
    before, after = ({"all": a, "old": a, "new": None, "known": few} for a in (0.7, 0.6))
    assert worse(facts(test=before), facts(test=after)) == []
    assert worse(facts(test=before | {"known": None}), facts(test=after | {"known": None})) == []  # of before

    # two equally good stages that differ in a seventh of their images, as trainings do
    draws, told = np.random.default_rng(0), 0
    for _ in range(300):
        right = draws.random((2, 100)) < 0.7
        second = np.where(draws.random((2, 100)) < 0.15, draws.random((2, 100)) < 0.7, right)
        shares = zip(right.mean(1), second.mean(1), strict=True)
        (own, own_after), (near, near_after) = shares
        told += bool(worse(facts(own=own, neighbours=near, images=100), facts("y", own_after, near_after, images=100)))
    assert told <= 6


def groups(old, new):
    made = [Group(f"named {n}", False, size, 0.5, "a") for n, size in enumerate(old)]
    made += [Group(f"new-{n:03d}", True, size, 0.5, "a") for n, size in enumerate(new)]
    return sorted(made, key=lambda group: -group.size)


def test_sizes_say_too_many_too_few_and_a_heap():
    assert about_sizes(groups([50, 50], [40, 30, 30]), 3, None, 2) == []
    (told,) = about_sizes(groups([50, 50], [60, 30, 1]), 9, (5, 30), 2)
    assert told.startswith("7 of 9 new categories are empty or nearly")
    (told,) = about_sizes(groups([50, 50], [40, 30, 30]), 3, (4, 9), 2)
    assert "goes up to 9 classes, so try --new 5" in told  # between what there is and what is known to be too many
    assert about_sizes(groups([50, 50], [40, 30, 30]), 3, (4, 277), 2) == []
    (told,) = about_sizes(groups([90, 10], []), 3, (4, 30), 2)
    assert told.startswith("no image is in a new category")
    told = about_sizes(groups([], [90, 10]), 2, None, 2)
    assert told[0].startswith("no image is in a named class")
    assert told[1].startswith("new-000 has 90% of all images")


def test_few_images_are_said():
    assert few_images(15, 15, 3).startswith("only 30 images")
    assert few_images(300, 3000, 100).startswith("only 300 labelled images of 100 classes")
    assert few_images(3000, 3000, 100) is None


def test_tables_are_read_with_any_name(tmp_path):
    (tmp_path / "predictions").mkdir()
    rows = [("labelled/a, b/x\ny.png", "a, b"), ("labelled/NA/1.png", "a, b"), ("labelled/NA/2.png", "NA")]
    for number, part in enumerate((rows[:2], rows[2:])):
        with open(tmp_path / "predictions" / f"part-{number:06d}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "class_name", "is_new", "confidence", "nearest_old_class"])
            writer.writerows([path, name, "False", 0.5, name] for path, name in part)
    assert own_class_share(tmp_path) == (pytest.approx(2 / 3), 3)
    assert groups_of(tmp_path) == [Group("a, b", False, 2, 0.5, "a, b"), Group("NA", False, 1, 0.5, "NA")]
