"""The checkpoint format: what is on disk, what is refused, what a failing disk leaves."""

import errno
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sptnet.run.checkpoint import (
    CheckpointError,
    Facts,
    checkpoints,
    digest,
    left_behind,
    read_facts,
    read_tensors,
    remove,
)
from sptnet.run.resume import _check_shapes
from sptnet.run.saving import Writer, writers_of

TENSORS = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a.step": torch.tensor(7.0), "prompt.b": torch.ones(4)}
FACTS = Facts(
    step=12,
    numbers={"seed": 0, "data.digest": "d"},
    backbone={"source": "none", "sha256": "e"},
    written_by={"strategy": "ddp", "world_size": 2, "precision": "no"},
    counters={"bad_samples": 1, "skipped_steps": 0},
)


def write(run: Path, step: int = 12, ranks: int = 2, keep: int = 2, attempt: str = "x") -> None:
    store = torch.distributed.HashStore()
    writers = [Writer(run, number, range(ranks), keep, attempt, store) for number in range(ranks)]
    for rank, writer in enumerate(writers):
        mine = {name: tensor for i, (name, tensor) in enumerate(TENSORS.items()) if i % ranks == rank}
        writer.begin(Facts(**{**FACTS.__dict__, "step": step}), mine)
    for writer in writers:
        writer.wait()


def test_a_checkpoint_of_this_version_is_read(tmp_path):
    """CHECKPOINT CHANGED must be said in CHANGELOG.md where the names or the schema change."""
    write(tmp_path)
    path = tmp_path / "checkpoints" / "step-000000012"
    names = ["checkpoint.json", "part-00000.safetensors", "part-00001.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == names
    raw = json.loads((path / "checkpoint.json").read_text())
    assert raw["schema"] == "sptnet-checkpoint/1"
    assert set(raw) == {"schema", "step", "numbers", "backbone", "written_by", "counters", "parts"}
    facts = read_facts(path)
    assert (facts.step, facts.numbers, facts.counters) == (12, FACTS.numbers, FACTS.counters)
    tensors = read_tensors(path, facts)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_few_ranks_write_whatever_their_number():
    assert writers_of(False, 512) == [0]
    assert writers_of(True, 512) == list(range(0, 512, 64))
    assert writers_of(True, 3) == [0, 1, 2]
    assert writers_of(True, 12) == [0, 1, 3, 4, 6, 7, 9, 10]


def test_the_newest_and_the_marked_ones_stay(tmp_path):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step, ranks=1)
        if step == 20:
            (tmp_path / "checkpoints" / "step-000000020" / "KEEP").touch()
    assert [read_facts(path).step for path in checkpoints(tmp_path)] == [20, 40, 50]


def test_a_run_that_begins_anew_keeps_what_is_marked(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, ranks=1, keep=3)
    first, second, third = checkpoints(tmp_path)
    assert left_behind(tmp_path, second) == [third]
    for elsewhere in (None, tmp_path / "other" / "checkpoints" / "step-000000020"):
        assert left_behind(tmp_path, elsewhere) == [first, second, third]
    (second / "KEEP").touch()
    assert left_behind(tmp_path, second) == [third]
    with pytest.raises(CheckpointError, match="step-000000020 is later than step 10"):
        left_behind(tmp_path, first)


def test_what_a_killed_attempt_left_is_not_taken_for_a_checkpoint(tmp_path):
    partial = tmp_path / "checkpoints" / "step-000000012.killed.tmp"
    partial.mkdir(parents=True)
    (partial / "part-00001.json").write_text('{"file": "part-00001.safetensors", "bytes": 1, "sha256": "0"}')
    assert checkpoints(tmp_path) == []
    write(tmp_path)
    assert read_tensors(checkpoints(tmp_path)[0], read_facts(checkpoints(tmp_path)[0])).keys() == TENSORS.keys()
    assert not partial.exists()


def _write_for_ever(run: Path, first: int) -> None:
    big = np.arange(500_000, dtype=np.float32)  # numpy: torch's threads do not survive a fork
    for step in range(first, 10**6):
        writer = Writer(run, 0, [0], keep=2, attempt=str(step))
        writer.begin(Facts(**{**FACTS.__dict__, "step": step}), {"model.a": torch.from_numpy(big + np.float32(step))})
        writer.wait()


