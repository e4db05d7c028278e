"""Training from a trunk's tokens: by loaders, through kills and damage, and what does not come from tokens."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from cached import STEPS, arguments, folder_in
from forked import Forked, ran
from launching import ROOT, losses
from sptnet_shards.make_shards import main as make_shards

from sptnet.build import build_model, build_store
from sptnet.cli import INTERRUPTED, main
from sptnet.commands.train import TO_BE_CONTINUED
from sptnet.config_file import load_config
from sptnet.data import tokens
from sptnet.data.format.manifest import KINDS
from sptnet.data.storage.store import LocalStore
from sptnet.evaluate import predict as evaluated
from sptnet.run.checkpoint import checkpoints, digest, read_facts
from sptnet.run.step_readback import StepReadback
from sptnet.strategy.connect import connect
from sptnet.strategy.create import create_evaluator
from sptnet.train import evaluate_now
from sptnet.trunk_cache import TrunkCache, choose


def test_loaders_give_the_same_steps(digits, made, tmp_path):
    run = tmp_path / "run"
    assert main(arguments(run, digits, made / "cache", "data.tokens=float32", "data.workers=2")) == 0
    np.testing.assert_array_equal(losses(run, STEPS), losses(made / "run", STEPS))


def test_evaluations_on_the_way_read_tokens_and_the_last_one_images(digits, made, tmp_path, monkeypatch):
    opened, during, of = [], [], LocalStore.open

    def opening(store, shard):
        opened.append(shard.file)
        return of(store, shard)

    def evaluating(run, log, done, stop):
        before = len(opened)
        finished = evaluate_now(run, log, done, stop)
        during.append((done, len(opened) - before))
        return finished

    monkeypatch.setattr(LocalStore, "open", opening)
    monkeypatch.setattr("sptnet.train.evaluate_now", evaluating)
    assert main(arguments(tmp_path / "run", digits, made / "cache", "data.tokens=float32")) == 0
    (way, on_the_way), (end, at_the_end) = during
    assert (way, on_the_way, end) == (STEPS // 2, 0, STEPS)
    assert at_the_end > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (line["evaluation"] for line in lines if "phase" not in line)
    assert first.keys() == last.keys() == {"unlabelled", "test"}
    assert first["test"].keys() == last["test"].keys()  # the same is told of both


@pytest.mark.slow
def test_killed_while_it_reads_it_goes_on(digits, made, tmp_path):
    run = tmp_path / "run"
    command = ["-m", "sptnet", *arguments(run, digits, made / "cache", "data.tokens=float32", "data.workers=2")]
    process = Forked(command)
    while not checkpoints(run):
        assert process.poll() is None, process.told
    process.kill()
    assert 0 < read_facts(checkpoints(run)[-1]).step < STEPS
    again = Forked(command)
    assert again.wait(timeout=200) == 0, again.told
    assert "continues from" in again.told
    np.testing.assert_array_equal(losses(run, STEPS), losses(made / "run", STEPS))


def test_a_row_that_one_rank_finds_damaged_stops_all_with_a_checkpoint(digits, made, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(made / "cache", cache)
    rows = folder_in(cache) / "unlabelled-000005.tokens"
    sound = rows.read_bytes()
    rows.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    command = ["-m", "sptnet", *arguments(run, digits, cache, "data.tokens=float32")]
    world = ran(command, "ddp", 2)
    assert world.returncode != 0
    assert re.search(r"ddp \(DistributedDataParallel\), 2 x cpu", (run / "log.txt").read_text())
    assert "is damaged in row" in world.stderr
    stopped = read_facts(checkpoints(run)[-1]).step
    assert 0 < stopped < STEPS
    world = ran(command, "ddp", 2)
    assert world.returncode == 0, world.stderr[-3000:]
    assert rows.read_bytes() == sound
    np.testing.assert_allclose(losses(run, STEPS), losses(made / "run", STEPS), rtol=1e-5)


def damaged(digits, root):
    """Shards of which some images do not decode."""
    shutil.copytree(digits, root)
    store = LocalStore(root)
    for kind in ("labelled", "unlabelled"):
        shard = store.manifest.of_kind(kind)[3]
        for _, _, offset, size in store.entries(shard)[:2].tolist():
            with open(root / shard.file, "r+b") as tar:
                tar.seek(offset)
                tar.write(bytes(size))
    return root


def test_an_image_that_does_not_decode_is_a_row_that_is_absent_and_is_replaced_alike(digits, tmp_path, capsys):
    root, counts = damaged(digits, tmp_path / "damaged"), []
    tolerant = ["data.tokens=float32", "data.tolerate_bad_samples=99", "evaluate.every=9", "schedule.epochs=2"]
    for name, cache in (("through", "off"), ("kept", tmp_path / "cache")):
        # what is evaluated must decode: that the training saw is told before
        assert main(arguments(tmp_path / name, root, cache, *tolerant)) == 1
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "does not decode" in told[0]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        counts.append([line["bad_samples"] for line in lines if "phase" in line])
    assert counts[0] == counts[1]
    assert counts[0][-1] >= 4
    np.testing.assert_allclose(losses(tmp_path / "kept", 22), losses(tmp_path / "through", 22), rtol=1e-5)


def header(run):
    return " ".join((run / "log.txt").read_text().replace("│", " ").split())


def test_auto_keeps_tokens_where_it_pays(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sptnet.train.run_steps", lambda *_: True)
    assert main(arguments(tmp_path / "few", digits, "auto", "data.views=1000", "schedule.epochs=1")) == 0
    assert re.search(
        r"trunk cache: none: the run looks at [\d,]+ views, and [\d,]+ would have", header(tmp_path / "few")
    )
    assert not any((tmp_path / ".cache").rglob("*.tokens"))
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert main(arguments(tmp_path / "many", digits, "auto")) == 0
    kept = tmp_path / "other" / ".cache" / "sptnet" / "tokens"
    assert f"trunk cache: {folder_in(kept)}, 0.0" in header(tmp_path / "many")
    parts = len(LocalStore(digits).manifest.of_kind("unlabelled"))
    assert len(list(folder_in(kept).glob("unlabelled-*.tokens"))) == parts


def test_a_run_that_is_nearly_done_makes_no_tokens_anew(digits, tmp_path, monkeypatch):
    """What they would serve are the steps that are left."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = arguments(tmp_path / "run", digits, "auto")
    follow = StepReadback.follow

    def stopping(self, batch, taken, facts):
        follow(self, batch, taken, facts)
        self.stop = batch.step == STEPS - 5

    with monkeypatch.context() as patch:
        patch.setattr(StepReadback, "follow", stopping)
        assert main(given) == TO_BE_CONTINUED
    assert "trunk cache: none" not in header(tmp_path / "run")
    shutil.rmtree(tmp_path / ".cache")
    assert main(given) == 0
    assert re.search(r"trunk cache: none: the run looks at [\d,]+ views, and [\d,]+ would", header(tmp_path / "run"))
    assert (tmp_path / "run" / "finished").exists()


