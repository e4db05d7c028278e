"""Remote shards: a real HTTP server and a real S3 API on loopback, also ones that fail, stall and truncate."""

import contextlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked import FORKS
from serving import Server, batches, data_of, same

from sptnet.data import waiting
from sptnet.data.format.faults import DatasetError, UnreachableError
from sptnet.data.loader import eval_batches, train_batches
from sptnet.data.reader import ShardReader
from sptnet.data.storage import remote
from sptnet.data.storage import store as store_module
from sptnet.data.storage.store import open_store


@pytest.fixture
def server(digits):
    with Server(digits) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.05)


@pytest.fixture
def sound(digits, tmp_path):
    return batches(*data_of(digits, tmp_path / "unused"))


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches_and_each_file_is_fetched_once(server, sound, digits, tmp_path, workers):
    cache = tmp_path / "cache"
    store, order = data_of(server.url, cache)
    assert same(batches(store, order, workers=workers), sound)
    fetched = {name: times for name, times in server.served.items() if name != "manifest.json"}
    assert fetched
    assert set(fetched.values()) == {1}
    # this server sends no parts: each process asked once, of an index
    assert [size for _, size in server.parts] == [2] * max(workers, 1)
    served = sum(server.served.values())
    assert same(batches(*data_of(server.url, cache)), sound)
    assert sum(server.served.values()) == served + 1  # the manifest
    evaluated = list(eval_batches(store, "test", batch_size=100, augment="affine", image_size=24))
    assert sum(len(batch.uids) for batch in evaluated) == 359


def test_the_next_window_is_fetched_while_this_one_is_read(server, tmp_path):
    store, order = data_of(server.url, tmp_path / "cache")
    reading = train_batches(store, order, augment="affine", image_size=24, seed=0, steps=range(100))
    next(reading)
    now = {shard for labelled, shard in order.upcoming(0, 0, 48) if labelled}
    files = [store.manifest.of_kind("labelled")[shard].file for shard in now]
    end = time.monotonic() + 10
    while time.monotonic() < end and not all(server.served[file] for file in files):
        time.sleep(0.05)
    assert all(server.served[file] == 1 for file in files)
    read = {slot.place.shard for slot in order.batch(0) if slot.labelled}
    assert len(now) > len(read)
    reading.close()


def test_what_a_long_wait_is_for_is_said(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    store, order = data_of(server.url, tmp_path / "cache", "data.remote.timeout_s=1")
    needed = {(slot.labelled, slot.place.shard) for slot in order.batch(0)}
    file = store.manifest.of_kind("labelled")[order.batch(0)[0].place.shard].file
    server.faults = {file: ["stall"]}
    assert len(batches(store, order, steps=range(1))) == 1
    told = [message for message in caplog.messages if message.startswith("rank 0 has waited ")]
    assert told
    found = re.search(r" s for batch 0: (\d+) of its (\d+) shards are in the node's cache, 0\.0 of 0\.0 GB$", told[0])
    assert found
    assert int(found[1]) < int(found[2]) == len(needed)
    caplog.clear()
    monkeypatch.setattr(waiting, "PATIENCE", 60)
    assert len(batches(store, order, steps=range(1))) == 1
    assert not [message for message in caplog.messages if message.startswith("rank 0 has waited ")]


@pytest.mark.parametrize("file_system", [None, "nfs4"])
def test_the_next_window_of_a_network_disk_is_asked_for_once(digits, tmp_path, monkeypatch, file_system):
    asked = []
    monkeypatch.setattr(store_module, "network_file_system", lambda folder: file_system)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *which: asked.append((os.readlink(f"/proc/self/fd/{fd}"), which))
    )
    store, order = data_of(digits, tmp_path / "unused")
    list(batches(store, order, steps=range(3)))
    shards = {labelled: store.manifest.of_kind("labelled" if labelled else "unlabelled") for labelled in (True, False)}
    soon = {shards[labelled][shard].file for step in range(3) for labelled, shard in order.upcoming(step, 0, 48)}
    end = time.monotonic() + 10
    while file_system and time.monotonic() < end and len(asked) < len(soon):
        time.sleep(0.01)
    files = [Path(path).name for path, _ in asked]
    assert sorted(files) == (sorted(soon) if file_system else [])
    assert {which for _, which in asked} <= {(0, 0, os.POSIX_FADV_WILLNEED)}


