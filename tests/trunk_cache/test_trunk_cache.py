"""What a frozen trunk makes is kept, whole or not at all, and changes no number."""

import errno
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cached import STEPS, arguments, content, folder_in
from filelock import FileLock
from forked import Forked, ran
from launching import losses

from sptnet import trunk_making
from sptnet.cli import main
from sptnet.run.checkpoint import checkpoints, read_facts
from sptnet.run.saving import Saver


@pytest.mark.parametrize(("kind", "near"), [("float32", 1e-5), ("float16", 2e-3)])
def test_from_the_cache_is_through_the_trunk(digits, uncached, tmp_path, kind, near):
    run = tmp_path / "run"
    assert main(arguments(run, digits, tmp_path / "cache", f"data.tokens={kind}")) == 0
    np.testing.assert_allclose(losses(run, STEPS), uncached(kind), rtol=near)
    assert np.ptp(losses(run, STEPS)) > 0.1
    header = (run / "log.txt").read_text()
    assert re.search(r"trunk cache.*0\.0\d+ GB", header)
    # what is written goes through the trunk, as an evaluation of its own
    metrics = json.loads((run / "metrics.json").read_text())
    assert main(["eval", str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text()) == metrics


WORLDS = [("ddp", 2), *(pytest.param(*world, marks=pytest.mark.slow) for world in
          [("ddp", 4), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])]  # fmt: skip


@pytest.mark.parametrize(("strategy", "processes"), WORLDS)
def test_on_many_processes_the_same_files_and_the_same_losses(digits, uncached, made, tmp_path, strategy, processes):
    cache, run = tmp_path / "cache", tmp_path / "run"
    world = ran(["-m", "sptnet", *arguments(run, digits, cache, "data.tokens=float32")], strategy, processes)
    assert world.returncode == 0, world.stderr[-3000:]
    assert re.search(rf"strategy\W+{strategy} \(\w+\), {processes} x cpu", (run / "log.txt").read_text())
    np.testing.assert_allclose(losses(run, STEPS), uncached("float32"), rtol=1e-5)
    assert content(cache) == content(made / "cache")


def test_a_run_that_cannot_go_on_is_told_before_tokens_are_made(digits, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sptnet.preparing.make", lambda *_: pytest.fail("tokens are made"))
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "finished").unlink()
    other = arguments(run, digits, tmp_path / "cache", "data.tokens=float32", "data.views=4")
    for _ in range(2):  # the folder is let go of
        assert main(other) == 1
        assert "data.views was 3, is 4" in capsys.readouterr().err
    shorter = arguments(run, digits, tmp_path / "cache", "schedule.epochs=3", "resume.allow=[schedule,data]")
    assert main(shorter) == 1
    assert "is of step 44, beyond the 33 of this schedule" in capsys.readouterr().err
    (kept := max((run / "checkpoints").iterdir()) / "KEEP").touch()
    anew = arguments(run, digits, tmp_path / "cache", "data.tokens=float32", "resume=none")
    assert main(anew) == 1
    assert "and marked KEEP" in capsys.readouterr().err
    (part := kept.parent / "part-00000.safetensors").write_bytes(part.read_bytes()[:-1])
    assert main(arguments(run, digits, tmp_path / "cache", "data.tokens=float32")) == 1
    assert "is damaged (sha256)" in capsys.readouterr().err


def test_training_from_the_cache_opens_no_shard(digits, made, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("sptnet.data.storage.store.LocalStore.open", lambda store, shard: opened.append(shard.file))
    monkeypatch.setattr("sptnet.train.evaluate_now", lambda *_: True)
    assert main(arguments(tmp_path / "run", digits, made / "cache", "data.tokens=float32")) == 0
    assert opened == []
    assert (losses(tmp_path / "run", STEPS) == losses(made / "run", STEPS)).all()


def training(run, data, cache):
    return Forked(["-m", "sptnet", *arguments(run, data, cache, "data.tokens=float32")])


def test_killed_while_it_is_made_it_goes_on_beside_another_run(digits, made, tmp_path):
    cache = tmp_path / "cache"
    one = training(tmp_path / "one", digits, cache)
    end = time.monotonic() + 120
    while not list(cache.glob("*/labelled-*.safetensors")):
        assert one.poll() is None, one.told
        assert time.monotonic() < end
        time.sleep(0.002)
    one.kill()
    whole = content(made / "cache")
    there = content(cache)
    assert {name: whole[name] for name in there if name.endswith(".safetensors")}.items() <= there.items()
    assert len(there) < len(whole)
    both = [training(tmp_path / name, digits, cache) for name in ("two", "three")]
    for process in both:
        assert process.wait(timeout=200) == 0, process.told
    assert content(cache) == whole
    assert not list(cache.glob("*/*.tmp"))
    for name in ("two", "three"):
        np.testing.assert_array_equal(losses(tmp_path / name, STEPS), losses(made / "run", STEPS))


def test_a_damaged_row_stops_the_run_with_a_checkpoint_and_is_made_again(digits, made, tmp_path, capsys):
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(made / "cache", cache)
    folder = folder_in(cache)
    rows = folder / "unlabelled-000003.tokens"
    sound = rows.read_bytes()
    rows.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    assert main(arguments(run, digits, cache, "data.tokens=float32")) == 1
    told = capsys.readouterr().err
    assert re.search(r"unlabelled-000003\S* is damaged in row \d of sample \d+; it is removed", told)
    assert not rows.exists()
    stopped = read_facts(checkpoints(run)[-1]).step
    assert 0 < stopped < STEPS
    assert main(arguments(run, digits, cache, "data.tokens=float32")) == 0
    assert rows.read_bytes() == sound
    np.testing.assert_array_equal(losses(run, STEPS), losses(made / "run", STEPS))


@pytest.mark.parametrize("how", ["rows are gone", "rows are short", "no safetensors", "a FIFO"])
def test_a_damaged_part_is_one_line_and_is_made_again(digits, made, tmp_path, capsys, how):
    cache = tmp_path / "cache"
    shutil.copytree(made / "cache", cache)
    part = folder_in(cache) / "labelled-000000.safetensors"
    rows = part.with_suffix(".tokens")
    if how == "no safetensors":
        part.write_bytes(b"garbage")
    elif how == "rows are short":
        os.truncate(rows, 100)
    else:
        rows.unlink()
        if how == "a FIFO":
            os.mkfifo(rows)
    command = arguments(tmp_path / "run", digits, cache, "data.tokens=float32", "schedule.epochs=1")
    assert main(command) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(r"labelled-000000.safetensors .*; it is removed, and the same command makes it again", told)
    assert main(command) == 0
    assert content(cache) == content(made / "cache")


def test_a_run_continues_without_the_cache_that_it_began_with(digits, made, tmp_path, monkeypatch):
    save, asked, run = Saver.save, [], tmp_path / "run"

    def and_ask(saver, *facts, **how):
        save(saver, *facts, **how)
        if not asked:  # twice would end it at once
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", and_ask)
        assert main(arguments(run, digits, made / "cache", "data.tokens=float32")) == 75
    assert main(arguments(run, digits, "off", "data.tokens=float32")) == 0
    np.testing.assert_allclose(losses(run, STEPS), losses(made / "run", STEPS), rtol=1e-5)


def test_asked_to_stop_while_it_is_made_it_stops_and_keeps_what_is_there(digits, tmp_path, monkeypatch):
    from sptnet.data import tokens

    finish, parts = tokens.PartWriter.finish, []

    def and_ask(writer):
        finish(writer)
        parts.append(writer.path)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(tokens.PartWriter, "finish", and_ask)
        patch.setenv("SPTNET_OUTCOME", str(tmp_path / "told"))
        (tmp_path / "told").mkdir()
        assert main(arguments(tmp_path / "run", digits, tmp_path / "cache")) == 75
    assert parts
    assert (tmp_path / "told" / "rank-0").read_text().startswith(f"continue: {len(parts)} of ")
    before = {path: path.stat().st_mtime_ns for path in parts}
    assert main(arguments(tmp_path / "run", digits, tmp_path / "cache")) == 0
    assert before == {path: path.stat().st_mtime_ns for path in parts}


def test_seeds_share_the_tokens_of_the_same_weights(digits, made, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from sptnet.build import build_model, build_store
    from sptnet.config_file import load_config

    monkeypatch.setattr("sptnet.train.run_steps", lambda *_: True)
    config = load_config(Path(arguments(1, digits, 1)[1]), arguments(tmp_path, digits, "off")[2:])
    model, _ = build_model(config, build_store(config).manifest)
    save_file(model.backbone.state_dict(), tmp_path / "weights.safetensors")
    for seed in (1, 2):
        extra = [f"seed={seed}", f"model.weights={tmp_path}/weights.safetensors"]
        assert main(arguments(tmp_path / f"run-{seed}", digits, tmp_path / "cache", *extra)) == 0
    assert folder_in(tmp_path / "cache")
    # and another seed would have made the same: views are keyed by their image alone
    alone = arguments(tmp_path / "run-3", digits, tmp_path / "alone", "seed=3", extra[1])
    assert main(alone) == 0
    assert content(tmp_path / "alone") == content(tmp_path / "cache")


def test_others_are_waited_for_as_long_as_their_parts_come(digits, made, tmp_path, monkeypatch, capsys):
    """Parts that others make, as their locks say: those to train from come one by one, the last one never."""
    monkeypatch.setattr(trunk_making, "MOST_WAITING", 6.0)
    monkeypatch.setattr(trunk_making, "POLL", 0.02)
    monkeypatch.setattr(trunk_making, "blocks", lambda *_, **__: pytest.fail("loaders of nothing"))
    folder = folder_in(shutil.copytree(made / "cache", tmp_path / "cache"))
    parts = [*sorted(folder.glob("unlabelled-0*.safetensors"))[:3], *sorted(folder.glob("test-0*.safetensors"))[-1:]]
    locks = [FileLock(part.with_suffix(".lock"), thread_local=False) for part in parts]
    for part, lock in zip(parts, locks, strict=True):
        lock.acquire()
        part.rename(part.with_suffix(".later"))

    def come():
        for part, lock in zip(parts[:-1], locks, strict=False):
            time.sleep(2.5)  # in all longer than anybody waits for one
            part.with_suffix(".later").rename(part)
            lock.release()

    assert len(parts) == 4
    with ThreadPoolExecutor() as others:
        others.submit(come)
        assert main(arguments(tmp_path / "run", digits, tmp_path / "cache", "data.tokens=float32")) == 1
    assert f"error: {parts[-1]} did not come within 0:00:06" in capsys.readouterr().err


def test_values_beyond_float16_are_one_line(digits, tmp_path, monkeypatch, capsys):
    from sptnet.method.model import PromptedViT

    trunk = PromptedViT.trunk
    monkeypatch.setattr(PromptedViT, "trunk", lambda *inputs: trunk(*inputs) * 1e6)
    assert main(arguments(tmp_path / "run", digits, tmp_path / "cache")) == 1
    told = capsys.readouterr().err
    assert re.search(r"tokens reach [\d.e+]+, more than float16 holds: set data.tokens=float32", told)


def test_a_disk_without_locks_keeps_tokens_too(digits, made, tmp_path, monkeypatch):
    """And no mark of a killed process is waited for: filelock's own way out, which other nodes never take over."""

    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unsupported)
    cache = tmp_path / "cache"
    assert main(arguments(tmp_path / "run", digits, cache, "data.tokens=float32")) == 0
    assert content(cache) == content(made / "cache")


def test_without_known_views_there_is_nothing_to_keep(digits, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", digits, tmp_path / "cache", "data.views=null")) == 2
    assert "trunk_cache is" in capsys.readouterr().err