def test_on_several_nodes_it_is_said_who_makes_all_of_it(monkeypatch):
    cache = TrunkCache(None, {}, 2 * 10**9, 10**9, 6000, 0.01, None)
    assert cache.cost() == "1.000 GB to be made, 6,000 views at 10.0 ms, about 1.0 min of one process"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cache.cost().endswith(" of one process, on every node with a disk of its own")


def test_what_it_will_cost_is_said_before_it_is_made(digits, tmp_path, monkeypatch, capsys):
    def making(*_, **__):
        told = capsys.readouterr().err
        assert re.search(r"trunk cache: \S+, 0\.\d+ GB; 0\.\d+ GB to be made, [\d,]+ views at [\d.]+ ms", told)
        raise KeyboardInterrupt

    monkeypatch.setattr("sptnet.trunk_making.blocks", making)
    assert main(arguments(tmp_path / "run", digits, tmp_path / "cache")) == INTERRUPTED


NARROW = "model.backbone_options={patch_size: 6, embed_dim: 24, depth: 2, num_heads: 3}"
OTHERS = ["data.views=4", "data.tokens=float16", "data.augment=crop_flip", "model.train_from_block=2",
          "model.image_size=30", NARROW]  # fmt: skip


def folder_for(cache, data, *others, weights="0" * 64, precision="no"):
    """Where the tokens of a run would lie."""
    settings = arguments("run", data, cache, "data.tokens=float32", *others)[2:]
    config = load_config("quickstart_simgcd", settings)
    store = build_store(config)
    model, _ = build_model(config, store.manifest)
    return choose(config, store, model, weights, torch.device("cpu"), precision, lambda: 10**6).tokens.folder