def test_a_server_that_fails_stalls_truncates_or_corrupts_is_asked_again(server, sound, tmp_path, caplog):
    files = [shard.file for shard in data_of(server.url, tmp_path / "x")[0].manifest.of_kind("labelled")]
    faults = ["fail", "truncate", "stall", "corrupt", "fail"]
    server.faults = {file: [fault] for file, fault in zip(files, faults * 4, strict=False)}
    server.faults["manifest.json"] = ["fail", "fail"]
    assert same(batches(*data_of(server.url, tmp_path / "cache")), sound)
    assert any("attempt 1 of 5 failed" in record.message for record in caplog.records)
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("fault", ["fail", "truncate", "corrupt"])
def test_after_the_last_attempt_the_error_names_url_and_rank(server, tmp_path, fault):
    store, order = data_of(server.url, tmp_path / "cache", "data.remote.attempts=2")
    place = order.batch(0)[24].place
    file = store.manifest.of_kind("labelled")[place.shard].file
    server.faults[file] = [fault] * 99
    with pytest.raises(DatasetError, match=rf"rank 1: {server.url}/{file} failed 2 times: "):
        batches(store, order, rank=1, world_size=2)


def test_a_shard_that_is_not_there_is_not_asked_for_again(server, digits, tmp_path):
    server.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    store, order = data_of(server.url, tmp_path / "cache")
    file = store.manifest.of_kind("labelled")[order.batch(0)[0].place.shard].file
    (server.root / file).unlink()
    with pytest.raises(DatasetError, match=rf"rank 0: .*{file} is not there"):
        batches(store, order)
    assert 1 <= server.missed[file] <= 2  # ahead of need, where that had begun, and when it was needed
    with pytest.raises(DatasetError, match=r"nowhere/manifest\.json is not there"):
        data_of(server.url.replace("digits", "nowhere"), tmp_path / "cache")


def test_a_store_can_be_sent_to_a_process(server, digits, tmp_path):
    """Loader workers get it by pickle where they are not forked."""
    for root in (digits, server.url):
        store, order = pickle.loads(pickle.dumps(data_of(root, tmp_path / "cache")))
        assert len(batches(store, order, steps=range(1))) == 1


def _read_all(url, cache, queue):
    queue.put(len(batches(*data_of(url, cache))))


def test_processes_of_a_node_fetch_each_file_once(server, tmp_path):
    queue = FORKS.Queue()
    running = [FORKS.Process(target=_read_all, args=(server.url, tmp_path / "cache", queue)) for _ in range(3)]
    for process in running:
        process.start()
    assert [queue.get(timeout=120) for _ in running] == [8, 8, 8]
    for process in running:
        process.join()
    fetched = [times for name, times in server.served.items() if name != "manifest.json"]
    assert set(fetched) == {1}


def test_the_least_recently_used_files_leave_and_the_limit_holds(server, sound, digits, tmp_path):
    largest = max(shard["bytes"] for shard in json.loads((digits / "manifest.json").read_text())["shards"])
    limit = 2 * largest
    cache = tmp_path / "cache"
    store, order = data_of(server.url, cache, f"data.remote.cache_gb={limit / 1e9}")
    assert same(batches(store, order), sound)
    for thread in threading.enumerate():  # fetches that had begun go on after the last batch
        if thread.name.startswith("fetch-ahead"):
            thread.join()
    files = [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert files
    assert sum(path.stat().st_size for path in files) <= limit
    assert sum(server.served.values()) > len(files)
    with pytest.raises(DatasetError, match=r"raise data\.remote\.cache_gb"):
        data_of(server.url, cache, f"data.remote.cache_gb={largest / 2e9}")


def test_a_damaged_cached_copy_of_a_killed_fetch_is_not_used(server, sound, tmp_path):
    cache = tmp_path / "cache"
    store, order = data_of(server.url, cache)
    for shard in store.manifest.shards:
        (cache / shard.sha256[:2]).mkdir(parents=True, exist_ok=True)
        (cache / shard.sha256[:2] / f"{shard.sha256}.{shard.bytes}.part").write_bytes(b"half")
    assert same(batches(store, order), sound)


def test_s3(digits, sound, tmp_path, monkeypatch):
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="shards")
        for path in digits.iterdir():
            client.upload_file(str(path), "shards", f"sets/digits/{path.name}")
        options = f"data.remote.options={{endpoint_url: '{endpoint}'}}"
        store, order = data_of("s3://shards/sets/digits", tmp_path / "cache", options)
        assert same(batches(store, order), sound)
        assert same(batches(store, order, workers=2), sound)
        victim = store.manifest.of_kind("unlabelled")[0].file
        client.put_object(Bucket="shards", Key=f"sets/digits/{victim}", Body=b"x")
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(DatasetError, match=r"rank 0: s3://shards/sets/digits/.* failed 2 times"):
            batches(*data_of("s3://shards/sets/digits", tmp_path / "cache", options, "data.remote.attempts=2"),
                    steps=range(30))  # fmt: skip
    finally:
        running.stop()


def test_a_protocol_without_its_package_is_one_line(tmp_path):
    with pytest.raises(DatasetError, match=r"oss://somewhere cannot be read: .*'\.\[remote\]'"):
        data_of("oss://somewhere", tmp_path)


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    store, order = data_of(server.url, tmp_path / "file")
    with pytest.raises(DatasetError, match=r"rank 0: the cache .*file cannot be used"):
        batches(store, order)
    assert os.path.getsize(tmp_path / "file") == 0


