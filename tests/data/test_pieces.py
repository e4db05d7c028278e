"""Samples of shards that are still to come, read by their bytes from a real HTTP server."""

import os
import threading

import pytest
from serving import Server, batches, data_of, same

from sptnet.data.reader import ShardReader
from sptnet.data.storage import remote
from sptnet.data.storage.pieces import PieceError, Wanted, read_pieces
from sptnet.data.storage.remote import Remote


@pytest.fixture
def server(digits, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)
    with Server(digits) as running:
        running.sends_parts = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.released.set()
        running.shutdown()


@pytest.fixture
def sound(digits, tmp_path):
    return batches(*data_of(digits, tmp_path / "unused"), steps=range(2))


def places_of(store, order, steps):
    """Offset and size of what the steps read, as (shard, offset, size)."""
    kinds = {labelled: store.manifest.of_kind("labelled" if labelled else "unlabelled") for labelled in (True, False)}
    for step in steps:
        for slot in order.batch(step):
            shard = kinds[slot.labelled][slot.place.shard]
            yield Wanted(shard, *store.entries(shard)[slot.place.position].item()[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cold_start_asks_for_its_samples_and_waits_for_no_shard(server, sound, tmp_path, workers):
    server.released.clear()
    # what is held back is no failure
    store, order = data_of(server.url, tmp_path / "cache", "data.remote.timeout_s=60")
    assert same(batches(store, order, steps=range(2), workers=workers), sound)
    read = [(want.shard.file, 512 + want.size) for want in places_of(store, order, range(2))]
    asked = [part for part in server.parts if part[1] > 2]
    assert sorted(asked) == sorted(read)
    whole = sum(shard.bytes for shard in {want.shard for want in places_of(store, order, range(2))})
    assert sum(size for _, size in asked) < whole / 2
    needed = {want.shard for want in places_of(store, order, range(2))}
    there = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert {shard.index_sha256 for shard in needed} <= there  # files are named by what is in them
    assert not {shard.sha256 for shard in needed} & there


def test_what_is_on_the_node_is_read_there(server, sound, tmp_path):
    store, order = data_of(server.url, tmp_path / "cache")
    for want in places_of(store, order, range(2)):
        os.close(store.open(want.shard))
    assert same(batches(store, order, steps=range(2)), sound)
    assert server.parts == []


@pytest.mark.parametrize("damaged", [range(124, 136), range(512, 520)])
def test_pieces_that_are_not_what_was_meant_are_read_from_whole_shards(server, sound, tmp_path, damaged):
    """Another size in the tar header; an image that does not decode."""
    server.damaged = damaged
    store, order = data_of(server.url, tmp_path / "cache")
    assert same(batches(store, order, steps=range(2)), sound)
    read = {want.shard.file for want in places_of(store, order, range(2))}
    assert all(server.served[file] for file in read)


def test_a_piece_that_decoded_and_was_another_image_stops_the_run_when_its_shard_comes(server, tmp_path):
    store, order = data_of(server.url, tmp_path / "cache", "data.tolerate_bad_samples=99")
    reader = ShardReader(store, store.manifest.of_kind("labelled"))
    place = order.batch(0)[0].place
    server.damaged = range(600, 601)
    reader.read_ahead([place])
    server.damaged = range(0)
    assert reader.read(*place).piece
    with pytest.raises(PieceError, match=r"sample \d+ was another one, or damaged, when it was read before its shard"):
        reader.read(place.shard, (place.position + 1) % store.manifest.of_kind("labelled")[place.shard].samples)


def test_a_server_that_cannot_be_reached_leaves_it_to_who_tries_again(server, tmp_path):
    store, order = data_of(server.url, tmp_path / "cache")
    (want, *_) = places_of(store, order, range(1))
    assert read_pieces(Remote("http://127.0.0.1:9/digits", 1, 1, {}), [want]) == [None]
    asked = Remote(server.url, 1, 2, {})
    assert len(read_pieces(asked, [want])[0]) == want.size
    server.shutdown()
    server.server_close()
    assert read_pieces(asked, [want, want]) == [None, None]