def test_all_that_decides_the_tokens_has_a_folder_of_its_own(digits, tmp_path):
    assert make_shards(["digits", str(tmp_path / "other"), "--seed", "5"]) == 0
    cache = tmp_path / "cache"
    folders = [folder_for(cache, digits, other) for other in OTHERS]
    folders += [
        folder_for(cache, digits),
        folder_for(cache, tmp_path / "other"),
        folder_for(cache, digits, weights="1" * 64),
        folder_for(cache, digits, precision="bf16"),
    ]
    assert len(set(folders)) == len(OTHERS) + 4
    for same in ("seed=7", "optimizer.lr=0.2", "schedule.epochs=9", "data.batch_size=64"):
        assert folder_for(cache, digits, same) == folder_for(cache, digits)


def test_many_parts_are_not_held_open(digits, made, monkeypatch):
    """A descriptor for each would end at a thousand shards."""
    monkeypatch.setattr(tokens, "KEPT_OPEN", 3)
    folder = folder_in(made / "cache")
    manifest = LocalStore(digits).manifest
    size = next(folder.glob("test-*.tokens")).stat().st_size // manifest.samples("test")  # of one row
    shape = tokens.TokenShape(3, size // (4 * 48), 48, "float32")
    reader = tokens.Tokens(folder, shape, {kind: manifest.of_kind(kind).samples.tolist() for kind in KINDS})
    before, row = len(os.listdir("/proc/self/fd")), reader.empty()
    for _ in range(2):
        for number in range(len(manifest.of_kind("unlabelled"))):
            reader.part("unlabelled", number).read(0, 0, row)
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_the_evaluated_view_is_the_last_row_and_the_only_one_of_a_test_image():
    shape = tokens.TokenShape(3, 5, 8, "float16")
    assert [(shape.rows_of(kind), shape.evaluated(kind)) for kind in KINDS] == [(3, 2), (4, 3), (1, 0)]


def test_an_evaluation_from_tokens_is_that_of_the_images(digits, made, monkeypatch):
    """Of a model in float32, whose tokens are not rounded: the same predictions, image by image."""
    config = load_config(
        f"{ROOT}/configs/quickstart_simgcd.yaml",
        arguments("run", digits, made / "cache", "data.tokens=float32", "evaluate.batch_size=64")[2:],
    )
    store = build_store(config)
    model, _ = build_model(config, store.manifest)
    accelerator, launch = connect(60)
    weights = digest((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    cache = choose(config, store, model, weights, torch.device("cpu"), "no", lambda: 10**9)
    assert isinstance(cache, TrunkCache)
    assert cache.missing == 0
    strategy = create_evaluator(accelerator, launch, model, config.memory.frozen_blocks)
    for kind in ("unlabelled", "test"):
        plain, kept = (
            torch.cat(list(evaluated(strategy, None, config, store, kind, tokens=of))) for of in (None, cache.tokens)
        )
        assert torch.equal(plain[:, :3], kept[:, :3])
        assert (plain[:, 3] - kept[:, 3]).abs().max() <= 20  # millionths