def test_killed_while_it_writes_the_newest_complete_one_loads(tmp_path):
    """Twenty times, at random moments, in the same folder as those killed before."""
    moments, context = random.Random(0), multiprocessing.get_context("fork")
    steps = [0]
    for _ in range(20):
        process = context.Process(target=_write_for_ever, daemon=True, args=(tmp_path, steps[-1] + 1))
        process.start()
        end = time.monotonic() + 60
        while not (there := checkpoints(tmp_path)) or int(there[-1].name[5:]) <= steps[-1]:
            assert time.monotonic() < end, "no checkpoint appeared"
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        newest = checkpoints(tmp_path)[-1]
        facts = read_facts(newest)
        assert read_tensors(newest, facts)["model.a"][7] == 7 + facts.step
        steps.append(facts.step)
    assert steps == sorted(set(steps))
    assert steps[-1] >= 20


def test_damage_is_told(tmp_path):
    write(tmp_path)
    path = checkpoints(tmp_path)[0]
    facts, part = read_facts(path), path / "part-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part-00001\.safetensors is damaged"):
        read_tensors(path, facts)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"part-00001\.safetensors cannot be read"):
        read_tensors(path, facts)
    (path / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has schema None"):
        read_facts(path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_facts(tmp_path)


def test_a_disk_that_fails_leaves_the_previous_one_and_says_so(tmp_path):
    write(tmp_path, 10, ranks=1)
    folder = tmp_path / "checkpoints"
    (folder / "step-000000020.x.tmp").write_text("a file in the place of the folder")
    writer = Writer(tmp_path, 0, [0], 2, "x")
    writer.begin(Facts(**{**FACTS.__dict__, "step": 20}), TENSORS)
    told = r"step-000000020 cannot be written on rank 0: .*step-000000010 is intact"
    with pytest.raises(CheckpointError, match=told) as raised:
        writer.wait()
    assert raised.value.outcome == "final"
    assert [read_facts(path).step for path in checkpoints(tmp_path)] == [10]


def test_a_disk_that_may_come_back_is_tried_again(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("sptnet.run.saving.write_through", failing)
    writer = Writer(tmp_path, 0, [0], 2, "x")
    writer.begin(FACTS, TENSORS)
    with pytest.raises(CheckpointError, match="Stale file handle") as raised:
        writer.wait()
    assert raised.value.outcome == "retry"


def test_a_digest_tells_weights_apart():
    one = {"b": torch.ones(3), "a": torch.zeros(2)}
    assert digest(one.items()) == digest(reversed(one.items()))
    assert digest(one.items()) != digest({**one, "a": torch.zeros(2, 1)}.items())
    assert digest(one.items()) != digest({**one, "a": torch.tensor([0.0, 1e-30])}.items())


@pytest.mark.parametrize(
    ("odd", "told"),
    [({"model.w": torch.zeros(3)}, r"model.w of shape \[3\], and this run's is \[2, 3\]"),
     ({"optimizer.w.momentum_buffer": torch.zeros(1)}, "optimizer.w.momentum_buffer of shape"),
     ({"prompt.p": torch.zeros(1, 1)}, "prompt.p of shape"),
     ({"prompt_optimizer.p.momentum_buffer": torch.zeros(5)}, "prompt_optimizer.p.momentum_buffer of shape")],
)  # fmt: skip
def test_what_resume_allow_let_through_is_compared_before_anything_is_put_back(odd, told):
    prompt = torch.nn.ParameterDict({"p": torch.nn.Parameter(torch.zeros(4))})
    trained = [("w", torch.nn.Parameter(torch.zeros(2, 3)))]
    learner = SimpleNamespace(strategy=SimpleNamespace(trained=lambda: trained), prompt=prompt)
    whole = {
        "model.w": torch.zeros(2, 3),
        "optimizer.w.momentum_buffer": torch.zeros(2, 3),
        "optimizer.w.step": torch.tensor(1.0),
        "prompt.p": torch.zeros(4),
        "prompt_optimizer.p.momentum_buffer": torch.zeros(4),
    }
    _check_shapes(Path("step-000000003"), learner, whole)
    with pytest.raises(CheckpointError, match=f"^step-000000003 has {told}.*resume=none"):
        _check_shapes(Path("step-000000003"), learner, whole | odd)


def test_a_checkpoint_of_which_a_part_is_removed_is_none(tmp_path, monkeypatch):
    write(tmp_path, 10, ranks=1)
    (path,) = checkpoints(tmp_path)
    monkeypatch.setattr("sptnet.run.checkpoint.shutil.rmtree", lambda *_, **__: None)  # killed in the middle of it
    remove(path)
    assert path.exists()
    assert checkpoints(tmp_path) == []
