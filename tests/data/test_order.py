"""The order of samples: a pure function of (seed, split, step)."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from sptnet.data.order import BatchOrder, StreamOrder, rank_slice

LABELLED, UNLABELLED = [7, 5, 9, 6, 8, 5, 7, 9], [13, 11, 17, 12, 14, 10]


def batch_order(seed=0, streams=4, batch_size=24):
    return BatchOrder(LABELLED, UNLABELLED, batch_size, streams, window=2, seed=seed)


def test_the_order_is_the_published_one():
    """ORDER CHANGED must be said in CHANGELOG.md where this digest changes."""
    slots = [(s.labelled, *s.place) for step in range(50) for s in batch_order().batch(step)]
    digest = hashlib.sha256(np.array(slots, "<i8").tobytes()).hexdigest()
    assert digest == "4b4a157c9491e67596622730689fc2aae269ecc4ba2b5bd2b3695c3f4053fe40"


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_every_pass_visits_each_sample_once(streams):
    order = StreamOrder(LABELLED, streams, window=2, seed=1, split=0)
    for pass_ in range(3):
        seen = Counter()
        for stream in range(streams):
            begin, end = order.piece(stream)
            length = end - begin
            seen.update(order.at(stream, n) for n in range(pass_ * length, (pass_ + 1) * length))
        assert sorted(seen) == [(shard, i) for shard, count in enumerate(LABELLED) for i in range(count)]
        assert set(seen.values()) == {1}


def test_passes_differ_and_seeds_differ():
    order = StreamOrder(LABELLED, 1, 2, seed=1, split=0)
    first, second = ([order.at(0, n + start) for n in range(order.total)] for start in (0, order.total))
    other = StreamOrder(LABELLED, 1, 2, seed=2, split=0)
    assert first != second
    assert first != [other.at(0, n) for n in range(order.total)]


def test_starting_at_a_step_equals_walking_to_it():
    walked = batch_order()
    batches = [walked.batch(step) for step in range(40)]
    for step in (39, 3, 17):
        assert batch_order().batch(step) == batches[step]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_slices_of_any_world_make_the_same_batch(world_size):
    for step in (0, 5, 23):
        parts = [batch_order().batch(step, *rank_slice(24, rank, world_size)) for rank in range(world_size)]
        assert [slot for part in parts for slot in part] == batch_order().batch(step)
        for part in parts:
            assert sum(slot.labelled for slot in part) * 2 == len(part)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_opens_only_its_streams_shards(world_size):
    order = batch_order()
    for rank in range(world_size):
        mine = range(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        for split, length in zip(order.splits, (56, 77), strict=True):
            allowed = set()
            line = split._line(0)
            for stream in mine:
                begin, end = split.piece(stream)
                allowed |= {
                    int(s)
                    for s, a, b in zip(line.shards, line.starts, line.starts[1:], strict=False)
                    if a < end and b > begin
                }
            steps = range((length // 4) // 3)
            slots = [s for step in steps for s in order.batch(step, *rank_slice(24, rank, world_size))]
            opened = {s.place.shard for s in slots if s.labelled == (split is order.splits[0])}
            assert opened <= allowed
            assert len(allowed) < len(split.counts)


def same_shard_neighbours(order):
    """Share of neighbours, in one pass of one stream, that come from the same shard."""
    shards = [order.at(0, n).shard for n in range(order.total)]
    return np.mean(np.equal(shards[1:], shards[:-1]))


@pytest.mark.parametrize("window", [1, 2, 4, 16, 64])
def test_neighbours_come_from_the_same_shard_no_more_often_than_the_window_implies(window):
    """In a random permutation of W shards of n samples, a neighbour is of the same shard with (n - 1) / (W n - 1)."""
    shards, each = 64, 100
    inside = shards // window * (window * each - 1)  # pairs that no border between windows divides
    expected = (each - 1) / (window * each - 1) * inside / (shards * each - 1)
    margin = 4 * np.sqrt(expected * (1 - expected) / inside) if window > 1 else 1e-9
    for seed in range(3):
        share = same_shard_neighbours(StreamOrder([each] * shards, 1, window, seed, split=0))
        assert abs(share - expected) <= margin


def test_positions_in_a_pass_are_uniform_over_passes():
    """Where one sample stands does not depend on where it stood: its mean place over many passes is the middle."""
    order = StreamOrder([10] * 16, 1, 4, seed=3, split=0)
    places = []
    for pass_ in range(200):
        at = [order.at(0, pass_ * order.total + n) for n in range(order.total)]
        places.append(at.index((5, 5)))
    # 160 places: standard deviation of a mean of 200 uniform draws is 46 / sqrt(200) = 3.3
    assert abs(np.mean(places) - 79.5) < 4 * 3.3
    assert np.std(places) > 40


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_upcoming_names_what_is_read_now_and_next(world_size):
    order = batch_order()
    for rank in range(world_size):
        slots = rank_slice(24, rank, world_size)
        for step in range(30):
            named = set(order.upcoming(step, *slots))
            read = order.batch(step, *slots)
            assert {(s.labelled, s.place.shard) for s in read} <= named
            # and what follows the windows that are being read
            for split, labelled in zip(order.splits, (True, False), strict=True):
                for stream in {s.stream for s in read}:
                    last = max(s.position for s in read if (s.stream, s.labelled) == (stream, labelled))
                    following = split.ahead(stream, last)[1]
                    assert (labelled, split.at(stream, following).shard) in named


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="multiple of 2 x 4"):
        batch_order(batch_size=20)
    with pytest.raises(ValueError, match="at least as many shards"):
        StreamOrder([5, 5], 3, 2, 0, 0)
    with pytest.raises(ValueError, match="3 processes"):
        rank_slice(20, 0, 3)
