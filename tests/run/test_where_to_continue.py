"""Which checkpoint a run goes on from, what of it must agree, and what comes back from it."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from sptnet import train
from sptnet.cli import main
from sptnet.config_file import load_config
from sptnet.run.checkpoint import checkpoints, read_facts
from sptnet.run.resume import where_to_continue

STEP = "checkpoints/step-000000005"


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def facts_changed(path, **values):
    file = path / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_its_own_newest_one_comes_before_another_runs(before):
    """A job that begins from another run, and is requeued."""
    for run, steps in (("own", (15, 20)), ("other", (10, 30))):
        for step in steps:
            copy = before / run / "checkpoints" / f"step-{step:09d}"
            shutil.copytree(before / "interrupted" / STEP, copy)
            facts_changed(copy, step=step)

    def asked(source):
        return where_to_continue(load_config("quickstart", ["init=null", f"run={before / 'own'}", f"resume={source}"]))

    own, other = checkpoints(before / "own"), checkpoints(before / "other")
    assert (own[-1].name, other[-1].name) == ("step-000000020", "step-000000030")
    assert asked(before / "other") == asked(other[0]) == asked("auto") == own[-1]
    assert asked(own[0]) == own[0]  # its own, named
    assert asked("none") is None
    shutil.rmtree(before / "own")
    assert asked(before / "other") == other[-1]
    assert asked(other[0]) == other[0]
    assert asked("auto") is None


def test_over_other_frozen_weights_it_does_not_go_on(before, again, capsys):
    facts = read_facts(before / "interrupted" / STEP)
    facts_changed(before / "interrupted" / STEP, backbone={**facts.backbone, "sha256": "0" * 64})
    assert main(["train", str(again)]) == 1
    assert "and their weights differ" in capsys.readouterr().err
    assert main(["train", str(again), "resume.allow=[backbone]"]) == 0


def test_what_went_wrong_before_is_counted_on(before, again):
    facts_changed(before / "interrupted" / STEP, counters={"bad_samples": 2, "skipped_steps": 1, "faulty_steps": 3})
    assert main(["train", str(again), "data.tolerate_bad_samples=9", "resume.allow=[data.tolerate_bad_samples]"]) == 0
    counters = read_facts(checkpoints(before / "interrupted")[-1]).counters
    assert counters.items() >= {"bad_samples": 2, "skipped_steps": 1, "faulty_steps": 3}.items()


def test_killed_between_a_checkpoint_and_its_evaluation_it_is_evaluated_first(before, again, monkeypatch):
    killed = []

    def once(run, log, done, stop):
        if not killed:
            killed.append(done)
            raise KeyboardInterrupt
        return evaluating(run, log, done, stop)

    evaluating = train.evaluate_now
    monkeypatch.setattr("sptnet.train.evaluate_now", once)
    every = ["evaluate.every=1", "checkpoint.every=1"]
    assert main(["train", str(again), *every]) != 0
    assert main(["train", str(again), *every]) == 0
    evaluated = [line["step"] for line in lines_of(before / "interrupted") if "phase" not in line]
    assert killed == [6]
    assert [step for step in evaluated if step >= 5] == [6, 12]


def test_a_run_is_finished_once_its_results_are_there(before, again, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sptnet.train.save_evaluation", full)
        assert main(["train", str(again)]) == 1
    assert not (before / "interrupted" / "finished").exists()
    assert main(["train", str(again)]) == 0
    assert (before / "interrupted" / "metrics.json").exists()


@pytest.mark.parametrize("full", [False, True])
def test_a_full_checkpoint_has_the_frozen_weights_too(before, again, full):
    last = "model.train_from_block=-1"
    assert main(["train", str(again), "resume=none", last, f"checkpoint.full={str(full).lower()}"]) == 0
    path, names = checkpoints(before / "interrupted")[-1], set()
    for part in path.glob("*.safetensors"):
        with safe_open(part, "np") as opened:
            names |= set(opened.keys())
    with safe_open(before / "interrupted" / "model.safetensors", "np") as model:
        frozen = [name for name in model.keys() if "patch_embed" in name]  # noqa: SIM118
        assert all((name in names) == full for name in frozen)
        if full:
            with safe_open(next(path.glob("*.safetensors")), "np") as part:
                np.testing.assert_array_equal(part.get_tensor(frozen[0]), model.get_tensor(frozen[0]))