def test_a_server_that_sends_too_much_is_cut_off(server, digits, tmp_path):
    """While it streams, not when the disk is full; it is not asked again."""
    server.root = Path(shutil.copytree(digits, tmp_path / "copy"))
    store, order = data_of(server.url, tmp_path / "cache")
    file = store.manifest.of_kind("labelled")[order.batch(0)[0].place.shard].file
    with open(server.root / file, "r+b") as tar:
        tar.truncate(200 * 10**6)
    before = server.served[file]
    with pytest.raises(DatasetError, match=rf"rank 0: .*{file} sends more than the [\d,]+ bytes that it may have"):
        batches(store, order)
    assert server.served[file] <= before + 2  # a fetch ahead, and the one that tells
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 50 * 10**6


def test_a_manifest_without_end_is_cut_off(server, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("sptnet.data.storage.store.LARGEST_MANIFEST", 1000)
    with pytest.raises(DatasetError, match=r"manifest\.json sends more than the 1,000 bytes"):
        data_of(server.url, tmp_path / "cache")


def test_attempts_end_in_time_and_expired_credentials_are_said_at_once(monkeypatch, tmp_path):
    fetching, tried = remote.Remote("memory://x", 50, 1, {}), []

    class Failing:
        def get_file(self, *_, **__):
            tried.append(1)
            raise RuntimeError(reason)

    monkeypatch.setattr(fetching, "_filesystem", Failing)
    monkeypatch.setattr(remote, "LONGEST_TRYING", 0.5)
    reason = "gone"
    with pytest.raises(UnreachableError, match=r"failed \d times: RuntimeError: gone"):
        fetching.fetch("a", 9, lambda path: None, tmp_path / "a")
    assert 1 < len(tried) < 10
    tried.clear()
    reason = "ExpiredToken: The provided token has expired."
    with pytest.raises(DatasetError, match="credentials are missing or have expired, renew them"):
        fetching.fetch("a", 9, lambda path: None, tmp_path / "a")
    assert len(tried) == 1


@pytest.mark.parametrize("sent", ["body", "header"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(sent, tmp_path, monkeypatch):
    """No connection ever times out."""
    monkeypatch.setattr(remote, "LONGEST_TRYING", 1.0)

    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"Content-Length: 999\r\n\r\n" * (sent == "body"))
                for _ in range(200):
                    self.wfile.write(b"X: 1\r\n" if sent == "header" else b"x")
                    time.sleep(0.1)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as dripping:
        dripping.daemon_threads = True
        threading.Thread(target=dripping.serve_forever, daemon=True).start()
        start = time.monotonic()
        fetching = remote.Remote(f"http://127.0.0.1:{dripping.server_port}", 5, 0.5, {})
        with pytest.raises(UnreachableError, match=r"failed 1 times: .*Time"):
            fetching.fetch("a", 999, lambda path: None, tmp_path / "a")
        assert time.monotonic() - start < 8
        dripping.shutdown()


def test_what_a_server_says_is_one_line_that_can_be_printed(tmp_path, monkeypatch):
    class Failing:
        def get_file(self, *_, **__):
            raise FileNotFoundError("\x1b[2J gone\n\x07")

    fetching = remote.Remote("memory://x", 1, 1, {})
    monkeypatch.setattr(fetching, "_filesystem", Failing)
    with pytest.raises(DatasetError) as told:
        fetching.fetch("a", 9, lambda path: None, tmp_path / "a")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(("url", "cache"), [("zip://nowhere", "c"), ("file://x", "a\0b")])
def test_arguments_that_cannot_be(url, cache, tmp_path):
    with pytest.raises(DatasetError):
        open_store(url, cache=str(tmp_path / cache), cache_gb=1, attempts=1, timeout_s=1, options={})


def test_open_files_that_left_the_cache_are_closed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("sptnet.data.reader.LOOK_EVERY", 0.0)
    store, _ = data_of(server.url, tmp_path / "cache")
    reader = ShardReader(store, store.manifest.of_kind("labelled"))
    first = reader.read(0, 0)
    for path in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*"):
        path.unlink()
    reader.read(1, 0)
    assert list(reader._open) == [1]
    assert reader.read(0, 0) == first
    reader.close()


def test_a_process_that_ends_waits_for_no_fetch(tmp_path):
    """A server that stalls holds a fetch ahead for minutes."""
    code = (
        "import sys, time; from pathlib import Path; from sptnet.data.storage.cache import NodeCache\n"
        f"cache = NodeCache(Path({str(tmp_path)!r}), 10**6)\n"
        "cache.fetch_ahead('a' * 64, 9, lambda check, path: time.sleep(600)); time.sleep(0.2); cache.close()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_its_package_a_protocol_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(DatasetError, match=r"https:// cannot be read: .*aiohttp.*\.\[remote\]"):
        remote._timeouts("https", 1.0)
